"""Where a model of timm calls its attention, and how one of our mixers takes that place.

A ViT's blocks call a mixer as they called their attention: a hook adds the map, which another hook notes where the
images become patches, and a third hands the tokens on. A Swin's block cuts windows before it calls its attention, so
the block is replaced too, by one that gives the mixer the whole map. Either way all names stay, and so does the order.

Shapes: B = batch, N = prefix + H·W tokens, C = channels.
"""

from typing import Any, NamedTuple

from timm.layers import Attention as ViTAttention
from timm.models.swin_transformer import SwinTransformer, WindowAttention
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from conf.errors import UserError
from models.attention import Grid, Mixed, Mixer, Refused, Site


class Origin(NamedTuple):
    """What the attention of the timm model was like; a mechanism that has these options follows it."""

    head_dim: int
    qkv_bias: bool
    qk_norm: bool


class Place(NamedTuple):
    """One attention of a model."""

    name: str
    site: Site
    block: nn.Module  # which calls it
    attention: nn.Module


def places(model: nn.Module) -> list[Place]:
    """Every attention of a model of timm, in order.

    Raises:
        ValueError: another class of model, or blocks of another kind.
    """
    if isinstance(model, VisionTransformer):
        grid, depth = Grid(*model.patch_embed.grid_size, prefix=model.num_prefix_tokens), len(model.blocks)
        return [
            _place(f"blocks.{b}", block, model.embed_dim, grid, 0, b, depth, "vit")
            for b, block in enumerate(model.blocks)
        ]
    if isinstance(model, SwinTransformer):
        return [
            _place(
                f"layers.{s}.blocks.{b}", block, block.dim, Grid(*block.input_resolution), s, b, len(stage.blocks),
                "hierarchical",
            )
            for s, stage in enumerate(model.layers)
            for b, block in enumerate(stage.blocks)
        ]  # fmt: skip
    raise UserError(
        "replace: the model must be a VisionTransformer (ViT, DeiT) or a SwinTransformer of timm, got "
        f"{type(model).__name__}; give such a model as timm.create_model makes it, not compiled or wrapped"
    )


def _place(name: str, block: nn.Module, dim: int, grid: Grid, *position: Any) -> Place:
    attention = getattr(block, "attn", None)
    if attention is None:
        raise UserError(
            f"replace: every block must have one attention, got a {type(block).__name__} as {name}; "
            "choose a model with timm's plain Block, e.g. deit_small_patch16_224"
        )
    heads = attention.site.num_heads if isinstance(attention, Mixer) else getattr(attention, "num_heads", 0)
    return Place(f"{name}.attn", Site(dim, heads, grid, *position), block, attention)


def origin(model: nn.Module, place: Place) -> Origin:
    """What a new mixer has to follow.

    Raises:
        Refused: it has something that no mechanism of ours has.
    """
    attention = place.attention
    if isinstance(attention, Mixer):  # one of ours, put here before
        return place.block.origin if isinstance(place.block, MapBlock) else _maps(model).origins[place.name]
    if type(attention) not in (ViTAttention, WindowAttention):
        raise Refused(
            f"its attention is a {type(attention).__name__}, not the plain one of timm", "choose another model"
        )
    lost = {
        "attn_drop_rate": attention.attn_drop.p > 0,
        "proj_drop_rate": attention.proj_drop.p > 0,
        "patch_drop_rate": getattr(getattr(model, "patch_drop", None), "prob", 0) > 0,
        "scale_attn_norm": _present(attention, "norm"),
        "gated": _present(attention, "gate"),
    }
    if any(lost.values()):
        raise Refused(
            f"the model has {' and '.join(name for name, found in lost.items() if found)}, which is not kept",
            "create it without",
        )
    qkv = attention.qkv
    head_dim = qkv.out_features // (3 * attention.num_heads)
    return Origin(head_dim, qkv.bias is not None, _present(attention, "q_norm"))


def _present(attention: nn.Module, name: str) -> bool:
    return not isinstance(getattr(attention, name, None), nn.Identity | None)


def call(place: Place, x_BNC: Tensor) -> Tensor:
    """What the attention at this place gives for tokens of the map of its site, (B, N, C)."""
    if isinstance(place.attention, Mixer):
        return place.attention.forward(x_BNC, place.site.grid).x  # without the hooks
    if isinstance(place.attention, WindowAttention):
        return place.block._attn(x_BNC.unflatten(1, place.site.grid[:2])).flatten(1, 2)
    return place.attention(x_BNC)


def put(model: nn.Module, place: Place, mixer: nn.Module, origin: Origin) -> None:
    """The mixer in the place of the attention; what it replaces can be replaced once more."""
    if isinstance(model, SwinTransformer):
        model.layers[place.site.stage].blocks[place.site.block] = MapBlock(place.block, mixer, origin)
        return
    maps = _maps(model)
    if maps is None:
        maps = Maps(model.num_prefix_tokens)
        model.patch_embed.register_forward_hook(maps)
    maps.origins[place.name] = origin
    mixer.register_forward_pre_hook(maps.hand, with_kwargs=True)
    mixer.register_forward_hook(_tokens)
    place.block.attn = mixer


def is_of_timm(model: nn.Module) -> bool:
    """Whether it is, or holds, a model that `places` knows."""
    return any(isinstance(module, VisionTransformer | SwinTransformer) for module in model.modules())


def _maps(model: VisionTransformer) -> "Maps | None":
    return next((hook for hook in model.patch_embed._forward_hooks.values() if isinstance(hook, Maps)), None)


class Maps:
    """The maps that a ViT's images have become: noted behind its patch embedding, handed to its mixers.

    A map is found again by its number of tokens, so that gradient checkpointing may run a block once more after a
    forward pass of another size. Two sizes with equally many tokens, say 8x12 and 12x8 patches, must then not be on
    their way at the same time. `origins` has what each mixer followed, by the name of its place.
    """

    def __init__(self, prefix: int) -> None:
        self.prefix, self.grids, self.origins = prefix, {}, {}

    def __call__(self, embed: nn.Module, images: tuple[Tensor], patches: Tensor) -> None:
        # a model of one size gives (B, H·W, C)
        height, width = patches.shape[1:3] if patches.ndim == 4 else embed.grid_size
        # Dynamo of torch 2.10 takes no property of a tuple as a key
        self.grids[self.prefix + height * width] = Grid(height, width, self.prefix)

    def hand(self, mixer: nn.Module, arguments: tuple, options: dict[str, Any]) -> tuple[tuple, dict]:
        """What timm's block calls its attention with, as a mixer is called."""
        (x_BNC,) = arguments
        who, tokens = f"replace: {type(mixer).__name__}", x_BNC.shape[1]
        if options.get("attn_mask") is not None or options.get("is_causal"):
            raise UserError(f"{who} has no masks, got attn_mask or is_causal; call the model without")
        if tokens not in self.grids:
            raise UserError(f"{who} must know the map, got {tokens} tokens of none; call the whole model on images")
        return (x_BNC, self.grids[tokens]), {}


def _tokens(mixer: nn.Module, arguments: tuple, mixed: Mixed) -> Tensor:
    return mixed.x


class MapBlock(nn.Module):
    """timm's Swin block, with a mixer that is given the whole map (B, H, W, C) and its true size."""

    def __init__(self, block: nn.Module, mixer: nn.Module, origin: Origin) -> None:
        super().__init__()
        self.origin = origin
        for name, part in block.named_children():  # in their order, by which optimizers number the parameters
            self.add_module(name, mixer if name == "attn" else part)
        self.training, self.dim, self.input_resolution = block.training, block.dim, block.input_resolution

    def forward(self, x_BHWC: Tensor) -> Tensor:
        _, height, width, _ = x_BHWC.shape
        mixed = self.attn(self.norm1(x_BHWC).flatten(1, 2), Grid(height, width))
        x = x_BHWC + self.drop_path1(mixed.x.view_as(x_BHWC))
        return x + self.drop_path2(self.mlp(self.norm2(x)))

    def set_input_size(self, feat_size: tuple[int, int], window_size: Any, always_partition: Any = None) -> None:
        """timm's; a mixer takes any map as it is, and its own windows keep their size."""
        self.input_resolution = feat_size
