"""Stages of OverLoCK: one that makes the overview and then looks closely, and the last, which both streams enter.

Source: OverLoCK, Lou & Yu, CVPR 2025, arXiv:2502.20087, section 3.1 and figure 3. What the overview found goes to the
last stage, and to an auxiliary classifier, as what blocks carry on.
Shapes: B = batch, N = H·W tokens, C = channels, U = C + those of the context.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers.block import Stage
from models.layers.downsample import ConvDownsample
from models.layers.gated import Carry
from models.layers.norm import TokenBatchNorm
from models.layers.tokens import to_map, to_tokens

OVERVIEW = "overview"  # by this name (tokens of the overview, their context) are carried on


def halving(dim: int, out_dim: int) -> ConvDownsample:
    """A 3×3 convolution with stride 2 and a batch norm behind it."""
    return ConvDownsample(dim, out_dim, kernel_size=3, bias=False, out_norm=TokenBatchNorm(out_dim))


class FocusStage(Stage):
    """Base blocks, half the map for an overview, then blocks on tokens with the overview's context beside them.

    Args:
        blocks: `models.layers.overlock_block.ContextBlock`s.
        base: the stage before them, with what halves the map in front of it.
        overview: the stage behind it, likewise.
        context: Linear from the channels of the overview to those of the context.
    """

    def __init__(self, blocks: list[nn.Module], base: Stage, overview: Stage, context: nn.Linear) -> None:
        super().__init__([])
        del self.blocks  # to stand behind the others, as they run
        self.base, self.overview, self.context, self.blocks = base, overview, context, nn.ModuleList(blocks)

    def forward(self, x_BNC: Tensor, grid: tuple, carry: Carry | None = None) -> tuple:
        x_BNC, grid, losses = self.base(x_BNC, grid)
        overview, small, of_overview = self.overview(x_BNC, grid)
        context = self.context(overview)
        above_BCHW = F.interpolate(to_map(context, small), size=tuple(grid[:2]), mode="bilinear")
        above = to_tokens(above_BCHW)
        u_BNU = torch.cat([x_BNC, above], dim=-1)
        u_BNU, grid, of_focus, on = super().forward(u_BNU, grid, above, carry=carry or {})
        losses = [*losses, *of_overview, *of_focus]
        return (u_BNU, grid, losses) if carry is None else (u_BNU, grid, losses, {**on, OVERVIEW: (overview, context)})


class LastStage(Stage):
    """Blocks on half the map of both streams, each of which is given the context of the overview that is carried."""

    def forward(self, x_BNC: Tensor, grid: tuple, carry: Carry | None = None) -> tuple:
        _, context = (carry or {})[OVERVIEW]
        return super().forward(x_BNC, grid, context, carry=carry)


class TwoStreams(nn.Module):
    """Half the map: a convolution of both streams to the channels of the next stage, and one of the context alone."""

    def __init__(self, dim: int, out_dim: int, context: int) -> None:
        super().__init__()
        self.widths = [dim, context]
        self.main, self.context = halving(dim, out_dim), halving(context, context)

    def forward(self, u_BNU: Tensor, grid: tuple) -> tuple[Tensor, tuple]:
        x_BNC, context = u_BNU.split(self.widths, dim=-1)
        x_BNC, half = self.main(x_BNC, grid)
        return torch.cat([x_BNC, self.context(context, grid)[0]], dim=-1), half
