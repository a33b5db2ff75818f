"""A residual block that mixes no tokens.

Source: LIT, Pan et al., AAAI 2022, arXiv:2105.14217, section 3.2: its first stages are MLPs alone.
Shapes: B = batch, N = tokens, C = channels.
"""

from timm.layers import DropPath, Mlp
from torch import Tensor, nn

from models.layers.block import scale


class MlpBlock(nn.Module):
    """x + mlp(norm(x)), as a block of a stage: `(x_BNC, grid) -> (x_BNC, {})`. Its parts are named as those of `Block`.

    Args:
        dim: channels C.
        mlp_ratio: hidden channels of the MLP over C.
        drop_path, layer_scale, norm_eps: see `models.layers.block.Block`.
    """

    def __init__(
        self,
        dim: int,
        *,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.norm2, self.mlp = nn.LayerNorm(dim, eps=norm_eps), Mlp(dim, int(dim * mlp_ratio))
        self.scale2, self.drop_path = scale(dim, layer_scale), DropPath(drop_path)

    def forward(self, x_BNC: Tensor, grid: tuple) -> tuple[Tensor, dict[str, Tensor]]:
        return x_BNC + self.drop_path(self.scale2(self.mlp(self.norm2(x_BNC)))), {}
