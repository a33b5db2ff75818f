"""Compare a backbone with timm's model of the same architecture: same weights, same outputs, same gradients."""

import re
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from models.attention import Grid, Mixed, Mixer, Site

TOLERANCE = 1e-5  # of the largest value: the same fp32 sums in another order
Rules = list[tuple[str, str]]


@pytest.fixture
def assert_same() -> Callable[[nn.Module, nn.Module, Rules, tuple[int, int]], None]:
    """`assert_same(ours, theirs, rules, size)`: logits and all gradients agree; `rules` rename timm's weights."""
    return _assert_same


@pytest.fixture
def recorder() -> Callable[[Site], nn.Module]:
    """A factory of mixers that keep what they were built for in `recorder.sites`, and return a loss of their own."""
    sites: list[Site] = []
    factory = partial(_Recorded, sites)
    factory.sites = sites
    return factory


class _Recorded(Mixer):
    def __init__(self, sites: list[Site], site: Site) -> None:
        super().__init__(site)
        sites.append(site)
        self.proj = nn.Linear(site.dim, site.dim)

    def forward(self, x_BNC: Tensor, grid: Grid, gates_BNM: Tensor | None = None) -> Mixed:
        assert x_BNC.shape[1] == grid.tokens
        o = self.proj(x_BNC) + x_BNC.mean(1, keepdim=True)
        return Mixed(o, {"size": o.square().mean()})


def _assert_same(ours: nn.Module, theirs: nn.Module, rules: Rules, size: tuple[int, int]) -> None:
    _same_weights(ours.eval(), theirs.eval(), rules)
    images = [torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2)]
    outputs = [model(image) for model, image in zip((ours, theirs), images, strict=True)]
    _close("logits", *outputs)
    direction = torch.randn_like(outputs[0])
    for output in outputs:
        (output * direction).sum().backward()
    _close("gradient of the images", images[0].grad, images[1].grad)
    expected = _renamed({name: p.grad for name, p in theirs.named_parameters()}, rules)
    for name, parameter in ours.named_parameters():
        _close(f"gradient of {name}", parameter.grad, expected[name])


def _same_weights(ours: nn.Module, theirs: nn.Module, rules: Rules) -> None:
    """Both models get the same random weights, large enough that no branch vanishes beside its residual."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.ndim == 1:
                parameter.normal_(0.5, 0.1)
            else:
                parameter.normal_(0, 0.5 * parameter[0].numel() ** -0.5)
    ours.load_state_dict(_renamed(theirs.state_dict(), rules), strict=True)


def _renamed(state: dict[str, Tensor], rules: Rules) -> dict[str, Tensor]:
    """The same tensors under names to which each `(pattern, replacement)` has been applied in turn."""
    result = {}
    for name, tensor in state.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        result[name] = tensor
    return result


def _close(what: str, ours: Tensor, theirs: Tensor) -> None:
    error, largest = (ours - theirs).abs().max().item(), theirs.abs().max().item()
    assert error <= TOLERANCE * max(largest, 1e-3), f"{what}: differs by {error:.2e} of {largest:.2e}"
