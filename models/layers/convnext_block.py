"""The residual block of ConvNeXt: mixing, norm and MLP in one branch.

Source: A ConvNet for the 2020s, Liu et al., CVPR 2022, arXiv:2201.03545, figure 4.
Shapes: B = batch, N = H·W tokens, C = channels.
"""

from timm.layers import DropPath, Mlp
from torch import Tensor, nn

from models.layers.block import scale
from models.layers.gated import Carry, carries, gated, given, handed


class ConvNeXtBlock(nn.Module):
    """x + scale(mlp(norm(mix(x)))): the mixer, a depth-wise convolution, sees tokens that are not normalised.

    `gate` and `gate_at` are those of `models.layers.block.Block`.

    Args:
        dim: channels C.
        mixer: `(x, grid) -> Mixed`.
        mlp_ratio, drop_path, layer_scale: see `models.layers.block.Block`; they are about the one branch.
    """

    def __init__(
        self,
        dim: int,
        mixer: nn.Module,
        *,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        layer_scale: float | None = 1e-6,
    ) -> None:
        super().__init__()
        self.attn, self.norm = mixer, nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.scale, self.drop_path = scale(dim, layer_scale), DropPath(drop_path)
        self.gate, self.gate_at = None, "mixer"

    @property
    def carries(self) -> bool:
        """Whether it takes and returns what its parts carry from block to block."""
        return carries(self.attn, self.gate)

    def forward(self, x_BNC: Tensor, grid: tuple, carry: Carry | None = None) -> tuple:
        """Tokens and losses; given `carry`, also what is carried on."""
        mixed = self.attn(x_BNC, grid, **given(self.attn, carry))
        mixed, *kept = gated(self, "mixer", mixed.x, grid, mixed.losses, handed(self.attn, mixed, carry))
        hidden, *kept = gated(self, "mlp", self.mlp(self.norm(mixed)), grid, *kept)
        x, losses, on = gated(self, "block", x_BNC + self.drop_path(self.scale(hidden)), grid, *kept)
        return (x, losses) if carry is None else (x, losses, on)
