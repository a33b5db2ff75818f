"""What comes out of the blocks of a model in a forward pass."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from conf.errors import UserError


def blocks_of(who: str, model: nn.Module) -> dict[str, nn.Module]:
    """Its blocks by name, in order; of a model of timm the parts that it takes features from.

    Raises:
        UserError: the model has neither.
    """
    names = [f"stages.{s}.blocks.{i}" for s, stage in enumerate(getattr(model, "stages", ())) for i in _blocks(stage)]
    if not names or not hasattr(model, "stem"):
        names = [entry["module"] for entry in getattr(model, "feature_info", ()) if entry.get("module")]
    known = dict(model.named_modules())
    found = {name: known[name] for name in dict.fromkeys(names) if name in known}
    if not found:
        raise UserError(f"{who}: {type(model).__name__} has no blocks that can be told; choose a model of ours")
    return found


def short(name: str) -> str:
    """As charts have room for it: 2.0 of stages.2.blocks.0."""
    return name.removesuffix(".attn").replace("stages.", "").replace(".blocks.", ".")


def _blocks(stage: nn.Module) -> range:
    return range(len(getattr(stage, "blocks", ())))


@contextmanager
def outputs(modules: dict[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Inside, forward passes note what these modules give, by their names; of a tuple the first. The last pass counts.

    Models that `compile=true` compiles must be called by `model.forward`, which is not compiled.
    """
    found: dict[str, Tensor] = {}
    handles = [module.register_forward_hook(partial(_note, found, name)) for name, module in modules.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _note(found: dict[str, Tensor], name: str, module: nn.Module, given: Any, output: Any) -> None:
    found[name] = output[0] if isinstance(output, tuple) else output
