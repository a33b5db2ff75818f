"""Draws that follow from seed, layer and optimizer step alone, by integer arithmetic on the device.

They are the same in the forward pass and its recomputation, in all micro-batches of a step, in all processes, for all
images, and after a resume. The step is a buffer that `after_step` moves: a run of ours calls it after every optimizer
step (`models.callbacks.routing`); a training loop of your own has to.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from models.attention.contract import Site


class Drawn(nn.Module):
    """A module that draws.

    Args:
        seed: names the draws.
        site: the place in the backbone; stage and block name the layer.
    """

    def __init__(self, seed: int, site: Site) -> None:
        super().__init__()
        self.seed, self.layer = seed, 1000 * site.stage + site.block
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        """Weights that were trained without draws load too: the step stays."""
        state_dict.setdefault(f"{prefix}step", self.step)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def after_step(self) -> None:
        """The next draw, after an optimizer step."""
        self.step.add_(1)

    def drawn(self, count: int) -> Tensor:
        """Whole numbers (count,) of this step, of all sizes and signs."""
        return self._numbers(self.step, count)

    def normal(self, count: int) -> Tensor:
        """Numbers (count,) of a normal distribution, which are those of every step."""
        before = self.step.clamp_max(-1)  # no constant, whose products a compiler would work out without wrapping
        whole = self._numbers(before, 2 * count) & (2**22 - 1)
        length, angle = ((whole.float() + 0.5) / 2**22).chunk(2)
        return (-2 * length.log()).sqrt() * (2 * math.pi * angle).cos()

    def _numbers(self, step: Tensor, count: int) -> Tensor:
        name = (step * 1_000_003 + self.layer) * 1_000_003 + self.seed
        return _scrambled(_scrambled(name) + torch.arange(count, device=step.device))


def _scrambled(x: Tensor) -> Tensor:
    """Whole numbers without visible order, after SplitMix64, Steele et al., OOPSLA 2014."""
    x = x * -7046029254386353131
    x = (x ^ (x >> 30)) * -4658895280553007687
    x = (x ^ (x >> 27)) * -7723592293110705685
    return x ^ (x >> 31)
