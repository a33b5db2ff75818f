"""Dense attention with a depth-wise convolution beside it (LePE), and the convolution alone: BiFormer's small maps.

Source: locally-enhanced position encoding, CSWin, Dong et al., CVPR 2022, arXiv:2107.00652, equation 7; as the last
stage of BiFormer, Zhu et al., CVPR 2023, arXiv:2303.08810, whose two codes convolve the input or the values.
Shapes: B = batch, N = prefix + H·W tokens, C = channels, M = heads, D = channels per head.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from conf.errors import UserError
from kernels.depthwise_conv import LARGEST, depthwise_conv
from models.attention import Accepts, Grid, Mixed, Runs, Site
from models.attention.heads import gated_heads, head_channels, split_heads


class LePEAttention(nn.Module):
    """Softmax attention over the whole map plus a depth-wise convolution: what BiFormer has in its last stage.

    Args:
        site: the place in the backbone.
        lepe_kernel: side of the convolution; 0 for none.
        lepe_input: what it convolves: "x", the input (the released BiFormer-T, S, B), or "v", the values.
        qkv_bias: bias of the projection.
        backend: of the convolution: "auto", "triton" or "torch". The attention is PyTorch's own fused kernel.
    """

    accepts = Accepts()

    def __init__(
        self,
        site: Site,
        *,
        lepe_kernel: int = 5,
        lepe_input: str = "x",
        qkv_bias: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.backend = backend
        if lepe_input not in ("x", "v"):
            raise UserError(f"LePEAttention: lepe_input must be x or v, got {lepe_input}; choose one of them")
        self.num_heads, self.scale, self.lepe_input = site.num_heads, head_channels(site, even=True) ** -0.5, lepe_input
        self.qkv = nn.Linear(site.dim, 3 * site.dim, bias=qkv_bias)
        self.lepe = depthwise(site.dim, lepe_kernel)
        self.proj = nn.Linear(site.dim, site.dim)

    def forward(self, x_BNC: Tensor, grid: Grid, gates_BNM: Tensor | None = None) -> Mixed:
        qkv_BNC = self.qkv(x_BNC)
        q, k, v = split_heads(qkv_BNC, 3, self.num_heads)
        o = F.scaled_dot_product_attention(q, k, v, scale=self.scale).transpose(1, 2).flatten(2)
        if self.lepe is not None:
            source = x_BNC if self.lepe_input == "x" else qkv_BNC.chunk(3, dim=-1)[2]
            o = enhance(self.lepe, source, grid, o, self.backend)
        return Mixed(self.proj(gated_heads(o, gates_BNM)), {})

    def runs(self) -> Runs:
        """See `models.attention.Runs`."""
        return Runs("scaled_dot_product_attention", False, "dense attention is PyTorch's own fused kernel")


class ConvMixer(nn.Module):
    """What BiFormer's ablation puts in the place of attention (`topk=0`): Linear, a 5×5 depth-wise convolution, Linear.

    Args:
        site: the place in the backbone.
        kernel_size: side of the convolution.
        backend: of the convolution: "auto", "triton" or "torch".
    """

    accepts = Accepts(prefix="refused")

    def __init__(self, site: Site, *, kernel_size: int = 5, backend: str = "auto") -> None:
        super().__init__()
        self.backend = backend
        self.value, self.conv = nn.Linear(site.dim, site.dim), depthwise(site.dim, kernel_size)
        self.proj = nn.Linear(site.dim, site.dim)

    def forward(self, x_BNC: Tensor, grid: Grid, gates_BNM: Tensor | None = None) -> Mixed:
        o = depthwise_conv(self.value(x_BNC), grid, self.conv.weight, self.conv.bias, backend=self.backend)
        return Mixed(self.proj(gated_heads(o, gates_BNM)), {})

    def runs(self) -> Runs:
        """See `models.attention.Runs`."""
        return Runs("depthwise_conv", True)


def check_kernel(kernel: int) -> None:
    if kernel < 0 or (kernel and kernel % 2 == 0):
        raise UserError(f"lepe_kernel: must be odd, got {kernel}; give 3 or 5, or 0 for none")


def depthwise(dim: int, kernel: int) -> nn.Conv2d | None:
    check_kernel(kernel)
    return nn.Conv2d(dim, dim, kernel, padding=kernel // 2, groups=dim) if kernel else None


def enhance(conv: nn.Conv2d, x_BNC: Tensor, grid: Grid, o_BNC: Tensor, backend: str) -> Tensor:
    """o plus the convolution of the map; class tokens in front of it get none."""
    if conv.kernel_size[0] > LARGEST:
        backend = "torch"
    return depthwise_conv(x_BNC, grid, conv.weight, conv.bias, residual=o_BNC, backend=backend)
