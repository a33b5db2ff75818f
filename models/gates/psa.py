"""Polarized self-attention: channels weighted by an attended token, places by an attended channel.

Source: Polarized Self-Attention, Liu et al., 2021, arXiv:2107.00782; and the authors' code,
github.com/DeLightCMU/PSA, `PSA_p` and `PSA_s`. The paper has the softmax of the weights of places on the pooled query,
over its C / 2 channels. The code of `PSA_p` takes it over the H·W products of query and values instead, that of `PSA_s`
over the H·W places of the values: on a map of 14×14 all weights then lie between 0.493 and 0.512, so that half of the
block is a factor of one half. `spatial="released"` follows the code.
Prefix tokens pass.
Shapes: B = batch, N = prefix + H·W tokens, T = H·W, C = channels.
"""

from torch import Tensor, nn

from conf import values
from models.attention.contract import Grid, Refused, Site
from models.gates import behind_prefix
from models.layers.gated import Gate, Gated

SPATIAL = ("paper", "released")


class PolarizedParallel(Gate):
    """`psa_p`: x ⊙ channels(x) + x ⊙ places(x).

    Args:
        site: the place in the backbone.
        spatial: "paper" or "released", see above.
    """

    ignores_grid = True
    narrowest = 2  # channels, that the halves are not empty

    def __init__(self, site: Site, spatial: str = "paper") -> None:
        super().__init__(site)
        self.spatial, dim = values.choice("psa", "spatial", spatial, SPATIAL, fix="set gate.spatial"), site.dim
        if dim < self.narrowest or dim % 2:
            raise Refused(f"psa: the channels must be even, at least {self.narrowest}, got {dim}", "set gate=eca")
        self.channel_query, self.channel_value = nn.Linear(dim, 1, bias=False), nn.Linear(dim, dim // 2, bias=False)
        self.channel_up = self.expansion(dim)
        self.place_query, self.place_value = (nn.Linear(dim, dim // 2, bias=False) for _ in range(2))

    def expansion(self, dim: int) -> nn.Module:
        """From the C / 2 channels of the attended token to all."""
        return nn.Linear(dim // 2, dim, bias=False)

    def forward(self, x_BNC: Tensor, grid: Grid) -> Gated:
        x_BTC = x_BNC[:, grid.prefix :]
        return Gated(behind_prefix(x_BNC, x_BTC * self.channels(x_BTC) + x_BTC * self.places(x_BTC), grid), {})

    def channels(self, x_BTC: Tensor) -> Tensor:
        """(B, 1, C) in (0, 1): from the token that a query, the same for all images, attends to."""
        attended = self.channel_query(x_BTC).softmax(1).mT @ self.channel_value(x_BTC)
        return self.channel_up(attended).sigmoid()

    def places(self, x_BTC: Tensor) -> Tensor:
        """(B, T, 1) in (0, 1): from the channels of the values that the mean query attends to."""
        query, value = self.place_query(x_BTC).mean(1, keepdim=True).mT, self.place_value(x_BTC)
        if self.spatial == "paper":
            return (value @ query.softmax(1)).sigmoid()
        return self.released(query, value).sigmoid()

    def released(self, query: Tensor, value: Tensor) -> Tensor:
        """(B, T, 1), before the sigmoid, as the authors' code has it."""
        return (value @ query).softmax(1)


class PolarizedSequential(PolarizedParallel):
    """`psa_s`: y = x ⊙ channels(x), then y ⊙ places(y); the attended token goes through an MLP with C / 8 channels."""

    narrowest = 8

    def expansion(self, dim: int) -> nn.Module:
        """From the C / 2 channels of the attended token to C / 8, then to all."""
        return nn.Sequential(nn.Linear(dim // 2, dim // 8), nn.LayerNorm(dim // 8), nn.ReLU(), nn.Linear(dim // 8, dim))

    def forward(self, x_BNC: Tensor, grid: Grid) -> Gated:
        x_BTC = x_BNC[:, grid.prefix :]
        y_BTC = x_BTC * self.channels(x_BTC)
        return Gated(behind_prefix(x_BNC, y_BTC * self.places(y_BTC), grid), {})

    def released(self, query: Tensor, value: Tensor) -> Tensor:
        """(B, T, 1), before the sigmoid, as the authors' code has it."""
        return value.softmax(1) @ query
