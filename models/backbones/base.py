"""What every backbone shares: images in, logits, features, pyramids and auxiliary losses out.

Shapes: B = batch, N = tokens, C = channels, H W = map.
"""

from abc import ABCMeta
from collections.abc import Callable, Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from conf.errors import UserError
from models.attention import Grid
from models.backbones.furnish import PLACES, furnish
from models.layers.block import Stage
from models.layers.gated import Carry
from models.layers.pooled import Pool, Pooled
from models.layers.tokens import to_map
from models.layers.wrapped import Passed, Wrapper

Behind = Callable[[int, Tensor, Grid], Tensor]


class Furnished(ABCMeta):
    """Every backbone also takes what `furnish` puts into it once it is built: `gate`, `pool`, `norm` and so on."""

    def __call__(cls, *args: Any, **options: Any) -> "Trunk":
        options = cls.renamed(options)
        places = {name: options.pop(name) for name in PLACES & options.keys()}
        model = super().__call__(*args, **options)
        if not hasattr(model, "num_classes"):
            model.num_classes = getattr(getattr(model, "head", None), "out_features", 0)
        furnish(model, **places)
        return model


class Trunk(nn.Module, metaclass=Furnished):
    """Stem and stages: what a classifier and a pyramid of the same family have in common.

    Attributes that a family sets in its constructor:
        stem: `images -> (x_BNC, grid)`, and whatever else every block is given.
        stages: ModuleList of `models.layers.block.Stage`.
        channels, strides: of the map that each stage ends with.
        undecayed: ends of the names of parameters without weight decay; position tables and class tokens, as in the
            authors' codes of most families.
        latent: whether its tokens are latents, which have no places on the image; `strides` are then none.
        mixes_latents: whether mixers see latents, all of them or some.
        reducers: what `furnish` puts in front of stages, by their number; None for none.
        wrapper: what it puts around them, see `models.layers.wrapped`; None for none.
    """

    stem: nn.Module
    stages: nn.ModuleList
    channels: list[int]
    strides: list[int]
    undecayed: tuple[str, ...] = ("position.table", "bias.table", "class_token")
    latent = mixes_latents = False
    reducers: nn.ModuleDict | None
    wrapper: Wrapper | None

    def __init__(self) -> None:
        super().__init__()
        self.reducers = self.wrapper = None

    @classmethod
    def renamed(cls, options: dict[str, Any]) -> dict[str, Any]:
        """Options under the names that the constructor and `furnish` have for them."""
        return options

    def set_gradient_checkpointing(self, enabled: bool) -> None:
        """Recompute every block in the backward pass: less memory, about a third more time."""
        for module in self.modules():
            if isinstance(module, Stage):
                module.gradient_checkpointing = enabled

    def no_weight_decay(self) -> set[str]:
        """Parameters that never decay besides biases and norms.

        Those whose names end as `undecayed` says, and those that a part names in an `undecayed` of its own.
        """
        ends = tuple(f".{end}" for end in self.undecayed)
        of_parts = {
            f"{name}.{own}" for name, part in self.named_modules() if name for own in getattr(part, "undecayed", ())
        }
        return {name for name, _ in self.named_parameters() if f".{name}".endswith(ends) or name in of_parts}

    def group_matcher(self, coarse: bool = False) -> dict:
        """Layers for timm's layer decay: the stem, then block after block (or stage after stage), then the head.

        As in timm's own models a norm at the end belongs to the last block: timm reads (99999,) as "with the one
        before".
        """
        stem = r"^stem"
        if coarse:
            return {"stem": stem, "blocks": r"^stages\.(\d+)"}
        blocks = [
            (r"^(?:stages|reducers)\.(\d+)\.(?:downsample|score)", (0,)),
            (r"^stages\.(\d+)\.blocks\.(\d+)", None),
        ]
        return {"stem": stem, "blocks": [*blocks, (r"^stages\.(\d+)\.norm", (99999,)), (r"^norm", (99999,))]}

    def through(self, images: Tensor, carry: Carry | None = None, behind: Behind | None = None) -> Passed:
        """The map behind each stage, and the losses of blocks, without the wrapper; the first is given `carry`.

        What `behind(stage, x_BNC, grid)` makes of the tokens behind each stage goes on in their place.
        """
        return self._through_stages(images, carry, behind)[:2]

    def _forward_stages(self, images: Tensor) -> Passed:
        return self.through(images) if self.wrapper is None else self.wrapper(self, images)

    def _through_stages(
        self, images: Tensor, carry: Carry | None = None, behind: Behind | None = None
    ) -> tuple[list, list, Carry]:
        """As `through`, and what the last stage carries on."""
        x, grid, *given = self.stem(images)
        maps, losses, carry = [], [], carry or {}
        for s, stage in enumerate(self.stages):
            if self.reducers is not None and str(s) in self.reducers:
                reducer = self.reducers[str(s)]
                reduced = reducer(x, grid, carry)
                x, grid, carry = reduced.x, reducer.onward(reduced, grid), {}
                losses.append(reduced.losses)
            x, grid, of_stage, carry = stage(x, grid, *given, carry=carry)
            x = x if behind is None else behind(s, x, grid)
            maps.append((x, grid))
            losses += of_stage
        return maps, losses, carry


class Backbone(Trunk):
    """Stem, stages, norm, pooling, head. A family fills in the parts; see `models/backbones/vit.py` for the shortest.

    Attributes that a family sets in its constructor, besides those of `Trunk`:
        grids: the map of each stage at the training resolution.
        norm: on the tokens of the last stage, before pooling.
        head_norm: on what pooling gives; None for none.
        head: Linear to `num_classes`, or Identity when that is 0; or what `furnish` puts there.
        pooling: what `furnish` puts in the place of the family's own `pool`; None for none.
        own_pool: makes what it puts there where nothing is chosen; None for none.
    """

    grids: list[Grid]
    norm: nn.Module
    head_norm: nn.Module | None
    head: nn.Module
    pooling: Pool | None
    own_pool: Callable[..., Pool] | None

    def __init__(self) -> None:
        super().__init__()
        self.head_norm = self.pooling = self.own_pool = None

    @property
    def learns_from_labels(self) -> bool:
        """Whether `forward` has a loss more when it is given the labels."""
        return any(part is not None and part.learns_from_labels for part in (self.pooling, self.wrapper))

    @property
    def pooled_grid(self) -> Grid:
        """The map that is pooled at the training resolution, with the tokens in front of it."""
        return self.grids[-1]

    @property
    def pooled_dim(self) -> int:
        """Channels of the tokens that are pooled."""
        return self.channels[-1]

    @overload
    def forward(
        self, images: Tensor, return_losses: Literal[False] = False, labels: Tensor | None = None
    ) -> Tensor: ...

    @overload
    def forward(
        self, images: Tensor, return_losses: Literal[True], labels: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]: ...

    def forward(self, images, return_losses=False, labels=None):
        """Logits (B, num_classes); with `return_losses` also the auxiliary losses, each stacked over layers (L,).

        Those of the pool are among these; one with classifiers of its own trains them by labels (B,) or (B, K), and so
        does a wrapper.
        """
        if self.wrapper is None:
            maps, losses, _ = self._through_stages(images)
            logits, of_pool = self.classify_with_losses(*self.finished(*maps[-1]), labels)
        else:
            maps, losses = self.wrapper(self, images, labels)
            logits, of_pool = self.wrapper.answer(self, maps, labels)
        return (logits, stacked(losses) | of_pool) if return_losses else logits

    def forward_tokens(self, images: Tensor) -> tuple[Tensor, Grid, dict[str, Tensor]]:
        """The tokens (B, N, C) of the last stage as they are pooled, their map, and the auxiliary losses.

        They are normalised where the norm of the family stands before the pooling (not in ConvNeXt and DaViT).
        """
        maps, losses = self._forward_stages(images)
        return (*self.finished(*maps[-1]), stacked(losses))

    def finished(self, x_BNC: Tensor, grid: Grid) -> tuple[Tensor, Grid]:
        """What is pooled, of the tokens that the last stage gives."""
        return self.norm(x_BNC), grid

    def classify(self, x_BNC: Tensor, grid: Grid) -> Tensor:
        """Logits (B, num_classes) from what `forward_tokens` gives."""
        return self.logits(self.pooled(x_BNC, grid).x)

    def classify_with_losses(
        self, x_BNC: Tensor, grid: Grid, labels: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """`classify`, and the losses of the pool, each (1,)."""
        features, losses = self.pooled_with_losses(x_BNC, grid, labels)
        return self.logits(features), losses

    def pooled_with_losses(
        self, x_BNC: Tensor, grid: Grid, labels: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What the classifier is given, and the losses of the pool, each (1,)."""
        pooled = self.pooled(x_BNC, grid)
        return pooled.x, stacked([pooled.losses_with(labels)])

    def logits(self, features: Tensor) -> Tensor:
        """What the classifier makes of what the pool gives."""
        return self.head(features)

    def pooled(self, x_BNC: Tensor, grid: Grid) -> Pooled:
        """What the head is given, from what `forward_tokens` gives; with the attention of the pool, if it has one."""
        if self.pooling is None:
            return Pooled(self.pool(x_BNC, grid), None, {})
        pooled = self.pooling(x_BNC, grid)
        return pooled if self.head_norm is None else pooled._replace(x=self.head_norm(pooled.x))

    def forward_kept(self, images: Tensor) -> list[Tensor]:
        """What each reducer keeps, (B, K): cells of the map, counted in rows; [] without reducers."""
        kept: list[Tensor] = []
        reducers = [] if self.reducers is None else self.reducers.values()
        hooks = [reducer.register_forward_hook(lambda *call: kept.append(call[-1].kept)) for reducer in reducers]
        try:
            self.forward_tokens(images)
        finally:
            for hook in hooks:
                hook.remove()
        for i in range(1, len(kept)):
            kept[i] = kept[i - 1].gather(1, kept[i])
        return kept

    def forward_pooled(self, images: Tensor) -> Pooled:
        """What the pool makes of images: `weights` (B, Q, S) show where the queries look; None for the mean."""
        x_BNC, grid, _ = self.forward_tokens(images)
        return self.pooled(x_BNC, grid)

    def forward_features(self, images: Tensor) -> Tensor:
        """The tokens (B, N, C) of the last stage, prefix tokens first; see `forward_tokens`."""
        return self.forward_tokens(images)[0]

    def forward_pyramid(self, images: Tensor) -> list[Tensor]:
        """One map (B, C, H, W) per stage as it leaves the stage; `Pyramid` is what dense tasks take."""
        check_maps(self, "forward_pyramid")
        maps, _ = self._forward_stages(images)
        return [to_map(x, grid) for x, grid in maps]

    def pool(self, x_BNC: Tensor, grid: Grid) -> Tensor:
        """(B, N, C) → (B, C): the mean over the map."""
        return x_BNC[:, grid.prefix :].mean(1)

    def level_norm(self, dim: int) -> nn.Module:
        """The norm on the tokens of one map of the pyramid, where the family has one in dense tasks."""
        return nn.Identity()


class Pyramid(Trunk):
    """A backbone for dense tasks: called with images, it gives one map (B, C, H, W) per stage.

    `channels` and `strides` say what the maps are. Stem and stages are those of the given backbone, with its names;
    its classifier and last norm are left out, and `norms` has the norm of each map.

    Raises:
        ValueError: the model is none that takes images alone, such as a DiT.
    """

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        if not isinstance(backbone, Backbone):
            raise UserError(
                f"features_only: a backbone for images is needed, got {type(backbone).__name__}, which makes images; "
                "choose another model"
            )
        check_maps(backbone, "features_only")
        self.stem, self.stages = backbone.stem, backbone.stages
        self.channels, self.strides, self.undecayed = backbone.channels, backbone.strides, backbone.undecayed
        self.norms = nn.ModuleList(backbone.level_norm(dim) for dim in self.channels)

    def forward(self, images: Tensor) -> list[Tensor]:
        maps, _ = self._forward_stages(images)
        return [to_map(norm(x), grid) for norm, (x, grid) in zip(self.norms, maps, strict=True)]


def stacked(losses: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The auxiliary losses of all layers by name, each (L,) over the layers that have it."""
    names = sorted({name for loss in losses for name in loss})
    return {name: torch.stack([loss[name] for loss in losses if name in loss]) for name in names}


def check_maps(backbone: Trunk, who: str) -> None:
    """Refuses a backbone whose tokens do not make up a map all the way, or not that of the image alone."""
    if backbone.latent:
        check_places(backbone, who)
    if backbone.wrapper is not None:
        name = type(backbone.wrapper).__name__
        raise UserError(f"{who}: maps are those of a model alone, got the wrapper {name}; leave wrapper= out")
    if backbone.reducers is not None:
        names = ", ".join(sorted({type(reducer).__name__ for reducer in backbone.reducers.values()}))
        raise UserError(f"{who}: maps need all tokens, got the reducer {names}; leave reducer= out")


def check_places(model: nn.Module, who: str) -> None:
    """Refuses a model whose mixers see latents."""
    if getattr(model, "mixes_latents", False):
        raise UserError(
            f"{who}: tokens in their places on the image are needed, got {type(model).__name__}, which mixes latents; "
            "choose another model"
        )


def pair(image_size: int | Sequence[int], name: str = "image_size") -> tuple[int, int]:
    """Height and width in pixels, from one number or two."""
    sides = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise UserError(f"{name}: must be pixels, one positive number or two, got {image_size!r}; e.g. {name}=224")
    return sides


def check_counts(who: str, **values: int) -> None:
    """Refuses counts that are no whole numbers of at least 1."""
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"{who}: {name} must be a whole number of at least 1, got {value!r}; set model.{name}")
