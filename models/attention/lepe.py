"""Dense attention with a depth-wise convolution beside it (LePE), and the convolution alone: BiFormer's small maps.

Source: locally-enhanced position encoding, CSWin, Dong et al., CVPR 2022, arXiv:2107.00652, equation 7; as the last
stage of BiFormer, Zhu et al., CVPR 2023, arXiv:2303.08810, whose two codes convolve the input or the values.
Shapes: B = batch, N = prefix + H·W tokens, C = channels, M = heads, D = channels per head.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from conf import values
from kernels.depthwise_conv import LARGEST, depthwise_conv
from models.attention import Accepts, Grid, Mixed, Mixer, Runs, Site
from models.attention.contract.explaining import is_explaining, note
from models.attention.contract.heads import gated_heads, head_channels, merge_heads, split_heads

INPUTS = ("x", "v")


class LePEAttention(Mixer):
    """Softmax attention over the whole map plus a depth-wise convolution: what BiFormer has in its last stage.

    Args:
        site: the place in the backbone.
        lepe_kernel: side of the convolution; 0 for none.
        lepe_input: what it convolves: "x", the input (the released BiFormer-T, S, B), or "v", the values.
        qkv_bias: bias of the projection.
        backend: of the convolution: "auto", "triton" or "torch". The attention is PyTorch's own fused kernel.
    """

    has_matrix = True
    row_stochastic = True

    def __init__(
        self,
        site: Site,
        *,
        lepe_kernel: int = 5,
        lepe_input: str = "x",
        qkv_bias: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__(site, backend)
        check_lepe("LePEAttention", lepe_kernel, lepe_input)
        self.num_heads, self.scale, self.lepe_input = site.num_heads, head_channels(site, even=True) ** -0.5, lepe_input
        self.qkv = nn.Linear(site.dim, 3 * site.dim, bias=qkv_bias)
        self.lepe = depthwise(site.dim, lepe_kernel)
        self.adds = self.lepe is not None
        self.proj = nn.Linear(site.dim, site.dim)

    def forward(self, x_BNC: Tensor, grid: Grid, gates_BNM: Tensor | None = None) -> Mixed:
        qkv_BNC = self.qkv(x_BNC)
        q, k, v = split_heads(qkv_BNC, 3, self.num_heads)
        if is_explaining():
            o = merge_heads(note(self, self._weights(q, k)) @ v)
        else:
            o = merge_heads(F.scaled_dot_product_attention(q, k, v, scale=self.scale))
        if self.lepe is not None:
            source = x_BNC if self.lepe_input == "x" else qkv_BNC.chunk(3, dim=-1)[2]
            o = enhance(self.lepe, source, grid, o, self.backend)
        return Mixed(self.proj(gated_heads(o, gates_BNM)), {})

    def attention_matrix(self, x_BNC: Tensor, grid: Grid) -> Tensor:
        """The weights (B, M, N, N), without the convolution."""
        q, k, _ = split_heads(self.qkv(x_BNC), 3, self.num_heads)
        return self._weights(q, k)

    def attend(self, weights: Tensor, x_BNC: Tensor, grid: Grid) -> Tensor:
        """See `models.attention.Mixer`."""
        return self.proj(merge_heads(weights @ split_heads(self.qkv(x_BNC), 3, self.num_heads)[2]))

    def _weights(self, q_BMND: Tensor, k_BMND: Tensor) -> Tensor:
        return (q_BMND @ k_BMND.mT * self.scale).softmax(-1)

    def runs(self, gated: bool = False) -> Runs:
        """See `models.attention.Mixer`."""
        return Runs("scaled_dot_product_attention", False, "dense attention is PyTorch's own fused kernel")


class ConvMixer(Mixer):
    """What BiFormer's ablation puts in the place of attention (`topk=0`): Linear, a 5×5 depth-wise convolution, Linear.

    Args:
        site: the place in the backbone.
        kernel_size: side of the convolution.
        backend: of the convolution: "auto", "triton" or "torch".
    """

    accepts = Accepts(prefix="refused")
    without_matrix = "it is a convolution, whose weights do not depend on what tokens hold"

    def __init__(self, site: Site, *, kernel_size: int = 5, backend: str = "auto") -> None:
        super().__init__(site, backend)
        self.value, self.conv = nn.Linear(site.dim, site.dim), depthwise(site.dim, kernel_size)
        self.proj = nn.Linear(site.dim, site.dim)

    def forward(self, x_BNC: Tensor, grid: Grid, gates_BNM: Tensor | None = None) -> Mixed:
        o = depthwise_conv(self.value(x_BNC), grid, self.conv.weight, self.conv.bias, backend=self.backend)
        return Mixed(self.proj(gated_heads(o, gates_BNM)), {})

    def runs(self, gated: bool = False) -> Runs:
        """See `models.attention.Mixer`."""
        return Runs("depthwise_conv", True)


def check_lepe(who: str, kernel: int, source: str = "x") -> None:
    """Refuses a side that is not odd (0: no convolution), and what is neither input nor values."""
    values.odd(who, "lepe_kernel", kernel, or_none=True, what="odd", fix="give 3 or 5, or 0 for none")
    values.choice(who, "lepe_input", source, INPUTS, fix="set attention.lepe_input")


def depthwise(dim: int, kernel: int) -> nn.Conv2d | None:
    """A depth-wise convolution that keeps the map, or None for a kernel of 0."""
    return nn.Conv2d(dim, dim, kernel, padding=kernel // 2, groups=dim) if kernel else None


def enhance(conv: nn.Conv2d, x_BNC: Tensor, grid: Grid, o_BNC: Tensor, backend: str) -> Tensor:
    """o plus the convolution of the map; class tokens in front of it get none."""
    if conv.kernel_size[0] > LARGEST:
        backend = "torch"
    return depthwise_conv(x_BNC, grid, conv.weight, conv.bias, residual=o_BNC, backend=backend)
