"""LoRA: beside every weight a product of two thin matrices is trained, which starts at zero.

W' = W + α / r · B A with A (r, I), B (O, r); r components of the product are dropped out together in training.

Source: LoRA: Low-Rank Adaptation of Large Language Models, Hu et al., ICLR 2022, arXiv:2106.09685, section 4.1.
The authors drop channels of the input of a layer; here a weight is a function of parameters wherever it is read, fused
kernels included, so that dropout is of the components of the product. Convolutions are flattened to (out, in·k·k).
Shapes: O I = rows and columns of a flattened weight, R = rank.
"""

import math
from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from conf import values
from conf.errors import UserError

WHO = "lora"
ANSWER = ("pooling", "head")


def lora(
    model: nn.Module,
    *,
    rank: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
    targets: Sequence[str] | None = None,
    also: Sequence[str] = (),
) -> None:
    """Freezes a built model and adapts its linear layers.

    Args:
        model: with the weights that stay; pool and head are trained as they are.
        rank: R, at most the smaller side of a weight.
        alpha: the product is scaled by α / R.
        dropout: share of the R components that a forward pass of training leaves out.
        targets: ends of the names of linear layers and convolutions, e.g. [attn.qkv, attn.proj]; None for every linear
            layer but those of pool and head.
        also: names or globs of parameters that are trained as they are, e.g. ["*norm*"].

    Raises:
        ValueError: no layer or parameter has such a name, or an option is out of range.
    """
    values.whole(WHO, "rank", rank, 1, fix="set adapter.rank, e.g. 8")
    values.number(WHO, "alpha", alpha, 1e-6, fix="set adapter.alpha, e.g. 16")
    values.fraction(WHO, "dropout", dropout, what="a share from 0, below 1", fix="set adapter.dropout, e.g. 0.1")
    if dropout == 1:
        values.refuse(WHO, "dropout", "a share from 0, below 1", dropout, "set adapter.dropout, e.g. 0.1")
    answer = tuple(f"{name}." for name in getattr(model, "answer", ANSWER))
    places = _places(model, _names("targets", targets), answer)
    trained = _also(model, _names("also", also))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and (name.startswith(answer) or name in trained))
    for module in places:
        parametrize.register_parametrization(module, "weight", LowRank(module.weight, rank, alpha, dropout))


class LowRank(nn.Module):
    """W → W + α / R · B A."""

    def __init__(self, weight: Tensor, rank: int, alpha: float, dropout: float) -> None:
        super().__init__()
        rows, columns = weight.flatten(1).shape
        self.scale, self.dropout = alpha / rank, dropout
        self.down = nn.Parameter(weight.new_empty(min(rank, rows, columns), columns))
        self.up = nn.Parameter(weight.new_zeros(rows, min(rank, rows, columns)))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self._product().view_as(weight)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """What stays of a weight that is to be what it is with the product."""
        return weight.detach() - self._product().detach().view_as(weight)

    def _product(self) -> Tensor:
        kept_R = F.dropout(self.up.new_full((self.up.shape[1],), self.scale), self.dropout, self.training)
        return (self.up * kept_R) @ self.down


def _places(model: nn.Module, targets: list[str] | None, answer: tuple[str, ...]) -> list[nn.Module]:
    ends = None if targets is None else tuple(f".{target}" for target in targets)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    if ends is None:
        found = [m for name, m in layers.items() if isinstance(m, nn.Linear) and not f"{name}.".startswith(answer)]
    else:
        unknown = [end for end in ends if not any(f".{name}".endswith(end) for name in layers)]
        found = [] if unknown else [m for name, m in layers.items() if f".{name}".endswith(ends)]
    if not found:
        own = dict.fromkeys(name.rpartition(".")[2] for name in layers if not f"{name}.".startswith(answer))
        wanted = "any linear layer" if targets is None else ", ".join(end[1:] for end in unknown)
        raise UserError(
            f"lora: targets must be ends of names of linear layers or convolutions, got {wanted}, of which there is "
            f"none; set adapter.targets, of {', '.join(own)}"
        )
    return found


def _also(model: nn.Module, names: list[str]) -> set[str]:
    own = [name for name, _ in model.named_parameters()]
    for name in names:
        if not any(fnmatchcase(other, name) for other in own):
            raise UserError(
                f"lora: also must be names or globs of parameters, got {name!r}, which none has; "
                'set adapter.also=["*norm*"], for instance'
            )
    return {other for other in own for name in names if fnmatchcase(other, name)}


def _names(key: str, names: Sequence[str] | None) -> list[str] | None:
    if names is None and key == "targets":
        return None
    if isinstance(names, str) or not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise UserError(f"lora: {key} must be a list of names, got {names!r}; set adapter.{key}=[attn.qkv]")
    return list(names)
