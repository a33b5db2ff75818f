"""The projections of every mixer of a model, for what initialises or reparametrises them by name.

Shapes: C = channels, M = heads, D = channels per head.
"""

import warnings
from typing import NamedTuple

from torch import nn

from conf.errors import UserError
from models.attention import mixers_of


class Projections(NamedTuple):
    """One place with `qkv` (3·M·D rows) and `proj` (C rows), both of them Linear."""

    name: str  # of the module that has them
    qkv: nn.Linear
    proj: nn.Linear
    num_heads: int
    mixer: nn.Module  # that has them

    @property
    def inner(self) -> int:
        """M·D."""
        return self.qkv.out_features // 3


def projections(model: nn.Module, who: str, key: str) -> list[Projections]:
    """Those of every mixer, and of what a mixer wraps; the convolutions of a ConvNeXt are passed over, with a warning
    where there is nothing else.

    Args:
        model: a built model.
        who, key: for messages: who asks, and the key that chooses it.

    Raises:
        ValueError: a mixer has no such projections.
    """
    found, lacking = [], []
    for name, mixer in mixers_of(model):
        own = [_of(f"{name}.{path}".strip("."), module) for path, module in mixer.named_modules()]
        own = [place for place in own if place is not None]
        found += own
        if not own and (mixer.residual or mixer.site.kind != "convnet"):
            lacking.append(f"{name} ({type(mixer).__name__})")
    if lacking:
        more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        raise UserError(
            f"{who}: mixers must have one projection `qkv` to 3·M·D channels and `proj`, got {lacking[0]}{more}; "
            f"choose attention=softmax, or {key}=none"
        )
    if not found:
        text = "every mixer of the model is a convolution, so nothing was changed; choose attention=softmax"
        warnings.warn(f"{who}: {text}", UserWarning, stacklevel=3)
    return found


def _of(name: str, module: nn.Module) -> Projections | None:
    qkv, proj, heads = (getattr(module, key, None) for key in ("qkv", "proj", "num_heads"))
    if not (isinstance(qkv, nn.Linear) and isinstance(proj, nn.Linear) and isinstance(heads, int)):
        return None
    if (qkv.out_features, qkv.in_features) != (3 * proj.in_features, proj.out_features) or proj.in_features % heads:
        return None
    return Projections(name, qkv, proj, heads, module)
