"""What a gate returns, and what parts of a model hand on from block to block.

A part with `carries` is called with `carry=`, what the part of its class returned in the block before (None in the
first), and returns the next in its result. All that is carried goes through blocks and stages in one dict of plain
tensors: in and out of each call, never kept, so that a recomputed block sees what it saw.

Shapes: B = batch, N = prefix + H·W tokens, C = channels.
"""

from typing import Any, NamedTuple

from torch import Tensor, nn

Carry = dict[str, Any]  # by what carries: a tensor, or a tuple or dict of tensors
OPEN = "open cells"  # carried: which cells of the map others may see, (B, H·W), bool, or shares in 0 … 1


class Gated(NamedTuple):
    """What a gate `(x_BNC, grid, carry=None)` returns."""

    x: Tensor  # (B, N, C), as the input
    losses: dict[str, Tensor]  # scalar auxiliary losses with gradient, by name; {} when there are none
    carry: Any = None  # for the same gate of the next block


class Gate(nn.Module):
    """What weights tokens behind a mixer, an MLP or a block: `gate(x_BNC, grid) -> Gated`, for any grid and batch size.

    Prefix tokens pass, unless a gate says otherwise.

    Args:
        site: the `Site` of the mixer of the block that it is built for, kept as `site`.

    Attributes:
        at: where a block has it if nothing else is chosen: "mixer", "mlp" or "block".
        carries, carries_across_stages: as those of `models.attention.Mixer`.
        ignores_grid: whether its result depends on the tokens alone, however they are laid out.
        undecayed: names of parameters without weight decay, besides biases and others of one dimension.
    """

    at = "mixer"
    carries = False
    carries_across_stages = False
    ignores_grid = False
    undecayed: tuple[str, ...] = ()

    def __init__(self, site: Any) -> None:
        super().__init__()
        self.site = site


def given(part: nn.Module, carry: Carry | None) -> Carry:
    """What a mixer or a gate is called with besides: `carry`, if it carries; `open_BN`, if it can close keys."""
    carry = carry or {}
    named = {"carry": carry.get(_name(part))} if part.carries else {}
    return {**named, "open_BN": carry[OPEN]} if OPEN in carry and getattr(part, "closes_keys", False) else named


def handed(part: nn.Module, result: Any, carry: Carry | None) -> Carry:
    """What is carried on behind a mixer or a gate that returned this."""
    return {**(carry or {}), _name(part): result.carry} if part.carries else carry or {}


def _name(part: nn.Module) -> str:
    """By which the next part of its class finds what it carries, in another stage only if it goes on there."""
    return type(part).__name__ + ("" if part.carries_across_stages else f" of stage {part.site.stage}")


def gated(block: nn.Module, at: str, x_BNC: Tensor, grid: tuple, losses: dict[str, Tensor], carry: Carry) -> tuple:
    """Tokens, losses and what is carried, behind the gate of the block if this is where it stands."""
    gate = block.gate
    if gate is None or block.gate_at != at:
        return x_BNC, losses, carry
    result = gate(x_BNC, grid, **given(gate, carry))
    # losses of one name are summed
    more = {name: losses[name] + loss if name in losses else loss for name, loss in result.losses.items()}
    return result.x, {**losses, **more}, handed(gate, result, carry)


def carries(*parts: nn.Module | None) -> bool:
    """Whether any of the parts of a block is given what that of the block before returned."""
    return any(part is not None and part.carries for part in parts)
