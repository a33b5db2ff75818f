"""A gate that mixing tokens makes: a linear layer of each token, times what an MLP-Mixer block makes of all of them.

Source: NiNformer: A Network in Network Transformer with Token Mixing Generated Gating Function, Abdullah & Aydin, 2024,
arXiv:2403.02411, and the authors' code, github.com/Abdullah-88/NiNformer:
    y = (W x) ∘ (u + mlp(norm(u))),  u = x + mlp over tokens(norm(x)).
The MLP over tokens has a weight for each of them. The authors' code has one number of tokens; on another map weights
are resized bilinearly along the grid, and those that read tokens are scaled so that they sum to the same. The dropout
of the code's MLPs is left out.
Shapes: B = batch, N = prefix + H·W tokens, C = channels, M = heads, F = features of the MLP over tokens.
"""

from functools import partial

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn

from models.attention import Grid, Mixed, Mixer, Site
from models.attention.contract.heads import gated_heads, head_channels
from models.attention.contract.options import check_whole
from models.layers.resizable import Resizable
from models.layers.tokens import square_side


class NiNGate(Mixer):
    """(B, N, C) → (B, N, C). Gates (B, N, M) weight the channels of each head.

    Args:
        site: the place in the backbone.
        token_hidden: features of the MLP over tokens; None for twice the channels.
        channel_hidden: hidden channels of the MLP behind it; None for twice the channels.
        backend: "auto" or "torch"; there is no kernel.
    """

    without_matrix = "what a token gives another goes through an MLP over tokens, which is not linear in them"

    def __init__(
        self,
        site: Site,
        *,
        token_hidden: int | None = None,
        channel_hidden: int | None = None,
        backend: str = "auto",
    ) -> None:
        tokens, channels = (2 * site.dim if given is None else given for given in (token_hidden, channel_hidden))
        check_whole("nin_gate", token_hidden=tokens, channel_hidden=channels)
        super().__init__(site, backend)
        head_channels(site, even=True)
        self.token_norm, self.token_mlp = nn.LayerNorm(site.dim), TokenMlp(site.grid, tokens)
        self.channel_norm, self.channel_mlp = nn.LayerNorm(site.dim), Mlp(site.dim, channels)
        self.linear = nn.Linear(site.dim, site.dim)

    def forward(self, x_BNC: Tensor, grid: Grid, gates_BNM: Tensor | None = None) -> Mixed:
        u_BNC = x_BNC + self.token_mlp(self.token_norm(x_BNC), grid)
        u_BNC = u_BNC + self.channel_mlp(self.channel_norm(u_BNC))
        return Mixed(gated_heads(self.linear(x_BNC) * u_BNC, gates_BNM), {})


class TokenMlp(nn.Module):
    """An MLP along the tokens of every channel: `(x_BNC, grid) -> x_BNC`."""

    def __init__(self, grid: Grid, hidden: int) -> None:
        super().__init__()
        self.fc1, self.act = TokenLinear(grid, hidden, reads=True), nn.GELU()
        self.fc2 = TokenLinear(grid, hidden, reads=False)

    def forward(self, x_BNC: Tensor, grid: Grid) -> Tensor:
        return self.fc2(self.act(self.fc1(x_BNC.mT, grid)), grid).mT


class TokenLinear(Resizable, nn.Linear):
    """A linear layer from the tokens of a map to features, or back; called as `(x, grid)`, for any map.

    Args:
        grid: the map that its weights are made for.
        features: F.
        reads: from tokens, weights (F, N); otherwise to tokens, (N, F), with a bias of each.
    """

    def __init__(self, grid: Grid, features: int, reads: bool) -> None:
        super().__init__(*((grid.tokens, features) if reads else (features, grid.tokens)))
        self.grid, self.reads = grid, reads

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        if grid == self.grid:
            return super().forward(x)
        fit = partial(self._fitted, grid=self.grid, new=grid)
        return F.linear(x, fit("weight", self.weight), fit("bias", self.bias))

    def resized(self, name: str, value: Tensor) -> Tensor:
        """Weights for another square map as those of this module.

        Raises:
            ValueError: the other map is no square.
        """
        tokens = value.shape[int(self.reads)] if name == "weight" else len(value)
        if self.reads and name == "bias":
            return value
        side = square_side(tokens - self.grid.prefix, "tokens")
        return self._fitted(name, value, Grid(side, side, self.grid.prefix), self.grid)

    def _fitted(self, name: str, value: Tensor, grid: Grid, new: Grid) -> Tensor:
        """Weights or bias for the map `new`, of those for `grid`."""
        if self.reads:
            return value if name == "bias" else _along(value, grid, new, new.cells / grid.cells)
        return _along(value[None], grid, new)[0] if name == "bias" else _along(value.mT, grid, new).mT


def _along(table_FN: Tensor, grid: Grid, new: Grid, over: float = 1.0) -> Tensor:
    """Numbers for the tokens of a map as those for another one, over `over`; prefix tokens keep theirs."""
    prefix_FP, map_FN = table_FN[:, : grid.prefix], table_FN[:, grid.prefix :]
    maps_1FHW = map_FN.unflatten(1, grid[:2])[None]
    resized = F.interpolate(maps_1FHW, size=new[:2], mode="bilinear", antialias=True)[0].flatten(1)
    return torch.cat([prefix_FP, resized / over], dim=1)
