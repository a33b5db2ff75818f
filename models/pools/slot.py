"""Slot attention: slots compete for the tokens over a few rounds; the features are their mean, or all of them.

Slots begin at μ + σ · noise. A round: a = softmax over the slots of (q kᵀ / √C) + 1e-8, normalised over the tokens;
u = a v; slots ← GRU(u, slots); slots ← slots + MLP(LN(slots)).

Source: Locatello et al., Object-Centric Learning with Slot Attention, NeurIPS 2020, arXiv:2006.15055, algorithm 1.
The recorded case is of lucidrains/slot-attention; the authors' code has no bias in q, k and v, LayerNorms with eps 1e-3
and 128 hidden channels.
The paper has one μ and σ for all slots (`start=shared`), which noise must tell apart in evaluation too: there it is the
same for all images, drawn once and stored. By default each slot has its own, and evaluation begins at μ.
Shapes: B = batch, N = prefix + H·W tokens, C = channels, Q = slots, S = H·W.
"""

import torch
from timm.layers import Mlp
from torch import Tensor, nn

from conf import values
from models.layers.grid import Grid
from models.layers.pooled import Pool, Pooled

WHO, EPS = "SlotPool", 1e-8


class SlotPool(Pool):
    """(B, N, C) → (B, C), or (B, Q·C) of joined slots; class tokens are left out.

    Args:
        dim: channels C.
        grid, num_classes: of the place; it depends on neither.
        num_slots: Q.
        rounds: how often the slots attend.
        hidden: channels inside the MLP.
        start: of the slots: "own" μ and σ each, or "shared".
        join: "mean" of the slots, or "concatenate"; the latter depends on their order, which shared ones have not.
        qkv_bias: whether q, k and v have a bias.
        norm_eps: of the LayerNorms.

    Raises:
        ValueError: an option out of range.
    """

    undecayed = ("mu", "log_sigma")

    def __init__(
        self,
        dim: int,
        grid: Grid,
        num_classes: int,
        *,
        num_slots: int = 4,
        rounds: int = 3,
        hidden: int = 128,
        start: str = "own",
        join: str = "mean",
        qkv_bias: bool = False,
        norm_eps: float = 1e-3,
    ) -> None:
        for name, value in (("num_slots", num_slots), ("rounds", rounds), ("hidden", hidden)):
            values.whole(WHO, name, value, fix=f"set pool.{name}")
        values.choice(WHO, "start", start, ("own", "shared"), fix="set pool.start")
        values.choice(WHO, "join", join, ("mean", "concatenate"), fix="set pool.join")
        values.flag(WHO, "qkv_bias", qkv_bias, fix="set pool.qkv_bias=true or false")
        values.number(WHO, "norm_eps", norm_eps, fix="set pool.norm_eps")
        super().__init__(dim * num_slots if join == "concatenate" else dim)
        self.num_slots, self.rounds, self.join, self.shared = num_slots, rounds, join, start == "shared"
        self.mu = nn.Parameter(torch.randn(1, 1 if self.shared else num_slots, dim))
        self.log_sigma = nn.Parameter(torch.zeros_like(self.mu))
        nn.init.xavier_uniform_(self.log_sigma)
        if self.shared:
            self.register_buffer("noise", torch.randn(1, num_slots, dim))
        self.q, self.k, self.v = (nn.Linear(dim, dim, bias=qkv_bias) for _ in range(3))
        self.gru = nn.GRUCell(dim, dim)
        self.mlp = Mlp(dim, hidden, act_layer=nn.ReLU)
        self.norm_tokens, self.norm_slots, self.norm_mlp = (nn.LayerNorm(dim, eps=norm_eps) for _ in range(3))

    def forward(self, x_BNC: Tensor, grid: Grid) -> Pooled:
        slots_BQC, shares_BQS = self.slots(x_BNC, grid)
        x_BC = slots_BQC.flatten(1) if self.join == "concatenate" else slots_BQC.mean(1)
        return Pooled(x_BC, _over_tokens(shares_BQS), {})

    def slots(self, x_BNC: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        """The slots (B, Q, C), and the share that each had of every token in the last round (B, Q, S)."""
        x_BSC = self.norm_tokens(x_BNC[:, grid.prefix :])
        k_BSC, v_BSC, slots_BQC = self.k(x_BSC), self.v(x_BSC), self._start(x_BNC)
        for _ in range(self.rounds):
            q_BQC = self.q(self.norm_slots(slots_BQC))
            shares_BQS = (q_BQC @ k_BSC.mT * q_BQC.shape[-1] ** -0.5).softmax(1) + EPS
            updates_BQC = _over_tokens(shares_BQS) @ v_BSC
            slots_BQC = self.gru(updates_BQC.flatten(0, 1), slots_BQC.flatten(0, 1)).view_as(slots_BQC)
            slots_BQC = slots_BQC + self.mlp(self.norm_mlp(slots_BQC))
        return slots_BQC, shares_BQS

    def _start(self, x_BNC: Tensor) -> Tensor:
        """(B, Q, C): μ + σ · noise; training draws it anew, as dropout does its masks."""
        B, Q, C = x_BNC.shape[0], self.num_slots, self.mu.shape[2]
        mean = self.mu.repeat(B, Q // self.mu.shape[1], 1)  # a view fails in FlopCounterMode
        mean = mean + x_BNC.new_zeros(B, Q, C, dtype=mean.dtype)  # under vmap of every image, which GRUCell asks for
        if self.training:
            return mean + self.log_sigma.exp() * torch.randn_like(mean)
        return mean + self.log_sigma.exp() * self.noise if self.shared else mean


def _over_tokens(shares_BQS: Tensor) -> Tensor:
    """Of shares of tokens, the weights of a mean over tokens."""
    return shares_BQS / shares_BQS.sum(-1, keepdim=True)
