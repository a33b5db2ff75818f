"""How the weights of a model are named in somebody else's files."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """One way to name the weights of a family of models.

    Attributes:
        source: whose names these are, for messages, e.g. "rayleizhu/BiFormer".
        rules: pairs (pattern, replacement) of `re.sub`, applied in turn to one of our names; the result is theirs.
        pointwise: pattern of those of our names whose Linear weights are 1×1 convolutions there; "" for none.
        warning: what a user should know who loads such a file, by model; a model that is not named has nothing to know.
    """

    source: str
    rules: tuple[tuple[str, str | Callable[[re.Match], str]], ...] = ()
    pointwise: str = ""
    warning: tuple[tuple[str, str], ...] = ()

    def theirs(self, name: str) -> str:
        """Their name for one of ours."""
        for pattern, replacement in self.rules:
            name = re.sub(pattern, replacement, name)
        return name

    def take(self, value: Tensor) -> Tensor:
        """Their value as ours."""
        return value.flatten(1) if self.pointwise and value.shape[2:] == (1, 1) else value

    def give(self, name: str, value: Tensor) -> Tensor:
        """Our value as theirs."""
        convolution = self.pointwise and value.dim() == 2 and re.search(self.pointwise, name)
        return value[..., None, None] if convolution else value


OURS = Layout("this project")
