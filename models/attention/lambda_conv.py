"""Lambda layers: each token applies a linear function of its own, made of the context, to its query.

Source: LambdaNetworks: Modeling Long-Range Interactions without Attention, Bello, ICLR 2021, arXiv:2102.08602, sections
3 and 3.2, with intra-depth 1. Keys and values are shared by the heads, keys normalised over the tokens; for head m
    y_n = (λ^c + λ^p_n)ᵀ q_nm,  λ^c = Σ_j softmax_j(k_j) v_jᵀ,  λ^p_n = Σ_j E_{j − n} v_jᵀ,
the second by a convolution of every channel of the values with K filters of r × r, so that maps of any size do. As in
timm and its weights there is a bias for each filter; queries and values have a batch norm, and there is no bias in the
projection, nor an output projection: the next convolution of the block is one.
Shapes: B = batch, N = H·W tokens, C = channels, M = heads, K = channels of a query, V = C / M channels of a value.
"""

from torch import Tensor, nn

from models.attention import Accepts, Grid, Mixed, Mixer, Site
from models.attention.contract.heads import gated_heads, head_channels
from models.attention.contract.options import check_flags, check_odd, check_whole
from models.layers.norm import TokenBatchNorm


class LambdaConv(Mixer):
    """Content and position lambdas. Gates (B, N, M) weight the V channels of each head.

    Args:
        site: the place in the backbone.
        key_dim: channels of queries and keys. Paper: 16.
        kernel_size: side r of the neighbourhood whose positions count, odd. Paper: 23.
        qkv_bias: bias of the projection.
        output_projection: a Linear behind the heads.
        backend: "auto" or "torch"; there is no kernel.
    """

    accepts = Accepts(prefix="refused")
    without_matrix = "its weights are channels of keys, which all tokens share"

    def __init__(
        self,
        site: Site,
        *,
        key_dim: int = 16,
        kernel_size: int = 23,
        qkv_bias: bool = False,
        output_projection: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__(site, backend)
        check_whole("lambda_conv", key_dim=key_dim)
        check_odd("lambda_conv", kernel_size=kernel_size)
        check_flags("lambda_conv", qkv_bias=qkv_bias, output_projection=output_projection)
        value_dim, self.num_heads = head_channels(site, even=True), site.num_heads
        self.dims = (self.num_heads * key_dim, key_dim, value_dim)
        self.qkv = nn.Linear(site.dim, sum(self.dims), bias=qkv_bias)
        self.norm_q, self.norm_v = TokenBatchNorm(self.dims[0]), TokenBatchNorm(value_dim)
        self.position = PositionLambda(key_dim, kernel_size)
        self.proj = nn.Linear(site.dim, site.dim) if output_projection else nn.Identity()

    def forward(self, x_BNC: Tensor, grid: Grid, gates_BNM: Tensor | None = None) -> Mixed:
        q, k_BNK, v = self.qkv(x_BNC).split(self.dims, dim=-1)
        q_BNMK, v_BNV = self.norm_q(q).unflatten(-1, (self.num_heads, -1)), self.norm_v(v)
        content_BKV = k_BNK.softmax(1).mT @ v_BNV
        lambda_BNKV = content_BKV[:, None] + self.position(v_BNV, grid)
        o_BNC = (q_BNMK @ lambda_BNKV).flatten(2)
        return Mixed(self.proj(gated_heads(o_BNC, gates_BNM)), {})


class PositionLambda(nn.Module):
    """The same K filters on the map of every channel, and a bias of each: `(v_BNV, grid) -> (B, N, K, V)`."""

    def __init__(self, key_dim: int, kernel_size: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, key_dim, kernel_size, padding=kernel_size // 2)
        nn.init.trunc_normal_(self.conv.weight, std=key_dim**-0.5)

    def forward(self, v_BNV: Tensor, grid: Grid) -> Tensor:
        maps = v_BNV.mT.flatten(0, 1).unflatten(1, (1, *grid[:2]))  # (B·V, 1, H, W)
        return self.conv(maps).unflatten(0, (v_BNV.shape[0], v_BNV.shape[2])).flatten(3).permute(0, 3, 2, 1)
