"""MLPs of a block with a convolution inside, which computes their activation `act` where that is a GELU.

Shapes: B = batch, N = tokens, C = channels, L = of gate and value.
"""

from timm.layers import Mlp
from torch import Tensor, nn

from kernels.depthwise_conv import depthwise_conv
from kernels.gated_conv import gated_conv


class ConvMlp(Mlp):
    """Linear → depth-wise convolution of the map → GELU → Linear; called as `(x_BNC, grid) -> x_BNC`.

    Source: PVT v2, Wang et al., 2022, arXiv:2106.13797, section 3.3; BiFormer's option `mlp_dwconv` (arXiv:2303.08810).
    Prefix tokens are not expected.
    """

    def __init__(self, dim: int, hidden: int, kernel_size: int = 3) -> None:
        super().__init__(dim, hidden)
        self.conv = nn.Conv2d(hidden, hidden, kernel_size, padding=kernel_size // 2, groups=hidden)

    def forward(self, x_BNC: Tensor, grid: tuple) -> Tensor:
        return self.fc2(_activated(self.fc1(x_BNC), grid, self.conv, self.act))


class ConvGLU(nn.Module):
    """W2 (GELU(conv(x Wg)) ⊙ x Wv): a depth-wise 3×3 convolution in the gate; called as `(x_BNC, grid) -> x_BNC`.

    Source: convolutional GLU, TransNeXt, Shi, CVPR 2024, arXiv:2311.17132, section 3.4. A third of the hidden channels
    goes, so that the parameters are about those of an MLP with `hidden`. Prefix tokens are not expected.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        hidden = 2 * hidden // 3
        self.fc1 = nn.Linear(dim, 2 * hidden)
        self.conv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x_BNC: Tensor, grid: tuple) -> Tensor:
        x_BNL, conv = self.fc1(x_BNC), self.conv
        if isinstance(self.act, nn.GELU):
            return self.fc2(gated_conv(x_BNL, tuple(grid), conv.weight, conv.bias))
        gate, value = x_BNL.chunk(2, dim=-1)
        return self.fc2(_activated(gate, grid, conv, self.act) * value)


def _activated(x_BNC: Tensor, grid: tuple, conv: nn.Conv2d, act: nn.Module) -> Tensor:
    fused = isinstance(act, nn.GELU)
    x_BNC = depthwise_conv(x_BNC, tuple(grid), conv.weight, conv.bias, gelu=fused)
    return x_BNC if fused else act(x_BNC)
