"""MLPs with a residual convolution and a norm of responses inside, and scales with a bias.

Source: global response normalisation: ConvNeXt V2, Woo et al., CVPR 2023, arXiv:2301.00808, section 3; the MLP is that
of OverLoCK, Lou & Yu, CVPR 2025, arXiv:2502.20087. Parameters have the authors' shapes, by which they decay.
Shapes: B = batch, N = H·W tokens, C = channels.
"""

import torch
from timm.layers import Mlp
from torch import Tensor, nn

from models.layers.position import ConvPosition


class ResponseNorm(nn.Module):
    """γ x g / (mean over channels of g) + β + x, where g is the length of a channel over all tokens; zero at first."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.gamma, self.beta = nn.Parameter(torch.zeros(1, dim, 1, 1)), nn.Parameter(torch.zeros(1, dim, 1, 1))

    def forward(self, x_BNC: Tensor) -> Tensor:
        exact = torch.promote_types(x_BNC.dtype, torch.float32)
        g_B1C = torch.linalg.vector_norm(x_BNC, dim=1, keepdim=True, dtype=exact)
        share_B1C = (g_B1C / (g_B1C.mean(-1, keepdim=True) + self.eps)).to(x_BNC.dtype)
        return (self.gamma.view(-1) * share_B1C + 1) * x_BNC + self.beta.view(-1)


class ResponseMlp(Mlp):
    """W₂ grn(h + conv(h)) with h = act(W₁ x) and a depth-wise 3×3 convolution; `(x_BNC, grid) -> x_BNO`."""

    def __init__(self, dim: int, hidden: int, out_dim: int | None = None) -> None:
        super().__init__(dim, hidden, out_dim)
        self.conv, self.grn = ConvPosition(hidden), ResponseNorm(hidden)

    def forward(self, x_BNC: Tensor, grid: tuple) -> Tensor:
        return self.fc2(self.grn(self.conv(self.act(self.fc1(x_BNC)), grid)))


class BiasedScale(nn.Module):
    """w ⊙ x + b per channel, with w at `initial` and b at zero."""

    def __init__(self, dim: int, initial: float = 1.0) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.full((dim, 1, 1, 1), initial)), nn.Parameter(torch.zeros(dim))

    def forward(self, x_BNC: Tensor) -> Tensor:
        return self.weight.view(-1) * x_BNC + self.bias


def biased_scale(dim: int, initial: float | None) -> nn.Module:
    """`BiasedScale`, or nothing for None."""
    return nn.Identity() if initial is None else BiasedScale(dim, float(initial))
