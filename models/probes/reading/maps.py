"""The maps of a model, of its tokens behind each block, for methods that look at convolutional maps.

Shapes: B = batch, N = prefix + H·W tokens, C = channels.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from conf.errors import UserError
from conf.names import nearest
from conf.values import is_whole
from models.backbones.base import Backbone, check_maps
from models.layers.grid import Grid
from models.layers.tokens import to_map, to_tokens
from models.pools.class_token import ClassToken


def places_of(who: str, model: nn.Module) -> dict[str, nn.Module]:
    """The blocks of a model by name, in order: those whose map the class depends on; of timm's what it calls features.

    Where a class token alone is read, this is not the last one.

    Raises:
        UserError: it has no such maps.
    """
    found = _all_places(who, model)
    if _reads_class_token(model):
        found.popitem()
    if not found:
        raise UserError(
            f"{who}: behind the only block the class token alone is read, got a {type(model).__name__} of depth 1; "
            "choose probe=integrated_gradients"
        )
    return found


def check_classifies(who: str, model: nn.Module) -> None:
    """Refuses a model that does not name the class of an image.

    Raises:
        UserError: it generates images.
    """
    if getattr(model, "generates", False):
        raise UserError(f"{who}: {type(model).__name__} generates images and names no class; choose a classifier")


def _all_places(who: str, model: nn.Module) -> dict[str, nn.Module]:
    check_classifies(who, model)
    if isinstance(model, Backbone):
        check_maps(model, who)
        stages = enumerate(model.stages)
        return {f"stages.{s}.blocks.{b}": block for s, stage in stages for b, block in enumerate(stage.blocks)}
    modules = dict(model.named_modules())
    names = [info["module"] for info in getattr(model, "feature_info", None) or ()]
    found = {name: modules[name] for name in names if name in modules}
    if not found:
        raise UserError(
            f"{who}: it looks at maps of a backbone, and {type(model).__name__} says of none where they are; "
            "choose probe=integrated_gradients"
        )
    return found


def _reads_class_token(model: nn.Module) -> bool:
    """Whether the class depends on a class token alone, behind the last block."""
    if isinstance(model, Backbone):
        return model.grids[-1].prefix > 0 and (model.pooling is None or isinstance(model.pooling, ClassToken))
    return getattr(model, "global_pool", None) == "token"


def chosen_places(who: str, model: nn.Module, layers: Any) -> dict[str, nn.Module]:
    """Some of `places_of`, in order.

    Args:
        who: names the probe.
        model: any.
        layers: "all", "last", "stages" (the last of each), the number of a block from 0, from the last with a minus,
            its name, or a list of such.

    Raises:
        UserError: no such map.
    """
    places = places_of(who, model)
    if isinstance(layers, str) and layers in ("all", "stages"):
        ends = {name.partition(".blocks")[0]: name for name in places}
        return places if layers == "all" else {name: places[name] for name in ends.values()}
    asked = [layers] if isinstance(layers, str) or not isinstance(layers, Sequence) else list(layers)
    names = {_name(who, layer, list(places), model) for layer in asked}
    if not names:
        raise UserError(f"{who}: no layer is named, got layers=[]; set probe.layers=last")
    return {name: block for name, block in places.items() if name in names}


def _name(who: str, layer: Any, names: list[str], model: nn.Module) -> str:
    if layer == "last":
        return names[-1]
    if is_whole(layer, -len(names)) and layer < len(names):
        return names[layer]
    if isinstance(layer, str) and layer in names:
        return layer
    if isinstance(layer, str) and layer in _all_places(who, model):
        raise UserError(
            f"{who}: behind {layer} the class token alone is read, so its map has no part in the class; "
            f"set probe.layers={names[-1]}"
        )
    raise UserError(
        f"{who}: there is no layer {layer!r}{nearest(str(layer), names)}; set probe.layers to last, all, stages, a "
        f"number up to {len(names) - 1}, or a name up to {names[-1]}"
    )


@contextmanager
def maps_through(model: nn.Module, blocks: dict[str, nn.Module]) -> Iterator[dict[str, nn.Identity]]:
    """Inside, the map (B, C, H, W) behind each of these blocks passes through an identity, where hooks may see it."""
    places = {name: nn.Identity() for name in blocks}
    handles = [block.register_forward_hook(partial(_through, places[name], model)) for name, block in blocks.items()]
    try:
        yield places
    finally:
        for handle in handles:
            handle.remove()


def _through(place: nn.Module, model: nn.Module, block: nn.Module, given: tuple, result: Any) -> Any:
    """Class tokens go past it."""
    if not isinstance(result, Tensor):
        return (_tokens_through(place, result[0], given[1]), *result[1:])
    if result.dim() == 3:
        grid = Grid(*model.patch_embed.grid_size)
        return _tokens_through(place, result, grid._replace(prefix=result.shape[1] - grid.cells))
    if str(getattr(model, "output_fmt", "NCHW")).endswith("NHWC"):
        return place(result.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    return place(result)


def _tokens_through(place: nn.Module, x_BNC: Tensor, grid: Grid) -> Tensor:
    return to_tokens(place(to_map(x_BNC, grid)), x_BNC[:, : grid.prefix])
