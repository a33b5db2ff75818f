"""Norms of token maps, and a norm of one kind in the place of one of another.

Shapes: B = batch, N = tokens, C = channels.
"""

from torch import Tensor, nn


class TokenBatchNorm(nn.Module):
    """`nn.BatchNorm2d` of the map that the tokens make up, without a change of layout; `bn` may be synchronised.

    Of (B, N, C), or of pooled features (B, C).
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(dim)

    def forward(self, x_BNC: Tensor) -> Tensor:
        return self.bn(x_BNC.flatten(0, -2)).view_as(x_BNC)


# of every token on its own; RMSNorm: Zhang & Sennrich, NeurIPS 2019, arXiv:1910.07467, equation 4
NORMS = {"layernorm": nn.LayerNorm, "rmsnorm": nn.RMSNorm}


def as_norm(module: nn.Module, kind: str) -> nn.Module:
    """A new norm of a kind in `NORMS` for the channels of another; the same module where it is one, or no norm."""
    wanted = NORMS[kind]
    if type(module) is TokenBatchNorm:
        return wanted(module.bn.num_features, eps=module.bn.eps)
    if type(module) in NORMS.values() and type(module) is not wanted:
        return wanted(module.normalized_shape, eps=module.eps)
    return module
