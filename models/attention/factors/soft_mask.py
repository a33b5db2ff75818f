"""Soft causal mask: weights on tokens that come later in raster order are multiplied by ρ.

Source: Adapting LLaMA Decoder to Vision Transformer, Wang et al., 2024, arXiv:2404.06773, section 3.5:
softmax(q kᵀ / √D) ∘ (ρ + (1 − ρ) tril).
Shapes: M = heads, N = queries, S = keys.
As in the authors' code the mask multiplies the softmax and nothing is divided again: later tokens stay in its sum, and
rows sum to less than one. There ρ falls from 1 to 0 in the first epochs, as it does here with `callbacks=soft_mask`;
without that it is one number. Class tokens see, and are seen by, all, or they come after the map, as there.
"""

from typing import Any

import torch
from torch import Tensor

from conf import values
from models.attention.contract import Grid, Site
from models.attention.contract.places import OfOffset

PREFIX = ("open", "last")


def soft_mask(site: Site, *, rho: float = 0.0, prefix: str = "open") -> "SoftMask":
    """A factor of 1 on the tokens up to the query, and of ρ on later ones.

    Args:
        site: the place in the backbone.
        rho: ρ from 0, a causal mask, to 1, none.
        prefix: "open", class tokens are in no order; "last", they come after the map, although they stand in front.

    Raises:
        ValueError: ρ is no such number, or no such place of class tokens.
    """
    values.choice("soft_mask", "prefix", prefix, PREFIX, fix="set attention.factor.prefix")
    rho = values.fraction("soft_mask", "rho", rho, fix="set attention.factor.rho")
    return SoftMask(site.num_heads, rho, prefix == "last")


class SoftMask(OfOffset):
    """It has no parameters; the same for all heads. ρ is in no file: `last_rho` is what it has, or comes to have."""

    neutral = 1.0

    def __init__(self, num_heads: int, rho: float, last: bool) -> None:
        super().__init__()
        self.num_heads, self.last_rho, self.last = num_heads, rho, last
        self.register_buffer("rho", torch.tensor(float(rho)), persistent=False)

    def _load_from_state_dict(self, *args: Any) -> None:
        """With weights comes the last ρ, to a model that was made without memory too."""
        super()._load_from_state_dict(*args)
        if self.rho.is_meta:
            self.rho = torch.empty_like(self.rho, device="cpu")
        self.rho.fill_(self.last_rho)

    def at(self, offsets: Tensor) -> Tensor:
        """(M, …); see `OfOffset`."""
        rows, columns = offsets.unbind(-1)
        earlier = (rows > 0) | ((rows == 0) & (columns >= 0))
        return torch.where(earlier, 1.0, self.rho).expand(self.num_heads, *earlier.shape)

    def on(self, grid: Grid, kv_grid: Grid, device: torch.device | None) -> Tensor:
        """(M, N, S); see `OfOffset`. As keys, class tokens that come last are later than all before them."""
        table_MNS = super().on(grid, kv_grid, device)
        if not (self.last and kv_grid.prefix):
            return table_MNS
        earlier = torch.ones(grid.prefix, kv_grid.prefix, dtype=torch.bool, device=device).tril()
        earlier = torch.cat([earlier, earlier.new_zeros(grid.cells, kv_grid.prefix)])
        of_prefix = torch.where(earlier, 1.0, self.rho).expand(self.num_heads, -1, -1)
        return torch.cat([of_prefix, table_MNS[..., kv_grid.prefix :]], dim=-1)
