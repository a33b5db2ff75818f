"""A backbone of stages that halve the map: a family is its blocks, and what lies between its stages.

Shapes: B = batch, N = prefix + H·W tokens, C = channels.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

from torch import Tensor, nn

from conf.errors import UserError
from models.attention import AttentionFactory, Grid, Site, build
from models.backbones.base import Backbone, check_counts, pair
from models.backbones.classifier import classifier, init_weights
from models.layers.block import Block, Stage, drop_path_rates
from models.layers.patch_embed import PatchEmbed, cells
from models.layers.stem import PatchStem


class Slot(NamedTuple):
    """What a family makes a block of."""

    site: Site
    mixer: nn.Module | None  # None in a stage without attention
    rate: float  # of drop path


class Hierarchical(Backbone, ABC):
    """Stem, stages, norm, mean over the map, head.

    A family says by the attributes and methods below what it has of its own, `between` at the least. An option of its
    own is an argument of its constructor, which keeps it as a plain value before it calls this one.

    Args:
        attention: factory of the token mixers, or a list with one per stage.
        image_size: pixels, one number or (height, width); a forward pass may bring any other size.
        num_classes: outputs of the head; 0 for none.
        dims, depths, num_heads: channels, blocks and heads of each stage.
        patch_size: side in pixels of a token of the first stage; those between stages join 2×2 tokens.
        mlp_ratio: hidden over outer channels of the MLPs, one number or one per stage.
        drop_path, layer_scale: see `Block`; drop path grows linearly over the blocks.
        in_channels: of the images.

    Raises:
        ValueError: lists of unequal length or with entries below 1, or a patch size that the stem cannot have.
    """

    kind = "hierarchical"  # of the sites; one stage alone is a plain backbone, "vit"
    positioned = False  # whether the blocks encode positions by convolution themselves
    attention_stages: Sequence[int] | None = None  # those with mixers; None for all
    last_prefix = 0  # tokens in front of the map of the last stage
    trained_on: tuple[int, int] | None = None  # pixels in whose maps mixers measure distances; None for image_size
    stage_type = Stage
    only_patch_size: int | None = None  # of a stem that has no other
    patch_eps, norm_eps = 1e-5, 1e-5  # of the norms of patches, and of those of blocks and of the last one
    norm_pooled = False  # the last norm stands behind the pooling, as `head_norm`
    order = ("stem", "stages")  # of the parameters: an optimizer's state in a checkpoint goes by it

    def __init__(
        self,
        attention: AttentionFactory | Sequence[AttentionFactory | None],
        image_size: int | Sequence[int],
        num_classes: int,
        *,
        dims: Sequence[int],
        depths: Sequence[int],
        num_heads: Sequence[int],
        patch_size: int = 4,
        mlp_ratio: float | Sequence[float] = 4.0,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        self._check(patch_size, mlp_ratio, dims=dims, depths=depths, num_heads=num_heads)
        self.mlp_ratios = list(mlp_ratio) if isinstance(mlp_ratio, Sequence) else [mlp_ratio] * len(dims)
        self.layer_scale, self.channels = layer_scale, list(dims)
        self.kind = "vit" if self.kind == "hierarchical" and len(dims) == 1 else self.kind
        self.strides = self.strides_of(patch_size)
        self.grids = [Grid(*cells(pair(image_size), stride)) for stride in self.strides]
        self.grids[-1] = self.grids[-1]._replace(prefix=self.last_prefix)
        # The weights that a seed gives go by what is made first: mixers, then blocks, then the rest.
        places = self._places(attention, pair(image_size), depths, num_heads, drop_path)
        of_stages = groupby(places, key=lambda place: place.site.stage)
        parts = {"stages": nn.ModuleList(self.stage(s, list(of_stage)) for s, of_stage in of_stages)}
        parts["stem"] = self.stem_of(in_channels)
        for name in self.order:
            self.add_module(name, parts[name])
        last = self.last_norm(dims[-1])
        self.norm, self.head_norm = (nn.Identity(), last) if self.norm_pooled else (last, None)
        self.head = classifier(dims[-1], num_classes)
        self.apply(init_weights)

    @abstractmethod
    def between(self, s: int) -> nn.Module:
        """The module `(x, grid) -> (x, grid)` in front of stage s: half the map, `self.channels[s]` channels."""

    def block(self, site: Site, mixer: nn.Module, rate: float, **own) -> nn.Module:
        """A transformer block at a site; `own` are options of `Block` that a family adds."""
        shared = {"mlp_ratio": self.mlp_ratios[site.stage], "layer_scale": self.layer_scale, "norm_eps": self.norm_eps}
        return Block(site.dim, mixer, drop_path=rate, **shared, **own)

    def mixes(self, site: Site) -> bool:
        """Whether a block has a mixer."""
        return self.attention_stages is None or site.stage in self.attention_stages

    def stage(self, s: int, places: list[Slot]) -> Stage:
        """Its blocks, behind what lies between it and the stage before."""
        return self.stage_type([self.block(*place) for place in places], self.between(s) if s else None)

    def stem_of(self, in_channels: int) -> nn.Module:
        """What makes tokens of images; here patches and a LayerNorm."""
        return self.patches(in_channels)

    def patches(self, in_channels: int, **window: int) -> PatchStem:
        """Patches of `self.strides[0]` pixels, `kernel_size` and `padding` as given, and a LayerNorm."""
        dim, norm = self.channels[0], nn.LayerNorm(self.channels[0], eps=self.patch_eps)
        return PatchStem(PatchEmbed(in_channels, dim, self.strides[0], **window, norm=norm))

    def last_norm(self, dim: int) -> nn.Module:
        """The norm of the tokens that are pooled, or of what pooling gives, see `norm_pooled`."""
        return nn.LayerNorm(dim, eps=self.norm_eps)

    def strides_of(self, patch_size: int) -> list[int]:
        """Of the map of each stage against the image."""
        return [patch_size << s for s in range(len(self.channels))]

    def pool(self, x_BNC: Tensor, grid: Grid) -> Tensor:
        """(B, N, C) → (B, C): the mean over the map, and the norm of it where the family has it there."""
        x_BC = super().pool(x_BNC, grid)
        return x_BC if self.head_norm is None else self.head_norm(x_BC)

    def _check(self, patch_size: int, mlp_ratio: float | Sequence[float], **lists: Sequence[int]) -> None:
        who = type(self).__name__
        check_counts(who, patch_size=patch_size)
        if self.only_patch_size not in (None, patch_size):
            raise UserError(f"{who}: patch_size must be {self.only_patch_size}, got {patch_size}; leave it out")
        check_lists(who, **lists, **({"mlp_ratios": mlp_ratio} if isinstance(mlp_ratio, Sequence) else {}))

    def _places(
        self,
        attention: AttentionFactory | Sequence[AttentionFactory | None],
        image_size: tuple[int, int],
        depths: Sequence[int],
        num_heads: Sequence[int],
        drop_path: float,
    ) -> list[Slot]:
        """Every block in order, its mixer, and its drop path rate, which grows linearly from 0 at the first."""
        of_all = {"positioned": self.positioned, "image_size": image_size}
        options = [
            of_all | {"measured_in": self.trained_on and cells(self.trained_on, stride)} for stride in self.strides
        ]
        sites = [
            Site(dim, num_heads[s], self.grids[s], s, block, depths[s], self.kind, **options[s])
            for s, dim in enumerate(self.channels)
            for block in range(depths[s])
        ]
        mixed = [self.mixes(site) for site in sites]
        mixers = iter(build(attention, [site for site, mixes in zip(sites, mixed, strict=True) if mixes]))
        rates = drop_path_rates(drop_path, len(sites))
        return [
            Slot(site, next(mixers) if mixes else None, rate)
            for site, mixes, rate in zip(sites, mixed, rates, strict=True)
        ]


def check_lists(who: str, **options: Sequence[int]) -> None:
    """Refuses lists with one entry per stage that disagree about the number of stages or have entries below 1."""
    lengths = {name: len(values) for name, values in options.items()}
    if len(set(lengths.values())) != 1:
        raise UserError(
            f"{who}: options with one entry per stage differ in length, got {lengths}; give as many of each"
        )
    for name, values in options.items():
        if min(values) < 1:
            raise UserError(f"{who}: {name} must be at least 1 in every stage, got {list(values)}; set model.{name}")
