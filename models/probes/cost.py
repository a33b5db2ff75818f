"""What each stage and block of a model costs: parameters, multiply-adds and activations of one image."""

from typing import Any

from torch import nn

from models.attention.parts import places
from models.cost import costs_of_modules, parameters
from models.probes import Report, Subject

DEPTH = 2  # lists within lists: stages, and their blocks


def cost(network: nn.Module, subject: Subject, blocks: bool = True) -> Report:
    """A row for every part of the model, every stage and every block.

    Activations are the numbers that convolutions and linear layers give, as timm and fvcore count them.

    Args:
        network, subject: see `models.probes`.
        blocks: those of every stage too.
    """
    size = subject.config["image_size"]
    size = [size, size] if isinstance(size, int) else list(size)
    counted, modules = costs_of_modules(network, size), dict(network.named_modules())
    rows = [_row(path, modules[path], *counted[path]) for path in places(network, DEPTH if blocks else 1)]
    rows = [row for row in rows if row["parameters"] or row["multiply_adds"]]
    flops, activations = counted[""]
    figures = {"parameters": parameters(network), "flops": flops, "activations": activations}
    total = {"whole model": _shown(figures["parameters"], flops, activations)}
    shown = {_indented(row["part"]): _shown(*list(row.values())[2:]) for row in rows}
    said = f"of one image of {size[0]} x {size[1]}: parameters, multiply-adds, activations"
    return Report(figures, total | shown, tables={"parts": rows}, lines=[said])


def _row(path: str, module: nn.Module, flops: int, activations: int) -> dict[str, Any]:
    kind = type(module).__name__
    return {
        "part": path,
        "kind": kind,
        "parameters": parameters(module),
        "multiply_adds": flops,
        "activations": activations,
    }


def _indented(path: str) -> str:
    numbers = sum(word.isdigit() for word in path.split("."))
    return f"{'  ' * max(numbers - 1, 0)}{path}"


def _shown(parameters: int, flops: int, activations: int) -> str:
    return f"{parameters / 1e6:8.3f} M  {flops / 1e9:8.4f} G  {activations / 1e6:8.3f} M"
