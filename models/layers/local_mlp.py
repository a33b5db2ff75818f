"""An inverted bottleneck with squeeze-and-excitation in the place of an MLP, LocalViT's as MedViT has it.

Source: LocalViT, Li et al., 2021, arXiv:2104.05707, section 3; MedViT, Manzari et al., 2023, arXiv:2302.09462, whose
code squeezes all hidden channels into `mlp_ratio` ones and adds its input by itself, beside the residual of the block.
Shapes: B = batch, N = H·W tokens, C = channels, H W = map.
"""

import torch
from torch import Tensor, nn

from models.layers.tokens import to_map, to_tokens


class LocalMlp(nn.Module):
    """x + norm(W₂ SE(act(norm(conv(act(norm(W₁ x))))))) with hard swish; called as `(x_BNC, grid) -> x_BNC`.

    Args:
        dim, hidden: channels C, and those inside.
        squeezed: channels between the two layers of the squeeze.
    """

    def __init__(self, dim: int, hidden: int, squeezed: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(dim, hidden, 1, bias=False),
            nn.BatchNorm2d(hidden),
            nn.Hardswish(),
            nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            nn.Hardswish(),
            Squeeze(hidden, squeezed),
            nn.Conv2d(hidden, dim, 1, bias=False),
            nn.BatchNorm2d(dim),
        )

    def forward(self, x_BNC: Tensor, grid: tuple) -> Tensor:
        return x_BNC + to_tokens(self.body(to_map(x_BNC, grid)))


class Squeeze(nn.Module):
    """Channels of a map weighted by W₂ relu(W₁ mean) behind a hard sigmoid."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        weights_BC = nn.functional.hardsigmoid(self.fc2(torch.relu(self.fc1(x_BCHW.mean((2, 3))))))
        return x_BCHW * weights_BC[..., None, None]
