"""Norms of token maps.

Shapes: B = batch, N = tokens, C = channels.
"""

from torch import Tensor, nn


class TokenBatchNorm(nn.Module):
    """`nn.BatchNorm2d` of the map that the tokens make up, without a change of layout; `bn` may be synchronised."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(dim)

    def forward(self, x_BNC: Tensor) -> Tensor:
        return self.bn(x_BNC.flatten(0, 1)).view_as(x_BNC)
