"""Draws that follow from seed, layer and optimizer step alone, by integer arithmetic on the device.

They are the same in the forward pass and its recomputation, in all micro-batches of a step, in all processes, for all
images, and after a resume. The step is a buffer that `after_step` moves: a run of ours calls it after every optimizer
step (`models.callbacks.routing`); a training loop of your own has to.
"""

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

    def after_step(self) -> None:
        """The next draw, after an optimizer step."""
        self.step.add_(1)

    def drawn(self, count: int) -> Tensor:
        """Whole numbers (count,) of this step, of all sizes and signs."""
        name = (self.step * 1_000_003 + self.layer) * 1_000_003 + self.seed
        return _scrambled(_scrambled(name) + torch.arange(count, device=self.step.device))


def _scrambled(x: Tensor) -> Tensor:
    """Whole numbers without visible order, after SplitMix64, Steele et al., OOPSLA 2014."""
    x = x * -7046029254386353131
    x = (x ^ (x >> 30)) * -4658895280553007687
    x = (x ^ (x >> 27)) * -7723592293110705685
    return x ^ (x >> 31)
