"""A depth-wise convolution, batch norm and MLP in one branch: SwiftFormer's block, and what is before its attention.

Source: SwiftFormer, Shaker et al., ICCV 2023, arXiv:2303.15446, section 3.3.
Shapes: B = batch, N = H·W tokens, C = channels.
"""

import torch
from timm.layers import DropPath, Mlp
from torch import Tensor, nn

from kernels.depthwise_conv import depthwise_conv
from models.layers.norm import TokenBatchNorm


class ConvEncoder(nn.Module):
    """x + γ · mlp(norm(conv(x))) with a 3×3 kernel and γ per channel, one at first; called as `(x_BNC, grid) -> x_BNC`.

    Args:
        dim, hidden: channels C, and those inside the MLP.
        drop_path: probability that a sample skips the branch in training; None for a branch that is never skipped.
    """

    FOLDS = (("proj", "norm"),)

    def __init__(self, dim: int, hidden: int, drop_path: float | None = None) -> None:
        super().__init__()
        self.proj, self.norm = nn.Conv2d(dim, dim, 3, padding=1, groups=dim), TokenBatchNorm(dim)
        self.mlp, self.scale = Mlp(dim, hidden), nn.Parameter(torch.ones(dim))
        self.drop_path = nn.Identity() if drop_path is None else DropPath(drop_path)

    def forward(self, x_BNC: Tensor, grid: tuple) -> Tensor:
        y_BNC = depthwise_conv(x_BNC, tuple(grid), self.proj.weight, self.proj.bias)
        return x_BNC + self.drop_path(self.scale * self.mlp(self.norm(y_BNC)))


class EncoderBlock(nn.Module):
    """A `ConvEncoder` as a block of a stage: `(x_BNC, grid) -> (x_BNC, {})`."""

    def __init__(self, dim: int, hidden: int, drop_path: float = 0.0) -> None:
        super().__init__()
        self.conv = ConvEncoder(dim, hidden, drop_path)

    def forward(self, x_BNC: Tensor, grid: tuple) -> tuple[Tensor, dict[str, Tensor]]:
        return self.conv(x_BNC, grid), {}
