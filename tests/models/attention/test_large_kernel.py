"""Large kernel attention: how far a token sees, that it is a product of two, its modules by the authors, refusals."""

import parity
import pytest
import reference
import torch
from torch import Tensor

from models.attention import Grid, Refused, Site, check
from models.attention.large_kernel import LargeKernelAttention
from models.checkpoints.names.van import LAYOUTS

GRID = Grid(27, 25)
SITE = Site(8, 2, GRID, 0, 0, 1, "hierarchical")
OURS, THEIRS = "stages.0.blocks.0.attn.", "block1.0.attn."


def cases(constructor: str) -> list[str]:
    return [n for n in reference.cases("module") if reference.info(n).get("official_constructor") == constructor]


def make(site: Site = SITE, **options) -> LargeKernelAttention:
    torch.manual_seed(0)
    return LargeKernelAttention(site, **options).double()


def tokens(grid: Grid = GRID) -> Tensor:
    return torch.randn(2, grid.tokens, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def of_case(name: str) -> LargeKernelAttention:
    _, dim, height, width = reference.info(name)["input_shape"]
    return LargeKernelAttention(Site(dim, 2, Grid(height, width), 0, 0, 1, "hierarchical"))


def on_map(x: Tensor, call) -> Tensor:
    return call(x.flatten(2).mT, Grid(*x.shape[2:])).mT.unflatten(2, x.shape[2:])


@pytest.mark.parametrize("name", cases("van.LKA"))
def test_the_product_equals_the_authors(name):
    module = of_case(name)
    del module.proj_in, module.proj
    convert = parity.through(LAYOUTS[0], module, OURS, f"{THEIRS}spatial_gating_unit.")
    parity.check(name, module, convert, lambda m, x: on_map(x, m.weighted))


@pytest.mark.parametrize("name", cases("van.Attention"))
def test_the_whole_equals_the_authors(name):
    module = of_case(name)
    convert = parity.through(LAYOUTS[0], module, OURS, THEIRS)
    parity.check(name, module, convert, lambda m, x: on_map(x, lambda *given: m(*given).x))


def test_the_cases_are_found():
    assert len(cases("van.LKA")) >= 2 and len(cases("van.Attention")) >= 1


@pytest.mark.parametrize(
    ("options", "side"),
    [({}, 23), ({"dw_kernel": 3, "dilation": 2}, 15), ({"dilated_kernel": 3, "dilation": 5}, 15)],
)
def test_a_token_sees_exactly_its_square(options, side):
    x = tokens().requires_grad_()
    (found,) = torch.autograd.grad(make(**options)(x, GRID).x[0, GRID.tokens // 2].sum(), x)
    near = torch.zeros(GRID.height, GRID.width, dtype=torch.bool)
    rows, columns = (slice(n // 2 - side // 2, n // 2 + side // 2 + 1) for n in GRID[:2])
    near[rows, columns] = True
    assert torch.equal(found[0].abs().sum(-1).view(GRID.height, GRID.width) > 0, near)
    assert not found[1].any()


def test_without_biases_twice_the_tokens_are_four_times_the_product():
    mixer, u = make(), tokens()
    torch.nn.init.zeros_(mixer.mix.bias)
    torch.testing.assert_close(mixer.weighted(2 * u, GRID), 4 * mixer.weighted(u, GRID))
    with torch.no_grad():
        mixer.mix.bias.add_(1)
    assert not torch.allclose(mixer.weighted(2 * u, GRID), 4 * mixer.weighted(u, GRID))


def test_the_inner_shortcut_adds_what_went_in():
    x, without = tokens(), make(inner_shortcut=False)
    torch.testing.assert_close(make()(x, GRID).x, without(x, GRID).x + x)


def test_there_is_no_kernel_with_a_dilation():
    assert not make().runs().fused
    with pytest.raises(Refused, match=r"conv2d has no Triton kernel: the kernel of depth-wise .* no dilation; set att"):
        check(make(backend="triton"), SITE)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dw_kernel": 4}, r"large_kernel: dw_kernel must be odd and positive, got 4; set attention.dw_kernel to 3"),
        ({"dilated_kernel": 6}, r"large_kernel: dilated_kernel must be odd and positive, got 6; set attention.dilated"),
        ({"dilation": 0}, r"large_kernel: dilation must be a whole number of at least 1, got 0; set attention.dil"),
        ({"inner_shortcut": 1}, r"large_kernel: inner_shortcut must be true or false, got 1; set attention.inner_sho"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)
