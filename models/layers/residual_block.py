"""The residual blocks of a ResNet, with a mixer of tokens in the place of a convolution where there is one.

Source: Deep Residual Learning for Image Recognition, He et al., CVPR 2016, arXiv:1512.03385, figure 5; mixers in the
place of the 3×3 convolution: BoTNet, Srinivas et al., CVPR 2021, arXiv:2101.11605, figure 3. The bottleneck halves the
map in its second layer, as timm and torchvision do, and the paper in its first.
Shapes: B = batch, N = H·W tokens, C = channels, H W = map.
"""

import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from models.layers.block import scale
from models.layers.downsample import reduced
from models.layers.gated import Carry, carries, gated, given, handed
from models.layers.tokens import to_map, to_tokens


class ConvNorm(nn.Module):
    """A convolution without bias and a batch norm, on maps; zeros around the map keep its size, or half of it."""

    def __init__(self, dim: int, out_dim: int, kernel_size: int = 1, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, out_dim, kernel_size, stride, padding=kernel_size // 2, bias=False)
        self.bn = nn.BatchNorm2d(out_dim)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.bn(self.conv(x_BCHW))


class LastConv(nn.Module):
    """A 1×1 convolution with norm and activation as a block of a stage: `(x_BNC, grid) -> (x_BNC, {})`."""

    def __init__(self, dim: int, out_dim: int, act: type[nn.Module]) -> None:
        super().__init__()
        self.last, self.act = ConvNorm(dim, out_dim), act()

    def forward(self, x_BNC: Tensor, grid: tuple) -> tuple[Tensor, dict[str, Tensor]]:
        return to_tokens(self.act(self.last(to_map(x_BNC, grid)))), {}


class ResidualBlock(nn.Module):
    """act(shortcut(x) + branch(x)) on tokens; all layers have a batch norm, and all but the last one an activation.

    The branch of a bottleneck is a 1×1 convolution, a 3×3 one or the mixer, and a 1×1 one; that of a basic block, which
    has no `width`, a 3×3 convolution, and another one or the mixer. The shortcut is a 1×1 convolution where channels or
    map change. A `gate` weights what the branch gives ("mixer") or the block ("block"), see
    `models.layers.block.Block`.

    Args:
        dim, out_dim: channels before and after.
        width: channels inside of a bottleneck; None for a basic block.
        stride: 2 halves the map, rounded up, behind the mixer by the mean of 2×2 cells unless it does so itself.
        mixer: `(x, grid) -> Mixed` for `width` channels (`out_dim` of a basic block); None for the convolution.
        act: the class of the activation.
        drop_path, layer_scale: see `models.layers.block.Block`; they are about the one branch.
        gate_site: the `Site` that a gate knows: of what the branch gives.
    """

    def __init__(
        self,
        dim: int,
        out_dim: int,
        *,
        width: int | None,
        stride: int = 1,
        mixer: nn.Module | None = None,
        act: type[nn.Module] = nn.ReLU,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        gate_site: tuple | None = None,
    ) -> None:
        super().__init__()
        self.stride, self.gate_site = stride, gate_site
        inner, bottleneck = width or out_dim, width is not None
        first, second = (1, stride) if bottleneck else (stride, 1)  # where the map is halved
        self.conv1 = ConvNorm(dim, inner, 1 if bottleneck else 3, first)
        self.conv2 = ConvNorm(inner, inner, 3, second) if mixer is None else None
        if mixer is not None:
            self.attn, self.attn_norm = mixer, nn.BatchNorm2d(inner)
            self.halves, self.pools = (second > 1 and mixer.strided, second > 1 and not mixer.strided)
        self.conv3 = ConvNorm(inner, out_dim) if bottleneck else None
        self.shortcut = ConvNorm(dim, out_dim, stride=stride) if (dim, stride) != (out_dim, 1) else nn.Identity()
        self.act1, self.act2, self.act3 = act(), act() if bottleneck else None, act()
        self.scale, self.drop_path = scale(out_dim, layer_scale), DropPath(drop_path)
        self.gate, self.gate_at, self.mlp = None, "mixer", None
        last = self.conv3 or self.conv2
        nn.init.zeros_((self.attn_norm if last is None else last.bn).weight)  # the block starts as its shortcut

    @property
    def carries(self) -> bool:
        """Whether it takes and returns what its parts carry from block to block."""
        return carries(getattr(self, "attn", None), self.gate)

    def forward(self, x_BNC: Tensor, grid: tuple, carry: Carry | None = None) -> tuple:
        """Tokens and losses; given `carry`, also what is carried on."""
        x_BCHW = to_map(x_BNC, grid)
        y_BCHW, kept = self.act1(self.conv1(x_BCHW)), ({}, carry or {})
        if self.conv2 is None:
            y_BCHW, *kept = self._mixed(y_BCHW, grid, carry)
        else:
            y_BCHW = self.conv2(y_BCHW)
        if self.conv3 is not None:
            y_BCHW = self.conv3(self.act2(y_BCHW))
        small = grid._replace(height=y_BCHW.shape[2], width=y_BCHW.shape[3])
        y_BNC, *kept = gated(self, "mixer", to_tokens(y_BCHW), small, *kept)
        x_BNC = self.act3(to_tokens(self.shortcut(x_BCHW)) + self.drop_path(self.scale(y_BNC)))
        x_BNC, losses, on = gated(self, "block", x_BNC, small, *kept)
        return (x_BNC, losses) if carry is None else (x_BNC, losses, on)

    def _mixed(self, y_BCHW: Tensor, grid: tuple, carry: Carry | None) -> tuple:
        """What the mixer and its norm give, on the smaller map in a strided block; losses, and what is carried on."""
        here = grid._replace(height=y_BCHW.shape[2], width=y_BCHW.shape[3])
        tokens = to_tokens(y_BCHW)
        stream = {"stream_BNC": tokens} if self.attn.reads_stream else {}
        mixed = self.attn(tokens, here, **stream, **given(self.attn, carry))
        y_BCHW = to_map(mixed.x, reduced(here) if self.halves else here)
        if self.pools:
            y_BCHW = F.avg_pool2d(y_BCHW, 2, ceil_mode=True, count_include_pad=False)
            mixed = mixed._replace(carry=None)  # it is of the larger map
        return self.attn_norm(y_BCHW), mixed.losses, handed(self.attn, mixed, carry)
