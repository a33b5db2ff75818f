"""ContMix: its weights by the formula, two kernels side by side, small maps, and what it is in an OverLoCK."""

from functools import partial

import pytest
import torch
from torch import Tensor

from models.attention import Grid, Refused, Site
from models.attention.contmix import ContMix, averaged, resized
from models.attention.explain import explained
from models.backbones.overlock import OverLoCK
from models.layers.tokens import to_map, to_tokens

GRID = Grid(9, 8)
SITE = Site(16, 2, GRID, 0, 0, 1, "hierarchical")


def made(site: Site = SITE, **options) -> ContMix:
    torch.manual_seed(0)
    mixer = ContMix(site, **{"kernel_size": 7, "small_kernel": 3} | options)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    return mixer.double().eval()


def tokens(grid: Grid = GRID, dim: int = 16) -> Tensor:
    return torch.randn(2, grid.tokens, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def by_hand(mixer: ContMix, x: Tensor, grid: Grid) -> Tensor:
    """Weights of one token after another on those around it, (B, 2·G, N, N)."""
    groups, dim = mixer.groups, x.shape[-1]
    pooled = to_tokens(torch.nn.functional.adaptive_avg_pool2d(to_map(x, grid), 7))
    q = mixer.q_norm(mixer.q(x)).unflatten(-1, (groups, -1)) * (dim / groups) ** -0.5
    k = mixer.k_norm(mixer.k(pooled)).unflatten(-1, (groups, -1))
    whole = x.new_zeros(len(x), 2 * groups, grid.tokens, grid.tokens)
    first = 0
    for half, side in enumerate((3, 7)):
        for token in range(grid.tokens):
            row, column = divmod(token, grid.width)
            top, left = (
                min(max(at - side // 2, 0), most - side) for at, most in zip((row, column), grid[:2], strict=True)
            )
            cells = [(top + i, left + j) for i in range(side) for j in range(side)]
            affinity = torch.einsum("bgd,bpgd->bgp", q[:, token], k)
            logits = mixer.weigh(affinity)[..., first : first + side * side]
            table = mixer.biases[half].table
            bias = torch.stack([table[:, y - row + side - 1, x - column + side - 1] for y, x in cells], dim=-1)
            at = [y * grid.width + x for y, x in cells]
            whole[:, half * groups : (half + 1) * groups, token, at] = (logits + bias).softmax(-1)
        first += side * side
    return whole


@torch.no_grad()
def test_weights_are_those_of_the_paper():
    mixer, x = made(), tokens()
    found = mixer.attention_matrix(x, GRID)
    torch.testing.assert_close(found, by_hand(mixer, x, GRID))
    values = mixer.v_norm(mixer.v(x)).unflatten(-1, (2 * mixer.groups, -1))
    mixed = torch.einsum("bmns,bsmd->bnmd", found, values).flatten(2)
    torch.testing.assert_close(mixer(x, GRID).x, mixer.proj_norm(mixer.proj(mixed)))


@pytest.mark.parametrize("grid", [Grid(4, 4), Grid(5, 3), Grid(3, 11), Grid(1, 1)])
@torch.no_grad()
def test_a_small_map_is_enlarged_and_comes_back(grid):
    mixer, x = made(), tokens(grid)
    size = mixer.enlarged(grid)
    assert min(size[:2]) == 7 and (size.height > size.width) == (grid.height > grid.width)
    matrix = mixer.attention_matrix(x, grid)
    torch.testing.assert_close(matrix.sum(-1), torch.ones_like(matrix[..., 0]))
    torch.testing.assert_close(mixer.attend(matrix, x, grid), mixer(x, grid).x)
    torch.testing.assert_close(averaged(resized(x[:, :1].expand_as(x), grid, size), size, grid), x[:, :1].expand_as(x))


def test_it_is_explained_by_its_weights():
    mixer, x = made(), tokens()
    with torch.no_grad():
        expected = mixer(x, GRID).x
    with explained(torch.nn.ModuleDict({"attn": mixer})) as matrices:
        found = mixer(x, GRID).x
        found.square().sum().backward()
    torch.testing.assert_close(found, expected)
    (matrix,) = matrices["attn"]
    torch.testing.assert_close(matrix, mixer.attention_matrix(x, GRID))
    assert matrix.grad.abs().sum() > 0


@torch.no_grad()
def test_far_tokens_decide_weights_but_are_not_mixed():
    """A token outside of both kernels changes what is given through the context alone."""
    mixer, x = made(kernel_size=3), tokens()
    other = x.clone()
    other[:, -1] += 5
    assert not torch.allclose(mixer(other, GRID).x[:, 0], mixer(x, GRID).x[:, 0])
    mixer.weigh.weight.zero_()
    torch.testing.assert_close(mixer(other, GRID).x[:, 0], mixer(x, GRID).x[:, 0])


@torch.no_grad()
def test_gates_weight_halves_of_the_channels():
    mixer, x = made(), tokens()
    mixer.proj, mixer.proj_norm = torch.nn.Identity(), torch.nn.Identity()
    gates = torch.rand(2, GRID.tokens, 2, dtype=torch.float64)
    expected = mixer(x, GRID).x.unflatten(-1, (2, 8)) * gates[..., None]
    torch.testing.assert_close(mixer(x, GRID, gates).x, expected.flatten(2))


@torch.no_grad()
def test_in_an_overlock_another_stream_is_the_context_and_there_is_no_matrix():
    mixer, x = made(SITE._replace(context=4)), tokens()
    assert mixer.reads_stream and mixer.reads_context and not mixer.has_matrix
    stream = torch.cat([x, tokens(dim=4)], dim=-1)
    found = mixer(x, GRID, stream_BNC=stream).x
    stream[..., 16:] *= -1
    assert not torch.allclose(mixer(x, GRID, stream_BNC=stream).x, found)
    with pytest.raises(TypeError, match="has no attention matrix: its weights are made of another stream besid"):
        mixer.attention_matrix(x, GRID)
    assert not any(bias.table.any() for bias in ContMix(SITE._replace(context=4)).biases)


def test_kernels_are_those_of_the_stage():
    own = {"dims": [32, 64], "depths": [1, 1], "kernels": [5, 5], "focus_depths": [1, 1], "num_heads": [2, 4]}
    model = OverLoCK(partial(ContMix, kernel_size=[9, 7]), 32, 5, **own)
    assert [stage.blocks[0].attn.kernels[1].kernel for stage in model.stages] == [(9, 9), (7, 7)]
    assert ContMix(SITE._replace(stage=3)).kernels[1].kernel == (7, 7)
    assert ContMix(SITE._replace(kind="vit")).kernels[1].kernel == (13, 13)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel_size": 4}, "contmix: kernel_size must be odd and positive, got 4; set attention.kernel_size"),
        ({"small_kernel": 0}, "contmix: small_kernel must be odd and positive, got 0; set attention.small_kernel"),
        ({"small_kernel": 9}, "contmix: small_kernel must be at most kernel_size 7, got 9; set attention.small_kernel"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        made(**options)


def test_wrong_places_are_refused():
    with pytest.raises(Refused, match=r"20 channels do not divide into four parts for each of 2 heads; change mod"):
        made(SITE._replace(dim=20))
    with pytest.raises(
        Refused, match=r"kernel_size=\[9, 7\] has no entry for stage 2; set attention.kernel_size to one"
    ):
        made(SITE._replace(stage=2), kernel_size=[9, 7])
