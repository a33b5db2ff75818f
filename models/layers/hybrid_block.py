"""The blocks of MedViT: convolutions in groups as heads, alone or behind a mixer on a share of the channels.

Source: MedViT, Manzari et al., Computers in Biology and Medicine 2023, arXiv:2302.09462, section 3; Next-ViT, Li
et al., 2022, arXiv:2207.05501. As in the authors' code the MLPs have a residual of their own and no drop path.
Shapes: B = batch, N = H·W tokens, C = channels.
"""

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from models.layers.downsample import reduced
from models.layers.gated import Carry, carries, gated, given, handed
from models.layers.local_mlp import LocalMlp
from models.layers.norm import TokenBatchNorm
from models.layers.tokens import to_map, to_tokens


class Entry(nn.Module):
    """Half the map by the mean of 2×2 cells where `stride` is 2, then Linear and batch norm to other channels.

    With neither other channels nor a stride it is nothing. Odd maps are rounded up; cells outside do not count.
    """

    FOLDS = (("conv", "norm"),)

    def __init__(self, dim: int, out_dim: int, stride: int = 1) -> None:
        super().__init__()
        self.stride, changes = stride, stride > 1 or dim != out_dim
        self.conv = nn.Linear(dim, out_dim, bias=False) if changes else nn.Identity()
        self.norm = TokenBatchNorm(out_dim) if changes else nn.Identity()

    def forward(self, x_BNC: Tensor, grid: tuple) -> tuple[Tensor, tuple]:
        if self.stride > 1:
            pooled = F.avg_pool2d(to_map(x_BNC, grid), self.stride, ceil_mode=True, count_include_pad=False)
            x_BNC, grid = to_tokens(pooled), reduced(grid, self.stride)
        return self.norm(self.conv(x_BNC)), grid


class ConvAttention(nn.Module):
    """W relu(norm(conv(x))): a 3×3 convolution for each head of `head_dim` channels; `(x_BNC, grid) -> x_BNC`."""

    FOLDS = (("conv", "norm"),)

    def __init__(self, dim: int, head_dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim // head_dim, bias=False)
        self.norm, self.proj = nn.BatchNorm2d(dim), nn.Linear(dim, dim, bias=False)

    def forward(self, x_BNC: Tensor, grid: tuple) -> Tensor:
        return self.proj(to_tokens(torch.relu(self.norm(self.conv(to_map(x_BNC, grid))))))


class ConvBlock(nn.Module):
    """The efficient convolution block, `(x_BNC, grid) -> (x_BNC, {})`: x + conv attention(x), then x + mlp(norm(x)).

    Args:
        dim, out_dim: channels before and after.
        head_dim: channels of a head of the convolutions.
        mlp_ratio: hidden channels of the MLP over `out_dim`.
        stride: 2 halves the map first.
        drop_path: probability that a sample skips the first branch in training.
    """

    def __init__(
        self, dim: int, out_dim: int, *, head_dim: int, mlp_ratio: int, stride: int = 1, drop_path: float = 0.0
    ) -> None:
        super().__init__()
        self.stride, self.out_dim = stride, out_dim
        self.entry, self.conv = Entry(dim, out_dim, stride), ConvAttention(out_dim, head_dim)
        self.norm, self.mlp = TokenBatchNorm(out_dim), LocalMlp(out_dim, mlp_ratio * out_dim, mlp_ratio)
        self.drop_path = DropPath(drop_path)

    def forward(self, x_BNC: Tensor, grid: tuple) -> tuple[Tensor, dict[str, Tensor]]:
        x, grid = self.entry(x_BNC, grid)
        x = x + self.drop_path(self.conv(x, grid))
        return x + self.mlp(self.norm(x), grid), {}


class HybridBlock(nn.Module):
    """The local transformer block: a mixer on most channels, and convolutions of them that make the others.

        y = entry(x),   y ← y + mix(norm₁(y)),   z = side(y),   z ← z + conv(z),   x = [y, z] + mlp(norm₂[y, z])

    A `gate` weights [y, z] ("mixer"), what the MLP gives, or the block's output, see `models.layers.block.Block`.

    Args:
        dim, out_dim: channels before and after.
        mixer: `(x, grid) -> Mixed`, for the channels y of its site.
        head_dim, mlp_ratio, stride: see `ConvBlock`.
        drop_path: a share of it for each branch: of its channels in `out_dim`, three quarters for the mixer.
    """

    def __init__(
        self,
        dim: int,
        out_dim: int,
        mixer: nn.Module,
        *,
        head_dim: int,
        mlp_ratio: int,
        stride: int = 1,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        width = mixer.site.dim
        self.stride, self.out_dim, self.gate_site = stride, out_dim, mixer.site._replace(dim=out_dim)
        self.entry, self.norm1, self.attn = Entry(dim, width, stride), TokenBatchNorm(width), mixer
        self.side, self.conv = Entry(width, out_dim - width), ConvAttention(out_dim - width, head_dim)
        self.norm2, self.mlp = TokenBatchNorm(out_dim), LocalMlp(out_dim, mlp_ratio * out_dim, mlp_ratio)
        self.drop_path, self.drop_side = DropPath(0.75 * drop_path), DropPath(0.25 * drop_path)
        self.reads_stream, self.gate, self.gate_at = mixer.reads_stream, None, "mixer"

    @property
    def carries(self) -> bool:
        """Whether it takes and returns what its parts carry from block to block."""
        return carries(self.attn, self.gate)

    def forward(self, x_BNC: Tensor, grid: tuple, carry: Carry | None = None) -> tuple:
        """Tokens and losses; given `carry`, also what is carried on."""
        y, grid = self.entry(x_BNC, grid)
        stream = {"stream_BNC": y} if self.reads_stream else {}
        mixed = self.attn(self.norm1(y), grid, **stream, **given(self.attn, carry))
        y = y + self.drop_path(mixed.x)
        z, _ = self.side(y, grid)
        z = z + self.drop_side(self.conv(z, grid))
        kept = mixed.losses, handed(self.attn, mixed, carry)
        x, *kept = gated(self, "mixer", torch.cat([y, z], dim=-1), grid, *kept)
        hidden, *kept = gated(self, "mlp", self.mlp(self.norm2(x), grid), grid, *kept)
        x, losses, on = gated(self, "block", x + hidden, grid, *kept)
        return (x, losses) if carry is None else (x, losses, on)
