"""A block without a residual sum: what the mixer gives is all that goes on.

Source: Terminator, Zhang, 2024, arXiv:2401.17948, which discards residual learning.
Shapes: B = batch, N = tokens, C = channels.
"""

from timm.layers import DropPath
from torch import Tensor, nn

from models.layers.block import scale
from models.layers.gated import Carry, carries, gated, given, handed


class PlainBlock(nn.Module):
    """GELU(scale(mix(norm(x)))); it has no MLP. Its parts are named as those of `models.layers.block.Block`.

    Args:
        dim: channels C.
        mixer: `(x, grid) -> Mixed`.
        drop_path: probability that a sample passes the block unchanged in training.
        layer_scale, norm_eps: see `models.layers.block.Block`.
    """

    def __init__(
        self,
        dim: int,
        mixer: nn.Module,
        *,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.norm1, self.attn, self.scale1 = nn.LayerNorm(dim, eps=norm_eps), mixer, scale(dim, layer_scale)
        self.act, self.mlp, self.drop_path = nn.GELU(), None, DropPath(drop_path)
        self.reads_stream = mixer.reads_stream
        self.gate, self.gate_at = None, "mixer"

    @property
    def carries(self) -> bool:
        """Whether it takes and returns what its parts carry from block to block."""
        return carries(self.attn, self.gate)

    def forward(self, x_BNC: Tensor, grid: tuple, carry: Carry | None = None) -> tuple:
        """Tokens and losses; given `carry`, also what is carried on."""
        stream = {"stream_BNC": x_BNC} if self.reads_stream else {}
        mixed = self.attn(self.norm1(x_BNC), grid, **stream, **given(self.attn, carry))
        mixed, *kept = gated(self, "mixer", mixed.x, grid, mixed.losses, handed(self.attn, mixed, carry))
        y_BNC = self.act(self.scale1(mixed))
        if self.training and self.drop_path.drop_prob:
            y_BNC = x_BNC + self.drop_path(y_BNC - x_BNC)
        y_BNC, losses, on = gated(self, "block", y_BNC, grid, *kept)
        return (y_BNC, losses) if carry is None else (y_BNC, losses, on)
