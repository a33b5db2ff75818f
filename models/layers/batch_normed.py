"""Layers with a batch norm behind every product, which `models.layers.folded_norms` makes one with it for inference.

Source: the blocks of SHViT, Yun & Ro, CVPR 2024, arXiv:2401.16456; the last norm of a branch starts at zero, so that a
block starts as the identity.
Shapes: B = batch, N = H·W tokens, C = channels.
"""

from timm.layers import DropPath
from torch import Tensor, nn

from kernels.depthwise_conv import depthwise_conv
from models.layers.norm import TokenBatchNorm


class NormedMlp(nn.Module):
    """norm(W₂ act(norm(W₁ x))) with ReLU, without other biases than those of the norms.

    Attributes:
        FOLDS: names of its products and of the norms behind them.
    """

    FOLDS = (("fc1", "norm1"), ("fc2", "norm2"))

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.norm1, self.act = nn.Linear(dim, hidden, bias=False), TokenBatchNorm(hidden), nn.ReLU()
        self.fc2, self.norm2 = nn.Linear(hidden, dim, bias=False), TokenBatchNorm(dim)
        nn.init.zeros_(self.norm2.bn.weight)

    def forward(self, x_BNC: Tensor) -> Tensor:
        return self.norm2(self.fc2(self.act(self.norm1(self.fc1(x_BNC)))))


class NormedPosition(nn.Module):
    """x + norm(depth-wise 3×3 convolution of the map); its norm starts at `gain`."""

    FOLDS = (("proj", "norm"),)

    def __init__(self, dim: int, gain: float = 0.0) -> None:
        super().__init__()
        self.proj = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False)
        self.norm = TokenBatchNorm(dim)
        nn.init.constant_(self.norm.bn.weight, gain)

    def forward(self, x_BNC: Tensor, grid: tuple) -> Tensor:
        return x_BNC + self.norm(depthwise_conv(x_BNC, tuple(grid), self.proj.weight, self.proj.bias))


class LocalBlock(nn.Module):
    """A block without a mixer, `(x_BNC, grid) -> (x_BNC, {})`: x + conv(x), then x + mlp(x)."""

    def __init__(self, dim: int, mlp_ratio: float, drop_path: float = 0.0) -> None:
        super().__init__()
        self.position, self.mlp = NormedPosition(dim), NormedMlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x_BNC: Tensor, grid: tuple) -> tuple[Tensor, dict[str, Tensor]]:
        x_BNC = self.position(x_BNC, grid)
        return x_BNC + self.drop_path(self.mlp(x_BNC)), {}
