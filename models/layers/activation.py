"""What stands between the two linear layers of an MLP, by name, and the gated MLP that needs no name of its own.

Source: `relu2`: Primer, So et al., NeurIPS 2021, arXiv:2109.08668, section 4.1; `topk`: The Lazy Neuron Phenomenon, Li
et al., ICLR 2023, arXiv:2210.06313, section 4; `swiglu` and `geglu`: GLU Variants Improve Transformer, Shazeer,
2020, arXiv:2002.05202, equation 6.
Shapes: any, channels last.
"""

from collections.abc import Mapping
from typing import Any

import torch
from timm.layers import GluMlp, SwiGLU
from torch import Tensor, nn

from conf.errors import UserError

GATED = "swiglu"


class SquaredReLU(nn.Module):
    """relu(x)²."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x).square()


class TopK(nn.Module):
    """The k largest channels of relu(x) of each token; the others are 0, and have no gradient.

    Args:
        k: how many channels stay.
    """

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = k

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(x)
        kept, channels = x.topk(self.k, dim=-1)
        return torch.zeros_like(x).scatter(-1, channels, kept)

    def extra_repr(self) -> str:
        return f"k={self.k}"


ACTIVATIONS = {"gelu": nn.GELU, "relu": nn.ReLU, "relu2": SquaredReLU, "silu": nn.SiLU, "topk": TopK}


def named(who: str, setting: Any) -> tuple[str, dict[str, Any]]:
    """The name and the options of what `model.activation` asks for: a name, or {name: topk, k: 32}.

    Raises:
        ValueError: an unknown name, or options that it has not.
    """
    options = {"name": setting} if isinstance(setting, str) else dict(setting) if isinstance(setting, Mapping) else {}
    name, known = options.pop("name", setting), [*ACTIVATIONS, GATED]
    if not isinstance(name, str) or name not in known:
        raise UserError(
            f"{who}: activation must be one of {', '.join(known)}, got {name!r}; set model.activation, "
            "topk with k also as {name: topk, k: 32}"
        )
    if extra := sorted(set(options) - ({"k"} if name == "topk" else set())):
        raise UserError(f"{who}: activation {name} has no option {extra[0]!r}, got {setting}; leave it out")
    return name, options


def made(who: str, setting: Any, hidden: int) -> nn.Module:
    """What `model.activation` asks for, on `hidden` channels; `topk` keeps an eighth of them where no k is given.

    Raises:
        ValueError: an unknown name or option, or a k that is no number of the hidden channels.
    """
    name, options = named(who, setting)
    if name != "topk":
        return ACTIVATIONS[name]()
    k = options.get("k", max(hidden // 8, 1))
    if not isinstance(k, int) or isinstance(k, bool) or not 1 <= k <= hidden:
        raise UserError(
            f"{who}: activation topk keeps k of the {hidden} hidden channels, got k={k!r}; "
            f"set model.activation={{name: topk, k: {max(hidden // 8, 1)}}}"
        )
    return TopK(k)


def swiglu(dim: int, hidden: int, *, multiple: int = 1, bias: bool = True) -> SwiGLU:
    """W₂ (silu(W x) ⊙ V x) in place of an MLP: two thirds of its hidden channels, so about its parameters.

    Args:
        dim, hidden: channels outside and inside of the MLP.
        multiple: the hidden channels are rounded up to whole multiples of it.
        bias: whether its three layers have one.
    """
    mlp = SwiGLU(dim, -(-(2 * hidden // 3) // multiple) * multiple, bias=bias)
    for layer in (mlp.fc1_g, mlp.fc1_x, mlp.fc2):
        nn.init.trunc_normal_(layer.weight, std=0.02)
        if bias:
            nn.init.zeros_(layer.bias)
    return mlp


def geglu(dim: int, hidden: int) -> GluMlp:
    """W₂ (V x ⊙ gelu(W x)) in place of an MLP with as many hidden channels, and half as many weights more."""
    return GluMlp(dim, 2 * hidden, act_layer=nn.GELU, gate_last=True)
