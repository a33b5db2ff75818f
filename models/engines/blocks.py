"""The blocks of a model, whatever family it is of: what is gathered, computed and given back one after the other."""

from collections import Counter
from collections.abc import Iterator

from torch import nn

from models.layers.block import Stage


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Modules that are called one after the other, none inside of another.

    Of ours those of the stages; of other models, such as timm's, the members of lists of two or more modules of one
    class. A block that has a weight in common with something outside of it is left out.
    """
    stages = [module for module in model.modules() if isinstance(module, Stage)]
    found = [block for stage in stages for block in stage.blocks] if stages else list(_repeated(model))
    everywhere = _uses(model)
    return [block for block in found if all(everywhere[weight] == uses for weight, uses in _uses(block).items())]


def _repeated(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        inner = list(_repeated(child))
        members = list(child) if isinstance(child, nn.ModuleList | nn.Sequential) else []
        alike = len(members) > 1 and len({type(member) for member in members}) == 1
        if not inner and alike and all(list(member.children()) for member in members):
            yield from members
        else:
            yield from inner


def _uses(module: nn.Module) -> Counter[int]:
    """How often each weight is there."""
    return Counter(id(weight) for _, weight in module.named_parameters(remove_duplicate=False))
