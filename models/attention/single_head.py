"""Single-head attention: a share of the channels attends with one head of small queries and keys, the others pass.

Source: SHViT: Single-Head Vision Transformer with Memory Efficient Macro Design, Yun & Ro, CVPR 2024, arXiv:2401.16456,
section 3.2: y = W relu([softmax(q kᵀ / √16) v, x₂]) with q, k, v of the norm of x₁, where x = [x₁, x₂]. The norm is
over all tokens and channels of an image together, and batch norms stand behind both projections, as in the authors'
code; that behind the last one starts at zero.
Shapes: B = batch, N = H·W tokens, C = channels, P = channels that attend, D = channels of queries and of keys.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conf import values
from models.attention import Accepts, Grid, Mixed, Mixer, Refused, Site
from models.attention.contract.explaining import is_explaining, note
from models.attention.contract.options import check_whole, for_stage
from models.layers.norm import TokenBatchNorm


class SingleHeadAttention(Mixer):
    """(B, N, C) → (B, N, C), for any map.

    Args:
        site: the place in the backbone.
        partial: P, a number of channels or a share of C below one, one value or one per stage; the default gives those
            of the paper's four sizes.
        qk_dim: D, one number or one per stage.
        backend: "auto" or "torch"; there is no kernel.

    Raises:
        Refused: more channels than there are.
    """

    accepts = Accepts(prefix="refused", gates=False, without_gates="it has one head, beside channels of none")
    prenorm = False
    has_matrix = True
    row_stochastic = True
    ignores_grid = True
    FOLDS = (("qkv", "qkv_norm"), ("proj", "proj_norm"))

    def __init__(
        self,
        site: Site,
        *,
        partial: float | int | Sequence[float] = 0.214,
        qk_dim: int | Sequence[int] = 16,
        backend: str = "auto",
    ) -> None:
        share, D = for_stage("partial", partial, site), for_stage("qk_dim", qk_dim, site)
        check_whole("single_head", qk_dim=D)
        P = _channels(share, site.dim)
        super().__init__(site, backend)
        self.partial, self.qk_dim = P, D
        self.norm = nn.GroupNorm(1, P)
        self.qkv, self.qkv_norm = nn.Linear(P, 2 * D + P, bias=False), TokenBatchNorm(2 * D + P)
        self.proj, self.proj_norm = nn.Linear(site.dim, site.dim, bias=False), TokenBatchNorm(site.dim)
        nn.init.zeros_(self.proj_norm.bn.weight)

    def forward(self, x_BNC: Tensor, grid: Grid, gates_BNM: Tensor | None = None) -> Mixed:
        if is_explaining():
            return Mixed(self.attend(note(self, self.attention_matrix(x_BNC, grid)), x_BNC, grid), {})
        q, k, v = self._projected(x_BNC)
        return Mixed(self._finished(F.scaled_dot_product_attention(q, k, v), x_BNC), {})

    def attention_matrix(self, x_BNC: Tensor, grid: Grid) -> Tensor:
        """The weights (B, 1, N, N) of the one head."""
        q_B1ND, k_B1ND, _ = self._projected(x_BNC)
        return (q_B1ND @ k_B1ND.mT * self.qk_dim**-0.5).softmax(-1)

    def attend(self, weights: Tensor, x_BNC: Tensor, grid: Grid) -> Tensor:
        """See `models.attention.Mixer`; the channels that pass are in it, as a ReLU follows them and the values."""
        v_B1NP = self._projected(x_BNC)[2]
        return self._finished(weights.to(v_B1NP.dtype) @ v_B1NP, x_BNC)

    def _projected(self, x_BNC: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values, (B, 1, N, ·)."""
        attending_BNP = self.norm(x_BNC[..., : self.partial].mT).mT
        qkv = self.qkv_norm(self.qkv(attending_BNP)).unsqueeze(1)
        return qkv.split([self.qk_dim, self.qk_dim, self.partial], dim=-1)

    def _finished(self, o_B1NP: Tensor, x_BNC: Tensor) -> Tensor:
        joined_BNC = torch.cat([o_B1NP.squeeze(1), x_BNC[..., self.partial :]], dim=-1)
        return self.proj_norm(self.proj(F.relu(joined_BNC)))


def _channels(share: float | int, dim: int) -> int:
    """P of C channels."""
    if isinstance(share, float) and values.is_number(share, 0, 1) and 0 < share < 1:
        return max(round(share * dim), 1)
    what = "a share of the channels between 0 and 1, or a number of them"
    values.whole("single_head", "partial", share, what=what, fix="set attention.partial, e.g. to 0.214")
    if share > dim:
        raise Refused(
            f"partial={share} is more than the {dim} channels", "set attention.partial to a share, e.g. 0.214"
        )
    return share
