"""Hyper-kernels: made of coordinates alone, gated by the context, convolved over the whole map, the same on any map."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.attention import Grid, Site
from models.attention.hyper_kernel import HyperKernel, SlowNetwork, centred, coordinates, standardised

GRID = Grid(5, 6)
SITE = Site(16, 4, GRID, 0, 0, 1, "hierarchical")


@pytest.fixture
def mixer() -> HyperKernel:
    torch.manual_seed(0)
    return HyperKernel(SITE, kernel_size=3).double()


def tokens(grid: Grid = GRID) -> Tensor:
    return torch.randn(2, grid.tokens, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def maps(grid: Grid = GRID) -> Tensor:
    return tokens(grid).mT.unflatten(2, grid[:2])


def test_a_hyper_kernel_is_a_function_of_coordinates_whatever_the_map():
    torch.manual_seed(0)
    slow = SlowNetwork(16, 8, 2).double()
    coarse, fine = slow((3, 5)), slow((5, 9))
    torch.testing.assert_close(fine[:, ::2, ::2], coarse)
    assert coarse.shape == (16, 3, 5) and coarse.flatten(1).std(1).min() > 1e-3
    torch.testing.assert_close(coordinates((3, 1), coarse), torch.tensor([[-1.0, 0], [0, 0], [1, 0]]).double())
    c, h = coordinates((3, 5), coarse), None
    for number in range(3):
        sines = (c @ slow.frequency[number].mT + slow.phase[number]).sin()
        h = sines if h is None else (h @ slow.weight[number - 1].mT + slow.bias[number - 1]) * sines
    torch.testing.assert_close((h @ slow.out_weight.mT + slow.out_bias).mT.unflatten(1, (3, 5)), coarse)


def test_kernels_start_with_a_mean_square_of_one():
    torch.manual_seed(0)
    assert 0.7 < SlowNetwork(256, 32, 2)((7, 7)).square().mean().item() < 1.4


@pytest.mark.parametrize("sides", [(3, 3), (5, 6), (7, 1), (1, 1)], ids=str)
def test_the_transform_is_the_convolution(sides):
    z, kernel = maps(), torch.randn(2, 16, *sides, dtype=torch.float64)
    rows, columns = (side // 2 for side in sides)
    padded = F.pad(z, (sides[1] - 1 - columns, columns, sides[0] - 1 - rows, rows)).flatten(0, 1)[None]
    expected = F.conv2d(padded, kernel.flip((2, 3)).flatten(0, 1)[:, None], groups=32)[0].unflatten(0, (2, 16))
    torch.testing.assert_close(centred(z, kernel), expected)


@pytest.mark.parametrize("of_map", [True, False])
def test_the_context_is_in_the_kernel(mixer, of_map):
    """Twice the activations give four times the output: a plain convolution would give twice."""
    z = maps()
    torch.testing.assert_close(mixer.branch(2 * z, of_map), 4 * mixer.branch(z, of_map))
    kernel = mixer.of_map((5, 6)) if of_map else mixer.of_window((3, 3))
    context = z if of_map else F.adaptive_avg_pool2d(z, 3)
    torch.testing.assert_close(mixer.branch(z, of_map), centred(z, context * kernel))
    assert not torch.allclose(mixer.branch(z, of_map)[:1], centred(z[:1], context[1:] * kernel))


def test_every_token_reads_the_whole_map_in_one_layer(mixer):
    x = tokens().requires_grad_()
    for number in (0, 17, 29):
        (seen,) = torch.autograd.grad(mixer(x, GRID).x[0, number].sum(), x)
        assert (seen[0].abs().sum(-1) > 1e-9).all() and not seen[1].any()


def test_features_have_zero_mean(mixer):
    given = []
    mixer.bottleneck.register_forward_pre_hook(lambda _, args: given.append(args[0]))
    mixer(3 + tokens(), GRID)
    for branch in given[0].chunk(2, dim=-1):
        torch.testing.assert_close(branch.mean((1, 2)), torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-9)
        assert (branch.std((1, 2)) - 1).abs().max() < 0.02
    assert torch.equal(standardised(torch.zeros(1, 2, 1, 1)), torch.zeros(1, 2, 1, 1))


def test_the_weights_do_not_grow_with_the_map():
    large = HyperKernel(SITE._replace(grid=Grid(56, 56)))
    assert sum(p.numel() for p in large.parameters()) == sum(p.numel() for p in HyperKernel(SITE).parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel_size": 4}, r"hyper_kernel: kernel_size must be odd and positive, got 4; set attention.kernel_size"),
        ({"hidden": 0}, r"hyper_kernel: hidden must be a whole number of at least 1, got 0; set attention.hidden"),
        ({"layers": 1.5}, r"hyper_kernel: layers must be a whole number of at least 1, got 1.5; set attention.layers"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        HyperKernel(SITE, **options)
