"""Local patch interaction: neighbours on the map meet, where attention mixes channels alone.

Source: XCiT, El-Nouby et al., NeurIPS 2021, arXiv:2106.09681, section 3.3, with two depth-wise 3×3 convolutions:
    x + γ conv₂(BN(GELU(conv₁(norm(x)))))
The paper has batch norm and GELU between the two; the order is that of its code.
Shapes: B = batch, N = H·W tokens, C = channels.
"""

from timm.layers import DropPath
from torch import Tensor, nn

from kernels.depthwise_conv import depthwise_conv
from models.layers.block import scale
from models.layers.norm import TokenBatchNorm


class LocalPatchInteraction(nn.Module):
    """Called as `(x_BNC, grid) -> x_BNC`, between the two branches of a block; prefix tokens are not expected.

    Args:
        dim: channels C.
        kernel_size: side of both convolutions, odd; 7 in L2ViT (arXiv:2501.16182), where it has the name LCM.
        drop_path, layer_scale, norm_eps: see `models.layers.block.Block`.
    """

    def __init__(
        self,
        dim: int,
        *,
        kernel_size: int = 3,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=norm_eps)
        self.conv1 = nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)
        self.bn = TokenBatchNorm(dim)
        self.conv2 = nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)
        self.scale, self.drop_path = scale(dim, layer_scale), DropPath(drop_path)

    def forward(self, x_BNC: Tensor, grid: tuple) -> Tensor:
        sides = tuple(grid)
        y = depthwise_conv(self.norm(x_BNC), sides, self.conv1.weight, self.conv1.bias, gelu=True)
        y = depthwise_conv(self.bn(y), sides, self.conv2.weight, self.conv2.bias)
        return x_BNC + self.drop_path(self.scale(y))
