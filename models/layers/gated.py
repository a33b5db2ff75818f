"""What a gate returns, and what parts of a model hand on from block to block.

A part with `carries` is called with `carry=`, what the part of its class returned in the block before (None in the
first), and returns the next in its result. All that is carried goes through blocks and stages in one dict of plain
tensors: in and out of each call, never kept, so that a recomputed block sees what it saw.

Shapes: B = batch, N = prefix + H·W tokens, C = channels.
"""

from typing import Any, NamedTuple

from torch import Tensor, nn

Carry = dict[str, Any]  # by what carries: a tensor, or a tuple of tensors


class Gated(NamedTuple):
    """What a gate `(x_BNC, grid, carry=None)` returns."""

    x: Tensor  # (B, N, C), as the input
    losses: dict[str, Tensor]  # scalar auxiliary losses with gradient, by name; {} when there are none
    carry: Any = None  # for the same gate of the next block


def call(part: nn.Module, carry: Carry | None, *inputs: Any, **given: Any) -> tuple[Tensor, dict[str, Tensor], Carry]:
    """Tokens, losses and what is carried behind a mixer or a gate, `part(*inputs, **given)`."""
    carry = carry or {}
    if not part.carries:
        result = part(*inputs, **given)
        return result.x, result.losses, carry
    # a part of another stage finds nothing, unless it says that it goes on there
    name = type(part).__name__ + ("" if part.carries_across_stages else f" of stage {part.site.stage}")
    result = part(*inputs, carry=carry.get(name), **given)
    return result.x, result.losses, {**carry, name: result.carry}


def gated(block: nn.Module, at: str, x_BNC: Tensor, grid: tuple, losses: dict[str, Tensor], carry: Carry) -> tuple:
    """What `call` gave of a mixer, behind the gate of the block if that is where it stands."""
    if block.gate is None or block.gate_at != at:
        return x_BNC, losses, carry
    x, more, carry = call(block.gate, carry, x_BNC, grid)
    # losses of one name are summed
    summed = {name: losses[name] + loss if name in losses else loss for name, loss in more.items()}
    return x, {**losses, **summed}, carry


def carries(*parts: nn.Module | None) -> bool:
    """Whether any of the parts of a block is given what that of the block before returned."""
    return any(part is not None and part.carries for part in parts)
