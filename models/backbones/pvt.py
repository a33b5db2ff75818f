"""PVT: four stages with patch embeddings and learned position tables; shortened keys or any other injected mixing.

Source: Pyramid Vision Transformer, Wang et al., ICCV 2021, arXiv:2102.12122, section 3 and table 1. As in the authors'
code the class token joins in the last stage, and its row comes first in the position table there; their code for
detection has neither token nor last norm (`class_token=False`, `norm="none"`). The keys shortened by 8, 4, 2 and 1
are the attention `spatial_reduction`.
Shapes: B = batch, N = prefix + H·W tokens, C = channels.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from conf.errors import UserError
from models.attention import Grid
from models.backbones.hierarchical import Hierarchical
from models.layers.downsample import ConvDownsample
from models.layers.norm import NORMS
from models.layers.patch_embed import PatchEmbed
from models.layers.position import LearnedPosition
from models.layers.stem import PatchStem

LAST_NORMS = ("used", "none", "unused")


class PVT(Hierarchical):
    """Patches, then stages that each halve the map; a position table in each; class token or mean, head.

    Position tables decay in the authors' training, here as in Agent Attention, FLatten and InLine with this backbone.

    Args:
        mlp_ratios: hidden over outer channels of each stage.
        class_token: classify from a class token in the last stage (PVT) or from the mean over the map.
        norm: before pooling: "used" (PVT), "none" (Agent Attention, InLine), or "unused": frozen weights that are
            there for the sake of files and counts (FLatten); or the kind of all norms, as every backbone takes it.
        last_norm: that before pooling, where `norm` is a kind.
        args, options: see `Hierarchical`.

    Raises:
        ValueError: an unknown norm, and what `Hierarchical` refuses.
    """

    norm_eps = 1e-6
    order = ("stages", "stem")
    undecayed = ("bias.table", "class_token")

    def __init__(
        self, *args: Any, mlp_ratios: Sequence[float], class_token: bool = True, last_norm: str = "used", **options: Any
    ) -> None:
        if last_norm not in LAST_NORMS:
            raise UserError(f"PVT: norm must be one of {', '.join(LAST_NORMS)}, got {last_norm!r}; set model.norm")
        self.last_prefix, self.use_of_norm = int(class_token), last_norm
        super().__init__(*args, mlp_ratio=mlp_ratios, **options)

    @classmethod
    def renamed(cls, options: dict[str, Any]) -> dict[str, Any]:
        """`norm` is that before pooling, unless it is a kind of norms, which every backbone takes."""
        if options.get("norm") is not None and options["norm"] not in NORMS:
            options["last_norm"] = options.pop("norm")
        return options

    def between(self, s: int) -> "TableDownsample":
        return TableDownsample(*self.channels[s - 1 : s + 1], self.grids[s], self.patch_eps)

    def stem_of(self, in_channels: int) -> "TableStem":
        return TableStem(self.patches(in_channels).patch_embed, self.channels[0], self.grids[0])

    def last_norm(self, dim: int) -> nn.Module:
        if self.use_of_norm == "none":
            return nn.Identity()
        return (nn.LayerNorm if self.use_of_norm == "used" else UnusedNorm)(dim, eps=self.norm_eps)

    def pool(self, x_BNC: Tensor, grid: Grid) -> Tensor:
        """The class token, or the mean over the map without one."""
        return x_BNC[:, 0] if grid.prefix else x_BNC.mean(1)


class TableStem(PatchStem):
    """Patch embedding and position table: images → (x_BNC, grid)."""

    def __init__(self, patch_embed: PatchEmbed, dim: int, grid: Grid) -> None:
        super().__init__(patch_embed)
        self.start = Start(dim, grid)

    def forward(self, images: Tensor) -> tuple[Tensor, Grid]:
        return self.start(*super().forward(images))


class TableDownsample(ConvDownsample):
    """2×2 tokens become one, then norm, class token and position table: (x_BNC, grid) → (x_BNC, grid)."""

    def __init__(self, dim: int, out_dim: int, grid: Grid, norm_eps: float) -> None:
        super().__init__(dim, out_dim, out_norm=nn.LayerNorm(out_dim, eps=norm_eps))
        self.start = Start(out_dim, grid)

    def forward(self, x_BNC: Tensor, grid: Grid) -> tuple[Tensor, Grid]:
        return self.start(*super().forward(x_BNC, grid))


class Start(nn.Module):
    """Where a stage starts: the class token in front of the map, if there is one, and the position table added."""

    def __init__(self, dim: int, grid: Grid) -> None:
        super().__init__()
        self.class_token = nn.Parameter(torch.zeros(1, grid.prefix, dim)) if grid.prefix else None
        self.position = LearnedPosition(dim, grid, mode="bilinear")
        if grid.prefix:
            nn.init.trunc_normal_(self.class_token, std=0.02)

    def forward(self, x_BNC: Tensor, grid: Grid) -> tuple[Tensor, Grid]:
        if self.class_token is not None:
            x_BNC = torch.cat([self.class_token.expand(x_BNC.shape[0], -1, -1), x_BNC], dim=1)
            grid = grid._replace(prefix=self.class_token.shape[1])
        return self.position(x_BNC, grid), grid


class UnusedNorm(nn.LayerNorm):
    """The weights of a norm that is never applied, frozen: x → x."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__(dim, eps=eps)
        self.requires_grad_(False)

    def forward(self, x_BNC: Tensor) -> Tensor:
        return x_BNC
