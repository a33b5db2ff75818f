"""Random keys: in training every layer sees a random part of the keys, in evaluation all of them.

Source: The Information Pathways Hypothesis: Transformers are Dynamic Self-Ensembles, Hussain et al., KDD 2023,
arXiv:2306.01705 (stochastically subsampled attention).
Shapes: B = batch, M = heads, N = queries, S = keys, D = channels per head.
No code is public. Which keys are kept follows from seed, optimizer step and layer alone, by integer arithmetic on the
device: the same in the forward pass and its recomputation, in all micro-batches of a step, in all processes, for all
images and heads, and after a resume. Prefix tokens are always kept.
The step is a buffer that `after_step` moves: a run of ours calls it after every optimizer step
(`models.callbacks.routing`); a training loop of your own has to.
"""

import math

import torch
from torch import Tensor, nn

from conf import values
from models.attention.contract import Grid, Site

WHO = "random_keys"


def random_keys(site: Site, *, keep: float = 0.5, seed: int = 0) -> "RandomKeys":
    """A random part of the keys.

    Args:
        site: the place in the backbone; stage and block name the layer.
        keep: the share of keys that a step sees, above 0; 1 is all.
        seed: names the draws.

    Raises:
        ValueError: a share that is none, or a seed that is no whole number.
    """
    what, fix = "a share above 0, up to 1", "set attention.transform.keep, e.g. 0.5"
    if values.fraction(WHO, "keep", keep, what=what, fix=fix) == 0:
        values.refuse(WHO, "keep", what, keep, fix)
    values.whole(WHO, "seed", seed, 0, fix="set attention.transform.seed")
    return RandomKeys(keep, seed, 1000 * site.stage + site.block)


class RandomKeys(nn.Module):
    """Keys and values of the kept tokens, in their order."""

    drops_keys = True

    def __init__(self, keep: float, seed: int, layer: int) -> None:
        super().__init__()
        self.keep, self.seed, self.layer = keep, seed, layer
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def after_step(self) -> None:
        """The next draw, after an optimizer step."""
        self.step.add_(1)

    def forward(
        self, q_BMND: Tensor, k_BMSD: Tensor, v_BMSD: Tensor, grid: Grid, kv_grid: Grid
    ) -> tuple[Tensor, Tensor, Tensor]:
        if not self.training or self.keep == 1:
            return q_BMND, k_BMSD, v_BMSD
        kept = self.kept(kv_grid)
        return q_BMND, k_BMSD.index_select(2, kept), v_BMSD.index_select(2, kept)

    def kept(self, kv_grid: Grid) -> Tensor:
        """Numbers of the keys that this step sees, ascending."""
        name = (self.step * 1_000_003 + self.layer) * 1_000_003 + self.seed
        cells = torch.arange(kv_grid.cells, device=self.step.device)
        order = _scrambled(_scrambled(name) + cells).argsort(stable=True)
        kept = order[: math.ceil(self.keep * kv_grid.cells)].sort().values + kv_grid.prefix
        return torch.cat([torch.arange(kv_grid.prefix, device=kept.device), kept])


def _scrambled(x: Tensor) -> Tensor:
    """Whole numbers without visible order, after SplitMix64, Steele et al., OOPSLA 2014."""
    x = x * -7046029254386353131
    x = (x ^ (x >> 30)) * -4658895280553007687
    x = (x ^ (x >> 27)) * -7723592293110705685
    return x ^ (x >> 31)
