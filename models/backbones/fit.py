"""FIT: tokens mix within groups of the image, latents of the groups with each other, and both are read by the other.

Source: FIT: Far-reaching Interleaved Transformers, Chen & Li, 2023, arXiv:2305.12689, section 2; code:
google-research/pix2seq at commit eabd4e9, `FIT` in architectures/transformers.py. `layers` says how many: with (l)g(l)
    x ← l blocks within each group,   z ← z + read(z, x of its group),   z ← g blocks of all latents,
    x ← x + write(x, z of its group),   x ← l blocks within each group
A group is a part of the image, and every group has the same number of latents, which start as a table of their own. So
the cost is linear in tokens but for the latents. Both are kept as maps here, in rows of the image and of its groups; in
the code they are kept group by group. It returns tokens and latents, each normalised; the classifier here, which is
ours, takes the mean of the tokens. Maps that groups do not divide are completed with zeros.
Shapes: B = batch, N = H·W tokens, C = channels, W = B·groups, T = tokens or latents of a group.
"""

import re
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from conf import values
from conf.errors import UserError
from models.attention import AttentionFactory, Grid, Mixer, Site, build
from models.backbones.base import Backbone, check_counts, pair
from models.backbones.classifier import classifier, init_weights
from models.backbones.perceiver import rows_of
from models.layers.block import Block, Stage, drop_path_rates
from models.layers.cross_block import CrossAttention, CrossBlock
from models.layers.gated import Carry
from models.layers.groups import Groups
from models.layers.patch_embed import PatchEmbed, cells
from models.layers.position import LearnedPosition

LATENTS, MESSAGES = "latents", "messages of latents"  # what is carried
EPS = 1e-6


class FIT(Backbone):
    """Patches, groups and their latents as `layers` says, norm, mean, head.

    Args:
        attention: factory of the mixers, those within groups and those of latents.
        image_size: pixels, one number or (height, width); a forward pass may bring any other size, with more or fewer
            groups of the same size.
        num_classes: outputs of the head; 0 for none.
        layers: numbers of layers, within groups in brackets and of latents in turn, such as (2)4(2).
        groups: of the image, along each side, one number or (rows, columns).
        latents: of each group.
        patch_size: side of a patch in pixels.
        dim, latent_dim: channels of tokens and of latents.
        num_heads, latent_heads: their heads. Reading and writing have the fewer of both, and the narrower width.
        mlp_ratio: hidden channels of MLPs over those outside.
        drop_path: grows linearly over the blocks; reading and writing have none.
        layer_scale: see `Block`.

    Raises:
        ValueError: layers that are no such numbers, groups that do not divide the map, and what mixers refuse.

    The pyramid (`forward_pyramid`) taps behind each writing, and at the end; all maps have the stride of a patch.
    """

    undecayed = ("position.table", "latent_position.table")
    mixes_latents = True

    def __init__(
        self,
        attention: AttentionFactory | Sequence[AttentionFactory],
        image_size: int | Sequence[int],
        num_classes: int,
        *,
        layers: str,
        groups: int | Sequence[int] = 4,
        latents: int = 16,
        patch_size: int = 16,
        dim: int,
        latent_dim: int,
        num_heads: int = 8,
        latent_heads: int = 8,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        counts = {"latents": latents, "patch_size": patch_size, "dim": dim, "latent_dim": latent_dim}
        check_counts("FIT", **counts, num_heads=num_heads, latent_heads=latent_heads)
        pairs, image = layers_of(layers), pair(image_size)
        grid = Grid(*cells(image, patch_size))
        group = Groups(group_of(grid, groups), rows_of(latents))
        given = {"kind": "vit", "image_size": image}
        sites = [
            Site(*shape, s, block, sum(numbers), **given)
            for s, numbers in enumerate(pairs)
            for block, shape in enumerate(
                [(dim, num_heads, group.tokens)] * numbers[0]
                + [(latent_dim, latent_heads, group.of_latents(grid))] * numbers[1]
            )
        ]
        mixers, rates = iter(build(attention, sites)), iter(drop_path_rates(drop_path, len(sites)))
        shared, options = {"layer_scale": layer_scale, "norm_eps": EPS}, {"mlp_ratio": mlp_ratio}
        heads, width = min(num_heads, latent_heads), min(dim, latent_dim)
        if width % heads:
            raise UserError(
                f"FIT: reading and writing have {width} channels and {heads} heads, which must divide them, got "
                f"dim={dim} and latent_dim={latent_dim}; change model.num_heads or model.latent_heads"
            )
        self.stem, self.stages = GroupedStem(in_channels, patch_size, dim, latent_dim, group, grid), nn.ModuleList()
        for within, among in pairs:
            kinds = [InGroups] * within + [AmongLatents] * among
            blocks = [kind(next(mixers), group, drop_path=next(rates), **options, **shared) for kind in kinds]
            if among:
                reads = CrossAttention(latent_dim, dim, heads, width // heads)
                writes = CrossAttention(dim, latent_dim, heads, width // heads)
                blocks = [
                    *blocks[:within],
                    Read(reads, group, **shared),
                    *blocks[within:],
                    Write(writes, group, **shared),
                ]
            self.stages.append(Stage(blocks))
        self.norm = nn.LayerNorm(dim, eps=EPS)
        self.head = classifier(dim, num_classes)
        count = len(pairs)
        self.channels, self.strides, self.grids = [dim] * count, [patch_size] * count, [grid] * count
        self.apply(init_weights)

    def pool(self, x_BNC: Tensor, grid: Grid) -> Tensor:
        """The mean of the tokens."""
        return x_BNC.mean(1)


class GroupedStem(nn.Module):
    """Normalised patches with their positions in the group, their map, and the latents before they have read."""

    def __init__(self, in_channels: int, patch_size: int, dim: int, latent_dim: int, group: Groups, grid: Grid) -> None:
        super().__init__()
        self.group, self.latent_dim = group, latent_dim
        self.patch_embed = PatchEmbed(in_channels, dim, patch_size, norm=nn.LayerNorm(dim, eps=EPS))
        self.position = LearnedPosition(dim, group.tokens)
        self.latent_position = LearnedPosition(latent_dim, group.of_latents(grid))

    def forward(self, images: Tensor) -> tuple[Tensor, Grid, Tensor]:
        x, sides = self.patch_embed(images)
        grid = Grid(*sides)
        x = self.group.merge(self.position(self.group.split(x, grid), self.group.tokens), grid)
        latents = self.group.of_latents(grid)
        return x, grid, self.latent_position(x.new_zeros(x.shape[0], latents.cells, self.latent_dim), latents)


class InGroups(Block):
    """`Block` of the tokens of every group by themselves, as they were images."""

    def __init__(self, mixer: Mixer, group: Groups, **options: Any) -> None:
        super().__init__(mixer.site.dim, mixer, **options)
        self.group = group

    def forward(self, x_BNC: Tensor, grid: Grid, start_BNC: Tensor, carry: Carry | None = None) -> tuple:
        x, *others = super().forward(self.group.split(x_BNC, grid), self.group.tokens, carry)
        return self.group.merge(x, grid), *others


class AmongLatents(Block):
    """`Block` of all latents, which are carried; the tokens pass by."""

    carries = True

    def __init__(self, mixer: Mixer, group: Groups, **options: Any) -> None:
        super().__init__(mixer.site.dim, mixer, **options)
        self.group = group

    def forward(self, x_BNC: Tensor, grid: Grid, start_BNC: Tensor, carry: Carry) -> tuple:
        latents, among = self.group.of_latents(grid), carry.get(MESSAGES, {})
        z_BNC, losses, among = super().forward(carry[LATENTS], latents, among)
        return x_BNC, losses, {**carry, LATENTS: z_BNC, MESSAGES: among}


class Read(CrossBlock):
    """Latents read the tokens of their group; the first time they are those that the stem gives."""

    carries = True

    def __init__(self, attn: CrossAttention, group: Groups, **options: Any) -> None:
        super().__init__(attn, **options)
        self.group = group

    def forward(self, x_BNC: Tensor, grid: Grid, start_BNC: Tensor, carry: Carry) -> tuple:
        z_WTC = self.group.split_latents(carry.get(LATENTS, start_BNC), grid)
        z_WTC = super().forward(z_WTC, self.group.split(x_BNC, grid))
        return x_BNC, {}, {**carry, LATENTS: self.group.merge_latents(z_WTC, grid)}


class Write(CrossBlock):
    """Tokens read the latents of their group."""

    carries = True

    def __init__(self, attn: CrossAttention, group: Groups, **options: Any) -> None:
        super().__init__(attn, **options)
        self.group = group

    def forward(self, x_BNC: Tensor, grid: Grid, start_BNC: Tensor, carry: Carry) -> tuple:
        z_WTC = self.group.split_latents(carry[LATENTS], grid)
        return self.group.merge(super().forward(self.group.split(x_BNC, grid), z_WTC), grid), {}, carry


def layers_of(layers: str) -> list[tuple[int, int]]:
    """Layers within groups, and of latents behind them; none of latents at the end."""
    if not isinstance(layers, str) or not re.fullmatch(r"\(\d+\)([1-9]\d*\(\d+\))+", layers):
        raise UserError(
            "FIT: layers must be numbers of layers within groups, in brackets, and of latents in turn, from brackets "
            f"to brackets, got {layers!r}; set model.layers, e.g. '(2)4(2)'"
        )
    within, among = re.findall(r"\((\d+)\)", layers), re.findall(r"\)(\d+)\(", layers)
    pairs = [(int(a), int(b)) for a, b in zip(within, [*among, 0], strict=True)]
    return [numbers for numbers in pairs if any(numbers)]


def group_of(grid: Grid, groups: int | Sequence[int]) -> Grid:
    """The map of a group."""
    sides = values.pair("FIT", "groups", groups, fix="set model.groups=4")
    if any(side % number for side, number in zip(grid[:2], sides, strict=True)):
        raise UserError(
            f"FIT: groups must divide the map of {grid.height} x {grid.width} tokens along each side, got {sides[0]} x "
            f"{sides[1]}; set model.groups, model.patch_size or image_size"
        )
    return Grid(*(side // number for side, number in zip(grid[:2], sides, strict=True)))
