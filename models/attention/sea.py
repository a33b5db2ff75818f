"""A reading of SEA: an estimate of the attention matrix, linear in tokens, says which of its entries are computed.

Source: SEA: Sparse Linear Attention with Estimated Attention Mask, Lee et al., ICLR 2024, arXiv:2310.01777, section 3,
and its authors' code for sequences in both directions, which was read and not run: nothing here is compared with it.
    z = [performer(q, k, [I, v]), v],   t = MLP(z),   Ê = softmax(CNN(W t)) of L columns for every query,
    a query sees the M k largest entries of Ê among all heads, each of which stands for N / L tokens,
    o = s₁ s₀ softmax(q kᵀ / √D on these) v + (1 − s₁) Σ_j ē_j v_j,   s = sigmoid(W_s t),
I the identity stretched over the tokens, ē the mean of Ê over the queries. In training the loss is 0.1 KL(A ‖ Ê) +
MSE(A, Ê) on all tokens, by which Ê learns. The teacher A is the exact softmax of the same layer, without its gradient.
Shapes: B = batch, M = heads, N = tokens in raster order, S = N keys, D = channels per head, L = columns.
Otherwise than there: A is another model's, whose output is matched, too; features of the performer are drawn once;
ē sums to one on any number of tokens; the LayerNorm behind is left out, so that there is a matrix; L is at most N.
What the estimate leaves out is masked, not skipped: this is as quadratic as softmax attention.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.precision import full_precision, wide
from models.attention.contract import Grid, Mixed, Mixer, Refused, Site
from models.attention.contract.explaining import is_explaining, note
from models.attention.contract.heads import gated_heads, head_channels, merge_heads, split_heads
from models.attention.contract.options import check_flags, check_whole
from models.layers.random_features import RandomFeatures

KL = 0.1  # of the KL in the loss, beside the MSE


class SEAAttention(Mixer):
    """(B, N, C) → (B, N, C); class tokens are tokens as others.

    Args:
        site: the place in the backbone.
        keys: k, so many keys a query sees in a head on average. Paper: 7 in BERT, 64 in OPT.
        length: L, at most all tokens. Paper: 128 or 256.
        features: of the performer; None for D ln D.
        max_tokens: most tokens whose weights are written out.
        qkv_bias: bias of the projection.
        backend: "auto" or "torch"; there is no kernel.

    Raises:
        Refused: more than `max_tokens`.
    """

    has_matrix = True
    ignores_grid = True

    def __init__(
        self,
        site: Site,
        *,
        keys: int = 7,
        length: int = 128,
        features: int | None = None,
        max_tokens: int = 4096,
        qkv_bias: bool = True,
        backend: str = "auto",
    ) -> None:
        check_whole(
            "sea", keys=keys, length=length, features=1 if features is None else features, max_tokens=max_tokens
        )
        check_flags("sea", qkv_bias=qkv_bias)
        check_size(site.grid, max_tokens)
        super().__init__(site, backend)
        self.num_heads, D = site.num_heads, head_channels(site)
        self.keys, self.max_tokens = keys, max_tokens
        self.qkv = nn.Linear(site.dim, 3 * self.num_heads * D, bias=qkv_bias)
        self.estimator = Estimator(
            self.num_heads, D, min(length, site.grid.tokens), features or max(int(D * math.log(D)), 1)
        )
        self.proj = nn.Linear(self.num_heads * D, site.dim)

    def forward(self, x_BNC: Tensor, grid: Grid, gates_BNM: Tensor | None = None) -> Mixed:
        check_size(grid, self.max_tokens)
        q, k, v = split_heads(self.qkv(x_BNC), 3, self.num_heads)
        scores_BMNL, scales_BMN2 = self.estimator(q, k, v)
        weights_BMNS = self._weights(q, k, scores_BMNL, scales_BMN2)
        if is_explaining():
            note(self, weights_BMNS)
        losses = {"estimation": estimation(scores_BMNL, q, k)} if self.training else {}
        return Mixed(self._finished(weights_BMNS, v, gates_BNM), losses)

    def estimate(self, x_BNC: Tensor, grid: Grid) -> Tensor:
        """Ê on all tokens, (B, M, N, S): rows sum to one."""
        scores_BMNL, _ = self.estimator(*split_heads(self.qkv(x_BNC), 3, self.num_heads))
        return on_tokens(scores_BMNL).softmax(-1)

    def attention_matrix(self, x_BNC: Tensor, grid: Grid) -> Tensor:
        """The weights (B, M, N, S) by which o is made of v."""
        q, k, v = split_heads(self.qkv(x_BNC), 3, self.num_heads)
        return self._weights(q, k, *self.estimator(q, k, v))

    def attend(self, weights: Tensor, x_BNC: Tensor, grid: Grid) -> Tensor:
        """See `models.attention.Mixer`."""
        return self._finished(weights, split_heads(self.qkv(x_BNC), 3, self.num_heads)[2])

    def _weights(self, q: Tensor, k: Tensor, scores_BMNL: Tensor, scales_BMN2: Tensor) -> Tensor:
        with full_precision(q.device):
            share_BMNL, (own, mixed) = wide(scores_BMNL).softmax(-1), wide(scales_BMN2).sigmoid().split(1, dim=-1)
            open_BMNS = on_tokens(chosen(share_BMNL, self.keys))
            sees_BMN1 = open_BMNS.any(-1, keepdim=True)
            logits_BMNS = (wide(q) @ wide(k).mT * q.shape[-1] ** -0.5).masked_fill(~open_BMNS & sees_BMN1, -math.inf)
            usual_BM1S = on_tokens(share_BMNL.mean(2, keepdim=True), share_BMNL.shape[2])
            usual_BM1S = usual_BM1S / usual_BM1S.sum(-1, keepdim=True)
            return mixed * own * sees_BMN1 * logits_BMNS.softmax(-1) + (1 - mixed) * usual_BM1S

    def _finished(self, weights: Tensor, v_BMSD: Tensor, gates_BNM: Tensor | None = None) -> Tensor:
        return self.proj(gated_heads(merge_heads(weights.to(v_BMSD.dtype) @ v_BMSD), gates_BNM))


class Estimator(nn.Module):
    """`(q, k, v) -> scores (B, M, N, L), scales (B, M, N, 2)`; the MLP is the same for all heads, the CNN sees all.

    Args:
        num_heads, head_dim: M and D.
        length: L.
        features: of the performer.
    """

    def __init__(self, num_heads: int, head_dim: int, length: int, features: int) -> None:
        super().__init__()
        self.performer = RandomFeatures(head_dim, features)
        self.encode = nn.Sequential(nn.Linear(3 * head_dim, 2 * head_dim), nn.LayerNorm(2 * head_dim), nn.GELU())
        self.row, self.scale = nn.Linear(2 * head_dim, length), nn.Linear(2 * head_dim, 2)
        wide = 4 * num_heads
        self.down = nn.Conv2d(num_heads, wide, 3, stride=2, padding=1)
        self.residual = nn.ModuleList(
            nn.Sequential(nn.Conv2d(wide, wide, 3, padding=1), nn.ReLU(), nn.Conv2d(wide, wide, 3, padding=1))
            for _ in range(2)
        )
        self.up = nn.Conv2d(wide, num_heads, 3, padding=1)

    def forward(self, q_BMND: Tensor, k_BMSD: Tensor, v_BMSD: Tensor) -> tuple[Tensor, Tensor]:
        N, D = v_BMSD.shape[2:]
        places_ND = F.interpolate(torch.eye(D, device=q_BMND.device)[None], size=N, mode="linear", align_corners=True)
        placed = places_ND[0].mT.to(v_BMSD.dtype).expand(*v_BMSD.shape[:2], -1, -1)
        seen = self.performer(q_BMND, k_BMSD, torch.cat([placed, v_BMSD], dim=-1)).to(v_BMSD.dtype)
        t_BMNE = self.encode(torch.cat([seen, v_BMSD], dim=-1))
        rows_BMNL = self.row(t_BMNE)
        y = self.down(rows_BMNL).relu()
        for block in self.residual:
            y = (y + block(y)).relu()
        y = self.up(F.interpolate(y, scale_factor=2.0, mode="nearest"))
        return y[..., :N, : rows_BMNL.shape[-1]], self.scale(t_BMNE)


def chosen(share_BMNL: Tensor, keys: int) -> Tensor:
    """(B, M, N, L): True for the largest entries of a query in all heads; M times those that hold `keys` tokens."""
    M, N, L = share_BMNL.shape[1:]
    count = min(max(M * round(keys * L / N), 1), M * L)
    of_query = share_BMNL.detach().transpose(1, 2).flatten(2)
    index = of_query.topk(count, sorted=False).indices
    found = torch.zeros_like(of_query, dtype=torch.bool).scatter(-1, index, True)
    return found.unflatten(2, (M, L)).transpose(1, 2)


def on_tokens(columns_BMNL: Tensor, tokens: int | None = None) -> Tensor:
    """(B, M, N, S): the entry of every token, whose place in L columns is that in the sequence; S is N by default."""
    N, L = tokens or columns_BMNL.shape[2], columns_BMNL.shape[3]
    place_S = torch.arange(N, device=columns_BMNL.device) * L // N
    return columns_BMNL[..., place_S]


def estimation(scores_BMNL: Tensor, q_BMND: Tensor, k_BMSD: Tensor) -> Tensor:
    """0.1 KL(A ‖ Ê) + MSE(A, Ê), the KL a mean over rows; A has no gradient."""
    with full_precision(q_BMND.device):
        q, k = wide(q_BMND.detach()), wide(k_BMSD.detach())
        logits_BMNS, ours_BMNS = q @ k.mT * q.shape[-1] ** -0.5, on_tokens(wide(scores_BMNL)).log_softmax(-1)
        kl_BMN = F.kl_div(ours_BMNS, logits_BMNS.log_softmax(-1), reduction="none", log_target=True).sum(-1)
        squared_BMNS = (ours_BMNS.exp() - logits_BMNS.softmax(-1)).square()
    return (KL * kl_BMN.sum() / max(kl_BMN.numel(), 1)) + squared_BMNS.sum() / max(squared_BMNS.numel(), 1)


def check_size(grid: Grid, most: int) -> None:
    """Refuses weights of all pairs of more tokens than `most`."""
    if grid.tokens > most:
        raise Refused(
            f"sea writes out the weights of {grid.tokens} x {grid.tokens} pairs, more than max_tokens={most} allows",
            "raise attention.max_tokens, or choose another mechanism for large maps",
        )
