"""Random keys: in training every layer sees a random part of the keys, in evaluation all of them.

Source: The Information Pathways Hypothesis: Transformers are Dynamic Self-Ensembles, Hussain et al., KDD 2023,
arXiv:2306.01705 (stochastically subsampled attention).
Shapes: B = batch, M = heads, N = queries, S = keys, D = channels per head.
No code is public. Which keys are kept follows from seed, optimizer step and layer (`models.attention.drawn`), for all
images and heads. Prefix tokens are always kept.
"""

import math

import torch
from torch import Tensor

from conf import values
from models.attention.contract import Grid, Site
from models.attention.drawn import Drawn

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
    return RandomKeys(keep, seed, site)


class RandomKeys(Drawn):
    """Keys and values of the kept tokens, in their order."""

    drops_keys = True

    def __init__(self, keep: float, seed: int, site: Site) -> None:
        super().__init__(seed, site)
        self.keep = keep

    def forward(
        self, q_BMND: Tensor, k_BMSD: Tensor, v_BMSD: Tensor, grid: Grid, kv_grid: Grid
    ) -> tuple[Tensor, Tensor, Tensor]:
        if not self.training or self.keep == 1:
            return q_BMND, k_BMSD, v_BMSD
        kept = self.kept(kv_grid)
        return q_BMND, k_BMSD.index_select(2, kept), v_BMSD.index_select(2, kept)

    def kept(self, kv_grid: Grid) -> Tensor:
        """Numbers of the keys that this step sees, ascending."""
        order = self.drawn(kv_grid.cells).argsort(stable=True)
        kept = order[: math.ceil(self.keep * kv_grid.cells)].sort().values + kv_grid.prefix
        return torch.cat([torch.arange(kv_grid.prefix, device=kept.device), kept])
