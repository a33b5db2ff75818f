"""PVT: four stages with patch embeddings and learned position tables; shortened keys or any other injected mixing.

Source: Pyramid Vision Transformer, Wang et al., ICCV 2021, arXiv:2102.12122, section 3 and table 1. As in the authors'
code the class token joins in the last stage, and its row comes first in the position table there; their code for
detection has neither token nor last norm (`class_token=False`, `norm="none"`). The keys shortened by 8, 4, 2 and 1 are
the attention `spatial_reduction`.
Shapes: B = batch, N = prefix + H·W tokens, C = channels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from conf.errors import UserError
from models.attention import AttentionFactory, Grid
from models.backbones.base import Backbone, PatchStem, check_counts, classifier, init_weights
from models.backbones.stages import check_lists, sites_of, stages_of
from models.layers.block import Block
from models.layers.downsample import ConvDownsample
from models.layers.patch_embed import PatchEmbed
from models.layers.position import LearnedPosition

NORMS = ("used", "none", "unused")
PATCH_EPS = 1e-5  # of the norms of patch embeddings; those of blocks have 1e-6


class PVT(Backbone):
    """Patches, then stages that each halve the map; a position table in each; class token or mean, head.

    Position tables decay in the authors' training, here as in Agent Attention, FLatten and InLine with this backbone.

    Args:
        attention: factory of the token mixers, or a list with one per stage; PVT's own is `spatial_reduction`.
        image_size: pixels, one number or (height, width); a forward pass may bring any other size.
        num_classes: outputs of the head; 0 for none.
        patch_size: side of a patch in pixels; the later stages join 2×2 tokens.
        dims, depths, num_heads, mlp_ratios: channels, blocks, heads, and hidden over outer channels of each stage.
        class_token: classify from a class token in the last stage (PVT) or from the mean over the map.
        norm: before pooling: "used" (PVT), "none" (Agent Attention, InLine), or "unused": frozen weights that are
            there for the sake of files and counts (FLatten).
        drop_path, layer_scale: see `Block`; drop path grows linearly over the blocks.

    Raises:
        ValueError: lists of unequal length or with entries below 1, or an unknown norm.
    """

    undecayed = ("bias.table", "class_token")

    def __init__(
        self,
        attention: AttentionFactory | Sequence[AttentionFactory],
        image_size: int | Sequence[int],
        num_classes: int,
        *,
        patch_size: int = 4,
        dims: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (2, 2, 2, 2),
        num_heads: Sequence[int] = (1, 2, 5, 8),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        class_token: bool = True,
        norm: str = "used",
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        check_counts("PVT", patch_size=patch_size)
        check_lists("PVT", dims=dims, depths=depths, num_heads=num_heads, mlp_ratios=mlp_ratios)
        if norm not in NORMS:
            raise UserError(f"PVT: norm must be one of {', '.join(NORMS)}, got {norm!r}; set model.norm")
        self.channels, self.strides = list(dims), [patch_size << s for s in range(len(dims))]
        shape = {"strides": self.strides, "dims": dims, "depths": depths, "num_heads": num_heads}
        sites = sites_of("hierarchical", image_size, **shape, last_prefix=int(class_token))
        grids = {site.stage: site.grid for site in sites}
        self.stages = stages_of(
            attention,
            sites,
            drop_path,
            block=lambda site, mixer, rate: Block(
                site.dim, mixer, mlp_ratio=mlp_ratios[site.stage], drop_path=rate, layer_scale=layer_scale
            ),
            between=lambda s: Downsample(dims[s - 1], dims[s], grids[s]),
        )
        patches = PatchEmbed(in_channels, dims[0], patch_size, norm=nn.LayerNorm(dims[0], eps=PATCH_EPS))
        self.stem = Stem(patches, dims[0], grids[0])
        self.norm = last_norm(dims[-1], norm)
        self.head = classifier(dims[-1], num_classes)
        self.apply(init_weights)

    def pool(self, x_BNC: Tensor, grid: Grid) -> Tensor:
        """The class token, or the mean over the map without one."""
        return x_BNC[:, 0] if grid.prefix else x_BNC.mean(1)


class Stem(PatchStem):
    """Patch embedding and position table: images → (x_BNC, grid)."""

    def __init__(self, patch_embed: PatchEmbed, dim: int, grid: Grid) -> None:
        super().__init__(patch_embed)
        self.start = Start(dim, grid)

    def forward(self, images: Tensor) -> tuple[Tensor, Grid]:
        return self.start(*super().forward(images))


class Downsample(ConvDownsample):
    """2×2 tokens become one, then norm, class token and position table: (x_BNC, grid) → (x_BNC, grid)."""

    def __init__(self, dim: int, out_dim: int, grid: Grid) -> None:
        super().__init__(dim, out_dim, out_norm=nn.LayerNorm(out_dim, eps=PATCH_EPS))
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


def last_norm(dim: int, norm: str) -> nn.Module:
    """The module for each of `NORMS`."""
    if norm == "none":
        return nn.Identity()
    return (nn.LayerNorm if norm == "used" else UnusedNorm)(dim, eps=1e-6)
