"""Where a gate goes: into every block with a place for it, behind the mixer, behind the MLP or behind the block.

Blocks with a mixer have one, and those of a ResNet, where "behind the mixer" is the end of the branch.
"""

from collections.abc import Callable

from torch import nn

from conf import values
from conf.errors import UserError
from models.attention import Refused, Site, misfits
from models.layers.gated import Gate

PLACES = ("mixer", "mlp", "block")


def put_gates(model: nn.Module, gate: Callable[[Site], Gate] | None, at: str | None = None) -> None:
    """A gate in every block that has a place for it; it knows the site of the mixer of the block, or its `gate_site`.

    Args:
        model: a backbone.
        gate: makes the gate of a site; None for the `branch_gate` of the model, if it has one.
        at: one of `PLACES`; None for the place that the gate says.

    Raises:
        ValueError: no gate, another place, no block that has it, or one line per site that the gate refuses.
    """
    gate = getattr(model, "branch_gate", None) if gate is None else gate
    if gate is None and at is None:
        return
    if at is not None:
        values.choice("gate", "gate_at", at, PLACES, fix="set model.gate_at, or null for where its paper has it")
    if gate is None:
        raise UserError(f"gate: gate_at needs a gate to be put there, got gate_at={at} alone; choose one with gate=")
    blocks = [block for stage in model.stages for block in stage.blocks if hasattr(block, "gate_at")]
    problems, placed = [], []
    for block in blocks:
        site = getattr(block, "gate_site", None) or block.attn.site
        try:
            made = _made(gate, site)
        except Refused as refusal:
            problems.append((site, refusal))
            continue
        place = at or made.at
        if place != "mlp" or block.mlp is not None:
            placed.append((block, made, place))
    if problems:
        raise UserError(misfits("gate", "gate", problems, len(blocks)))
    if any(made.carries and place != "block" and getattr(b, "wiring", "") == "rk4" for b, made, place in placed):
        raise UserError(
            f"gate: what {type(placed[0][1]).__name__} carries has no order in four evaluations, got wiring=rk4; set "
            "model.wiring=sequential, or model.gate_at=block"
        )
    for block, made, place in placed:
        block.gate, block.gate_at = made, place
    if not placed:
        lacks = "an MLP" if blocks else "a mixer, which gates need"
        raise UserError(f"gate: no block of {type(model).__name__} has {lacks}, got gate_at={at}; choose another model")


def _made(gate: Callable[[Site], Gate], site: Site) -> Gate:
    made = gate(site)
    if not isinstance(made, Gate):
        raise Refused(f"{type(made).__name__} is no `Gate`", "see models/layers/gated.py")
    return made
