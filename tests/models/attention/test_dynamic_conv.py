"""Lightweight and dynamic convolutions: their weights sum to one, are shared by a head, and are those of a place."""

import pytest
import torch

from models.attention import Grid, Site
from models.attention.dynamic_conv import DynamicConv, DynamicKernel, LightConv, LightKernel

GRID = Grid(4, 6)
SITE = Site(16, 4, GRID, 0, 0, 1, "hierarchical")
KERNELS = pytest.mark.parametrize("kind", [LightKernel, DynamicKernel])


def made(kind: type, kernel: tuple[int, int] = (3, 5), renorm: bool = True) -> torch.nn.Module:
    torch.manual_seed(0)
    return kind(16, 4, kernel, renorm).double()


def tokens() -> torch.Tensor:
    return torch.randn(2, GRID.tokens, 16, dtype=torch.float64)


@KERNELS
def test_weights_sum_to_one_up_to_the_border(kind):
    """Tokens that are all alike stay as they are; without `renorm` they fade at the border alone."""
    x = tokens()[:, :1].expand(-1, GRID.tokens, -1)
    torch.testing.assert_close(made(kind)(x, GRID), x)
    share = (made(kind, renorm=False)(x, GRID) / x).unflatten(1, GRID[:2])
    torch.testing.assert_close(share[:, 1:-1, 2:-2], torch.ones_like(share[:, 1:-1, 2:-2]))
    assert (share[:, 0] < 0.999).all() and (share[:, :, 1] < 0.999).all()


@KERNELS
def test_it_is_the_sum_over_the_neighbours(kind):
    conv, x = made(kind), tokens()
    logits = conv.weight.expand(2, 24, 4, 15) if kind is LightKernel else conv.weight_linear(x).unflatten(-1, (4, 15))
    y, expected = conv(x, GRID), torch.zeros_like(x)
    for token in range(GRID.tokens):
        row, column = divmod(token, 6)
        places = [(i, j) for i in range(3) for j in range(5) if 0 <= row + i - 1 < 4 and 0 <= column + j - 2 < 6]
        at = [6 * (row + i - 1) + column + j - 2 for i, j in places]
        weights = logits[:, token][..., [5 * i + j for i, j in places]].softmax(-1)
        expected[:, token] = torch.einsum("bmk,bkmd->bmd", weights, x[:, at].unflatten(-1, (4, 4))).flatten(1)
    torch.testing.assert_close(y, expected)


def test_only_the_token_itself_decides_its_dynamic_kernel():
    x, other = tokens(), tokens()
    other[:, 9] = x[:, 9]
    conv = made(DynamicKernel)
    sent = []
    for before in (x, other):
        given = before.clone().requires_grad_()
        (grad,) = torch.autograd.grad(conv(given, GRID)[:, 9].sum(), given)
        sent.append(grad[:, [2, 3, 10]])  # neighbours of 9 are read by weights alone
    torch.testing.assert_close(*sent)


def test_dynamic_kernels_are_light_ones_where_nothing_is_predicted():
    light, dynamic = (kind(SITE, kernel_size=3).double() for kind in (LightConv, DynamicConv))
    torch.nn.init.zeros_(light.conv.weight)
    state = {key: value for key, value in light.state_dict().items() if key != "conv.weight"}
    dynamic.load_state_dict(state | {"conv.weight_linear.weight": torch.zeros(36, 16)})
    x = tokens()
    torch.testing.assert_close(dynamic(x, GRID).x, light(x, GRID).x)


@pytest.mark.parametrize(("kind", "who"), [(LightConv, "light_conv"), (DynamicConv, "dynamic_conv")])
def test_an_even_kernel_is_refused(kind, who):
    with pytest.raises(ValueError, match=rf"{who}: kernel_size must be odd and positive, got 4; set attention.kern"):
        kind(SITE, kernel_size=4)
