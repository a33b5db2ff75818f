"""Norms of token maps.

Shapes: B = batch, N = tokens, C = channels.
"""

from torch import Tensor, nn


class TokenBatchNorm(nn.BatchNorm1d):
    """`nn.BatchNorm2d` of the map that the tokens make up: the same parameters and results, no change of layout."""

    def forward(self, x_BNC: Tensor) -> Tensor:
        return super().forward(x_BNC.flatten(0, 1)).view_as(x_BNC)
