"""SimPool: the mean of the map asks once for the tokens that matter, and gets a weighted, generalised mean of them.

q = W_q mean(X), K = W_k LN(X), V = LN(X); a = softmax(q Kᵀ / √D); u = a V, or with gamma
u = (a (V − min V + 1e-6)^gamma)^(1/gamma).

Source: Psomas et al., Keep It SimPool, ICCV 2023, arXiv:2309.06891, algorithm 1; gamma is 2 for convolutional networks
and 1.25 for ViTs there. Without `linears` it is the esimpool of Psomas et al., arXiv:2506.10178: q = LN(mean X),
K = LN(X), V = X, with 12 heads.
Where the authors' code differs: its minimum is over the whole batch, which couples images (`minimum=batch`), and with
several heads and gamma it does not join the heads. Here W_k is applied to the query, so that no token is projected.
Shapes: B = batch, N = prefix + H·W tokens, C = channels, M = heads, D = C / M, S = H·W.
"""

import torch
from torch import Tensor, nn

from conf import values
from conf.errors import UserError
from models.layers.grid import Grid
from models.layers.pooled import Pool, Pooled

EPS = 1e-6


class SimPool(Pool):
    """(B, N, C) → (B, C); class tokens are left out.

    Args:
        dim: channels C.
        grid, num_classes: of the place; it depends on neither.
        num_heads: M.
        gamma: power of the generalised mean, above 0; None for the weighted mean itself.
        beta: add a learned number to the result.
        minimum: which values a power is taken above: the least of the "image", or of the "batch".
        linears: whether there are W_q and W_k.
        qkv_bias: whether these have a bias.

    Raises:
        ValueError: an option out of range, or heads that do not divide the channels.
    """

    undecayed = ("beta",)

    def __init__(
        self,
        dim: int,
        grid: Grid,
        num_classes: int,
        *,
        num_heads: int = 1,
        gamma: float | None = None,
        beta: bool = False,
        minimum: str = "image",
        linears: bool = True,
        qkv_bias: bool = False,
    ) -> None:
        values.whole("SimPool", "num_heads", num_heads, fix="set pool.num_heads")
        if gamma is not None and not (values.is_number(gamma, 0) and gamma > 0):
            values.refuse("SimPool", "gamma", "a number above 0, or null", gamma, "set pool.gamma")
        for name, value in (("beta", beta), ("linears", linears), ("qkv_bias", qkv_bias)):
            values.flag("SimPool", name, value, fix=f"set pool.{name}=true or false")
        values.choice("SimPool", "minimum", minimum, ("image", "batch"), fix="set pool.minimum")
        if dim % num_heads:
            raise UserError(f"SimPool: {dim} channels must divide into heads, got {num_heads}; set pool.num_heads")
        super().__init__(dim)
        self.num_heads, self.gamma, self.minimum, self.linears = num_heads, gamma, minimum, linears
        self.norm = nn.LayerNorm(dim, eps=EPS)
        if linears:
            self.q, self.k = nn.Linear(dim, dim, bias=qkv_bias), nn.Linear(dim, dim, bias=qkv_bias)
            nn.init.trunc_normal_(self.q.weight, std=0.02)
            nn.init.trunc_normal_(self.k.weight, std=0.02)
        self.beta = nn.Parameter(torch.zeros(1)) if beta else None

    def forward(self, x_BNC: Tensor, grid: Grid) -> Pooled:
        x_BSC = x_BNC[:, grid.prefix :]
        y_BSC, mean_BC = self.norm(x_BSC), x_BSC.mean(1)
        weights_BMS = self._logits(mean_BC, y_BSC).softmax(-1)
        v_BMSD = (y_BSC if self.linears else x_BSC).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        u_BC = self._mean(weights_BMS, v_BMSD).flatten(1)
        return Pooled(u_BC if self.beta is None else u_BC + self.beta, weights_BMS, {})

    def _logits(self, mean_BC: Tensor, y_BSC: Tensor) -> Tensor:
        """(B, M, S): (q W_k) LN(X)ᵀ, which is q (LN(X) W_k)ᵀ."""
        heads = (self.num_heads, -1)
        scale = (y_BSC.shape[-1] // self.num_heads) ** -0.5
        if not self.linears:
            q_BMD, y_BSMD = self.norm(mean_BC).unflatten(-1, heads), y_BSC.unflatten(-1, heads)
            return torch.einsum("bmd,bsmd->bms", q_BMD, y_BSMD) * scale
        q_BMD = self.q(mean_BC).unflatten(-1, heads)
        asked_BMC = torch.einsum("bmd,mdc->bmc", q_BMD, self.k.weight.unflatten(0, heads))
        logits = asked_BMC @ y_BSC.mT
        if self.k.bias is not None:
            logits = logits + (q_BMD * self.k.bias.unflatten(0, heads)).sum(-1, keepdim=True)
        return logits * scale

    def _mean(self, weights_BMS: Tensor, v_BMSD: Tensor) -> Tensor:
        """(B, M, D): the weighted mean of the values, generalised by gamma."""
        if self.gamma is None:
            return (weights_BMS.unsqueeze(2) @ v_BMSD).squeeze(2)
        least = v_BMSD.amin((1, 2, 3), keepdim=True) if self.minimum == "image" else v_BMSD.min()
        powers = (v_BMSD - least + EPS) ** self.gamma
        return (weights_BMS.unsqueeze(2) @ powers).squeeze(2) ** (1 / self.gamma)
