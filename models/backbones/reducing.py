"""Reducers between the blocks of a plain ViT, and who may stand behind one."""

from collections.abc import Callable

from torch import nn

from conf.errors import UserError
from models.layers.reduced import Reducer

FIX = "choose one that takes them as they come, such as attention=softmax or gate=eca, or leave reducer= out"


def put_reducers(model: nn.Module, reducer: Callable[..., Reducer | None] | None) -> None:
    """Reducers in front of quarters of the blocks; None for as it is.

    Args:
        model: a built model; behind the first reducer its tokens make up no map.
        reducer: makes one of (channels, map, quarter), or None where there is to be none.

    Raises:
        ValueError: a model that is no plain ViT for classes, or a mixer or gate behind a reducer that needs the map.
    """
    if reducer is None:
        return
    who = type(model).__name__
    latent = getattr(model, "mixes_latents", False)
    if getattr(model, "generates", False) or latent or len(set(model.strides)) > 1:
        need = "every token comes out of it" if getattr(model, "generates", False) else "its stages change the map"
        need = "some tokens are latents" if latent else need
        raise UserError(
            f"reducer: it stands between blocks of a plain ViT, got {who}, where {need}; choose a vit model"
        )
    places = range(1, len(model.stages))
    made = {s: reducer(model.channels[s], model.grids[s], s) for s in places}
    made = {str(s): module for s, module in made.items() if module is not None}
    for s in range(min(map(int, made)), len(model.stages)):
        for number, block in enumerate(model.stages[s].blocks):
            _check(block, f"block {number} of quarter {s}")
    model.reducers = nn.ModuleDict(made)


def _check(block: nn.Module, where: str) -> None:
    """Refuses a block that does something with the map."""
    places = {"attn": "attention", "gate": "gate", "position": "position", "mlp_position": "position"}
    for place, name in places.items():
        part = getattr(block, place, None)
        if part is not None and not getattr(part, "ignores_grid", False):
            raise UserError(
                f"reducer: behind it tokens make up no map, which the {name} needs, got it in {where}; {FIX}"
            )
