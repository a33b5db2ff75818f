"""Every mechanism in every layout has a matrix of tokens that does what the forward pass does, or says why it has none.

Both are what conf/ lists: a new YAML is tested without a line. `python tests/contract/test_matrices.py` prints which
have one, and why the others have none.
"""

import copy
import sys
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))

from models import list_attentions
from models.attention import Grid, Mixer, Refused, Site, make
from models.attention.aggregated import AggregatedAttention
from models.attention.contmix import ContMix
from models.attention.contract.heads import merge_heads, split_heads
from models.attention.cores.galerkin import HeadNorm
from models.attention.cross_shaped import CrossShaped
from models.attention.dual import Positioned
from models.attention.explain import explained
from models.attention.gating import Gating
from models.attention.layouts.clusters.boat import Bisected
from models.attention.layouts.clusters.routing import Routed
from models.attention.layouts.neighborhood import keys_along
from models.attention.multihead import Core, MultiHead
from models.attention.softmax import softmax_attention
from models.factory import compose_model, instantiate
from tests.contract.test_layouts import SHIFTED, cores, layouts, read

FITS = Grid(14, 7)  # divides into windows of 7 and regions
GRIDS = {"fits": FITS, "padded": Grid(9, 10)}
SITE = Site(dim=32, num_heads=4, grid=FITS, stage=1, block=1, depth=2, kind="hierarchical")
# shifted, channels of a pair, pooled keys; and what stages of small maps have instead
SITES = {"block 1": SITE, "block 0": SITE._replace(block=0), "last stage": SITE._replace(stage=3, block=0)}
# keys beyond the map take part whatever its size, or its windows do not divide this one; tokens in no cluster see none
LACKING = {"halo", "routing", "multi_window", "dual_384", "cswin", "stripes"}
QUICK = {"softmax", "agent", "aggregated", "axial", "biformer", "cswin"}  # one of each kind
QUICK |= {"galerkin", "moh", "multi_window", "relational"}
QUICK_LAYOUTS = {SHIFTED, "halo", "reduced", "routing"}


@cache
def mechanism(name: str) -> partial:
    return read("attention").get(name) or instantiate(compose_model("vit_32px", name).attention)


@cache
def mixer_of(name: str, place: str, layout: str | None = None) -> Mixer | Refused:
    """With parameters away from their start, where zeros hide much; or why there is none."""
    torch.manual_seed(0)
    made = mechanism(name)
    try:
        mixer = make(made if layout is None else partial(made, layout=layouts()[layout]), SITES[place]).eval()
    except Refused as refused:
        return refused
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter += 0.05 * torch.randn(parameter.shape)
    return mixer


def cases() -> Iterator:
    """Mechanisms as they are, in three places; and cores in layouts."""
    for name in list_attentions():
        for place in SITES:
            quick = name in QUICK and place == "block 1"
            yield pytest.param(name, place, None, id=f"{name}, {place}", marks=[] if quick else [pytest.mark.full])
    for name in cores():
        for layout in layouts():
            quick = name == "softmax" and layout in QUICK_LAYOUTS
            yield pytest.param(
                name, "block 1", layout, id=f"{name} in {layout}", marks=[] if quick else [pytest.mark.full]
            )


each = pytest.mark.parametrize(("name", "place", "layout"), list(cases()))


@pytest.fixture
def mixer(name: str, place: str, layout: str | None) -> Mixer:
    made = mixer_of(name, place, layout)
    if isinstance(made, Refused):
        pytest.skip(f"refused: {made}")
    if not made.has_matrix:
        pytest.skip(f"no matrix: {made.without_matrix}")
    return made


def inner(mixer: Mixer) -> Mixer:
    """Without what stands in front of it or weights its heads."""
    return inner(mixer.mixer) if isinstance(mixer, Gating | Positioned) else mixer


def kind_of(mixer: Mixer) -> str:
    mixer = inner(mixer)
    return type(mixer.cores[0] if isinstance(mixer, CrossShaped) else getattr(mixer, "core", mixer)).__name__


def tokens(grid: Grid) -> Tensor:
    return torch.randn(2, grid.tokens, SITE.dim, generator=torch.Generator().manual_seed(grid.width))


@each
def test_it_has_a_matrix_or_says_why_not(name, place, layout):
    mixer = mixer_of(name, place, layout)
    if isinstance(mixer, Refused) or mixer.has_matrix:
        return
    assert len(mixer.without_matrix.split()) > 5
    for ask in (mixer.attention_matrix, mixer.token_weights):
        with pytest.raises(TypeError, match=f"attention_matrix: .* has no attention matrix: {mixer.without_matrix}"):
            ask(tokens(FITS), FITS)


@pytest.mark.full
def test_convolutions_and_attention_among_channels_have_none():
    made = {name: mixer_of(name, "block 1") for name in list_attentions()}
    without = {kind_of(mixer) for mixer in made.values() if isinstance(mixer, Mixer) and not mixer.has_matrix}
    assert without >= {"DepthwiseConv", "CrossCovarianceCore", "ChannelCore"} and len(without) < len(made) / 5


@each
@pytest.mark.parametrize("grid", GRIDS, ids=GRIDS)
@torch.no_grad()
def test_weights_times_values_are_the_output(mixer, grid):
    """Less what it adds, which no key decides; the values of what completes a map are zero."""
    mixer, x = completed_by_zeros(inner(mixer)), tokens(GRIDS[grid])
    added = added_by(mixer, x, GRIDS[grid])
    expected = torch.zeros_like(added)
    if mixer.adds:
        other = copy.deepcopy(mixer)
        for layer in projections(other):
            keys = slice(mixer.qk_dim, 2 * mixer.qk_dim) if hasattr(mixer, "qk_dim") else thirds(layer)[1]
            layer.weight[keys] *= 1.5
        expected = added_by(other, x, GRIDS[grid])
        assert added.abs().mean() > 1e-3
    torch.testing.assert_close(added, expected, rtol=0, atol=2e-5)


def completed_by_zeros(mixer: Mixer) -> Mixer:
    mixer = copy.deepcopy(mixer)
    for layer in projections(mixer):
        if layer.bias is not None:
            layer.bias[2 * layer.out_features // 3 :] = 0
    for norm in (module for module in mixer.modules() if isinstance(module, HeadNorm)):
        norm.bias.zero_()
    return mixer


def added_by(mixer: Mixer, x: Tensor, grid: Grid) -> Tensor:
    return mixer(x, grid).x - mixer.attend(mixer.attention_matrix(x, grid), x, grid)


def projections(mixer: Mixer) -> list[nn.Linear]:
    names = ("v",) if isinstance(mixer, ContMix) else ("qkv", "linear1")
    found = [module for name, module in mixer.named_modules() if name.rpartition(".")[2] in names]
    assert found
    return found


def thirds(layer: nn.Linear) -> list[slice]:
    third = layer.out_features // 3
    return [slice(part * third, (part + 1) * third) for part in range(3)]


@each
@pytest.mark.parametrize("grid", GRIDS, ids=GRIDS)
@torch.no_grad()
def test_on_the_map_they_give_the_same(mixer, grid):
    """Weights of all tokens on all tokens, times the values of the tokens."""
    grid, mixer = GRIDS[grid], completed_by_zeros(inner(mixer))
    x = tokens(grid)
    matrix = mixer.attention_matrix(x, grid)
    found = mixer.token_weights(x, grid)
    assert found.weights.shape[2:] == (grid.tokens, found.kv_grid.tokens) and found.grid == grid
    assert found.on_tokens().shape[2:] == (grid.tokens, grid.tokens)
    torch.testing.assert_close(found.on_tokens().sum(-1), found.weights.sum(-1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mixer.over_tokens(2 * matrix, x, grid).weights, 2 * found.weights)
    if (expected := of_tokens(mixer, found.weights, x, grid)) is not None:
        torch.testing.assert_close(expected, mixer.attend(matrix, x, grid), rtol=1e-4, atol=2e-5)


def of_tokens(mixer: Mixer, weights: Tensor, x: Tensor, grid: Grid) -> Tensor | None:
    """What weights on the map give; None where keys are other tokens, or a token is in several groups with a norm."""
    if isinstance(mixer, MultiHead):
        again = type(mixer.core).finished is not Core.finished and isinstance(mixer.layout, Bisected | Routed)
        if mixer.reduce is not None or mixer.value is not None or again:
            return None
        v = mixer.core.valued(split_heads(mixer.qkv(x), 3, mixer.num_heads)[2], grid)
        return mixer.proj(merge_heads(mixer.core.finished(weights.to(v.dtype) @ v)))
    return None if isinstance(mixer, AggregatedAttention) else mixer.attend(weights, x, grid)


@each
@pytest.mark.parametrize("grid", GRIDS, ids=GRIDS)
@torch.no_grad()
def test_rows_sum_to_one_where_it_says_so(mixer, grid, name, layout):
    x = tokens(GRIDS[grid])
    matrix, on_map = mixer.attention_matrix(x, GRIDS[grid]), mixer.token_weights(x, GRIDS[grid]).weights
    if not mixer.row_stochastic:
        assert not torch.allclose(matrix.sum(-1), torch.ones(()), atol=1e-4)
        return
    if isinstance(inner(mixer), MultiHead):
        torch.testing.assert_close(matrix.sum(-1), torch.ones(matrix.shape[:-1]), rtol=0, atol=1e-4)
    if grid == "fits" and not {name, layout} & LACKING:
        torch.testing.assert_close(on_map.sum(-1), torch.ones(on_map.shape[:-1]), rtol=0, atol=1e-4)
    if matrix.min() >= 0:
        assert on_map.min() >= -1e-5 and on_map.sum(-1).max() <= 1 + 1e-4


@each
def test_explained_it_is_the_same_with_its_gradient(mixer):
    grid, made = GRIDS["padded"], torch.Generator().manual_seed(2)
    x, plain = (tokens(grid).requires_grad_() for _ in range(2))
    factor = torch.randn(x.shape, generator=made)
    with explained(nn.ModuleDict({"attn": mixer})) as matrices:
        out = mixer(x, grid).x
    (noted,) = matrices["attn"]
    expected = mixer(plain, grid).x
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    for result in (out, expected):
        (result * factor).sum().backward()
    torch.testing.assert_close(x.grad, plain.grad, rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        found, usual = mixer.over_tokens(noted, x, grid), mixer.token_weights(x, grid)
    torch.testing.assert_close(found.weights, usual.weights, rtol=1e-4, atol=1e-5)
    if not isinstance(mixer, Gating):
        given = noted.detach().clone().requires_grad_()
        (mixer.attend(given, x.detach(), grid) * factor).sum().backward()
        torch.testing.assert_close(noted.grad, given.grad, rtol=1e-3, atol=1e-4)


def apart(grid: Grid) -> tuple[Tensor, Tensor]:
    """Row and column of a query and of a key, (N, N, 2) each."""
    y, x = torch.meshgrid(*(torch.arange(side) for side in grid[:2]), indexing="ij")
    place = torch.stack([y.flatten(), x.flatten()], dim=-1)
    return torch.broadcast_tensors(place[:, None], place[None])


def in_neighbourhood(grid: Grid) -> Tensor:
    rows, columns = (torch.zeros(side, side).scatter(1, keys_along(side, 7, 1, 1), 1) for side in grid[:2])
    return (rows[:, None, :, None] * columns[None, :, None, :]).flatten(2).flatten(0, 1) > 0


def in_rolled_window(q: Tensor, k: Tensor) -> Tensor:
    """Windows of 7 rolled by 3 rows, not by columns, of which the site has no more than one window."""
    rolled = [torch.stack([(place[..., 0] - 3) % 14, place[..., 1]], dim=-1) // 7 for place in (q, k)]
    return (rolled[0] == rolled[1]).all(-1) & ((q < 3) == (k < 3))[..., 0]


BLOCK = torch.tensor([8, 7])  # cut to the map of the site


VISIBLE = {
    "whole": lambda q, k, grid: torch.ones(grid.cells, grid.cells, dtype=torch.bool),
    "window": lambda q, k, grid: (q // 7 == k // 7).all(-1),
    SHIFTED: lambda q, k, grid: in_rolled_window(q, k),
    "grid": lambda q, k, grid: (q % (-(-torch.tensor(grid[:2]) // 7)) == k % (-(-torch.tensor(grid[:2]) // 7))).all(-1),
    "halo": lambda q, k, grid: ((k >= q // BLOCK * BLOCK - 3) & (k < q // BLOCK * BLOCK + BLOCK + 3)).all(-1),
    "neighborhood": lambda q, k, grid: in_neighbourhood(grid),
    "axial": lambda q, k, grid: torch.stack([(q == k)[..., axis] for axis in (1, 1, 1, 1, 0, 0, 0, 0)]),
    "stripes": lambda q, k, grid: torch.stack([(q // 2 == k // 2)[..., axis] for axis in (1, 1, 0, 0)]),
}


@pytest.mark.parametrize("layout", VISIBLE)
@torch.no_grad()
def test_tokens_see_those_of_their_layout_and_no_others(layout):
    mixer = mixer_of("softmax", "block 1", layout)
    for grid in GRIDS.values():
        weights = mixer.token_weights(tokens(grid), grid).weights
        visible = VISIBLE[layout](*apart(grid), grid)
        assert torch.equal(weights > 1e-9, visible.expand_as(weights))


@torch.no_grad()
def test_class_tokens_of_windows_see_all_windows_and_are_seen_in_each():
    grid = Grid(8, 8, 1)
    torch.manual_seed(0)
    mixer = make(partial(softmax_attention, layout=partial(layouts()["window"], size=4)), SITE._replace(grid=grid))
    x = tokens(grid)
    weights = mixer.token_weights(x, grid).weights
    assert (weights[:, :, 0] > 0).all() and (weights[..., 0] > 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]), rtol=0, atol=1e-5)
    v = split_heads(mixer.qkv(x), 3, 4)[2]
    torch.testing.assert_close(mixer.proj(merge_heads(weights @ v)), mixer(x, grid).x, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_keys_that_a_step_drops_have_no_weight():
    """Random keys, in training; in evaluation all have some."""
    made = partial(softmax_attention, layout=layouts()["whole"], transform=read("attention/transform")["random_keys"])
    mixer, x = make(made, SITE), tokens(FITS)
    seen = mixer.token_weights(x, FITS).weights.sum((0, 1, 2)) > 0
    assert seen.sum() == FITS.tokens // 2 and seen.nonzero().flatten().equal(mixer.transform.kept(FITS))
    assert (mixer.eval().token_weights(x, FITS).weights > 0).all()


@pytest.mark.parametrize("name", ["window", "hedgehog"])
@torch.no_grad()
def test_in_half_precision(name):
    mixer, x = mixer_of(name, "block 1"), tokens(FITS)
    half = copy.deepcopy(mixer).to(torch.bfloat16)
    found, usual = half.token_weights(x.bfloat16(), FITS).weights, mixer.token_weights(x, FITS).weights
    torch.testing.assert_close(found.float(), usual, rtol=0.1, atol=0.02)


@torch.no_grad()
def test_a_pooled_key_stands_for_the_cells_that_it_averages():
    """The same image with one cell changed: the key that pools it is read by as much as its cells are."""
    mixer, grid = mixer_of("aggregated", "block 1"), Grid(7, 10)
    matrix = torch.zeros(1, 4, 70, 70 + 2)  # sides four times shorter: 1 x 2 pooled tokens
    matrix[..., 5, -1] = 1
    (row,) = mixer.over_tokens(matrix, tokens(grid), grid).weights[0, 0, 5:6]
    assert torch.equal(row.unflatten(0, (7, 10)) > 0, torch.arange(10).expand(7, -1) >= 5)
    torch.testing.assert_close(row.sum(), torch.tensor(1.0))


@pytest.mark.parametrize("options", [{"ratio": 4}, {"ratio": 1, "pool": 7}, {"ratio": 1, "pool": 12}], ids=str)
def test_a_shortened_key_stands_for_the_cells_that_it_is_made_of(options):
    """Those that a change of it moves, each with the same share; a map of 12 is pooled from one of 9 by repetition."""
    grid = GRIDS["padded"]
    torch.manual_seed(0)
    mixer = make(partial(softmax_attention, layout=partial(read("attention/layout")["reduced"], **options)), SITE)
    x = tokens(grid).requires_grad_()
    keys, kv_grid = mixer.reduce(x, grid)
    for key in range(0, kv_grid.tokens, 5):
        matrix = torch.zeros(1, 4, grid.tokens, kv_grid.tokens)
        matrix[..., key] = 1
        row = mixer.over_tokens(matrix, x, grid).on_tokens()[0, 0, 3]
        (moved,) = torch.autograd.grad(keys[0, key].square().sum(), x, retain_graph=True)
        assert torch.equal(row > 0, moved[0].abs().sum(-1) > 0)
        torch.testing.assert_close(row[row > 0], torch.full_like(row[row > 0], 1 / int((row > 0).sum())))


if __name__ == "__main__":
    for case in cases():
        mixer = mixer_of(*case.values)
        why = mixer.reason if isinstance(mixer, Refused) else mixer.without_matrix
        said = "matrix" if not isinstance(mixer, Refused) and mixer.has_matrix else f"none: {why}"
        print(f"{case.id}: {said}")
