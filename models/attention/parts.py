"""The parts of a model by their paths: stem, stages, blocks, head."""

from collections.abc import Iterator

from torch import nn

LISTED = (nn.ModuleList, nn.Sequential)


def places(module: nn.Module, depth: int, path: str = "") -> Iterator[str]:
    """Paths of the parts of a module; those in lists one by one, 2 deep for stages and blocks."""
    for name, child in module.named_children():
        place = f"{path}{name}"
        items = list(child.named_children()) if isinstance(child, LISTED) else []
        if not (isinstance(child, nn.ModuleList) or (items and depth and _is_list_of_stages(child))):
            yield place
            continue
        for number, item in items:
            yield f"{place}.{number}"
            if depth > 1:
                yield from _inside(item, f"{place}.{number}.")


def _inside(stage: nn.Module, path: str) -> Iterator[str]:
    """The blocks of a stage, where it has a list of them; nothing of a block."""
    for name, child in stage.named_children():
        if isinstance(child, LISTED) and name in ("blocks", "layers"):
            yield from (f"{path}{name}.{number}" for number, _ in child.named_children())


def _is_list_of_stages(module: nn.Module) -> bool:
    return any(isinstance(part, LISTED) for child in module.children() for part in child.children())
