"""Efficient additive attention: queries are summed to one vector, with weights that a learned vector gives them.

Source: SwiftFormer: Efficient Additive Attention for Transformer-based Real-time Mobile Vision Applications, Shaker et
al., ICCV 2023, arXiv:2303.15446, equations 5 to 7: y = W_o (W_p (g ⊙ k) + q), g = Σ_n a_n q_n, a = q w, where q and k
have length one over channels and a over tokens. The authors' code divides q w by √C, which the length of a takes back,
and there are neither values nor a softmax.
Shapes: B = batch, N = H·W tokens, C = channels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention import Accepts, Grid, Mixed, Mixer, Site


class AdditiveAttention(Mixer):
    """(B, N, C) → (B, N, C), for any map; the sum over tokens is taken in float32 or wider.

    Args:
        site: the place in the backbone.
        backend: "auto" or "torch"; there is no kernel.
    """

    accepts = Accepts(prefix="refused", gates=False, without_gates="it has one head and adds the queries behind it")
    prenorm = False
    ignores_grid = True
    without_matrix = "it sums the queries of all tokens to one vector and has no weights of pairs"

    def __init__(self, site: Site, *, backend: str = "auto") -> None:
        super().__init__(site, backend)
        C = site.dim
        self.query, self.key = nn.Linear(C, C), nn.Linear(C, C)
        self.weight = nn.Parameter(torch.randn(C, 1))
        self.proj, self.out = nn.Linear(C, C), nn.Linear(C, C)

    def forward(self, x_BNC: Tensor, grid: Grid, gates_BNM: Tensor | None = None) -> Mixed:
        q_BNC, k_BNC = F.normalize(self.query(x_BNC), dim=-1), F.normalize(self.key(x_BNC), dim=-1)
        a_BN1 = q_BNC @ self.weight.to(q_BNC.dtype)
        wide = torch.promote_types(a_BN1.dtype, torch.float32)
        a_BN1 = F.normalize(a_BN1.to(wide), dim=1)
        g_B1C = (a_BN1 * q_BNC).sum(1, keepdim=True).to(q_BNC.dtype)
        return Mixed(self.out(self.proj(g_B1C * k_BNC) + q_BNC), {})
