"""How far the layers of a model are from those of another one with the same places, which of two terms may be asked.

Shapes: B = batch, N = tokens, C = channels, M = heads, S = keys.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conf.errors import UserError
from models.attention import Mixed, Mixer, mixers_of
from models.attention.recording import Call, recorded

EPS = 1e-12  # below any weight that attention gives in float32 to a key that matters


class Followed(NamedTuple):
    """What mixers were given and what they gave, by their names."""

    calls: dict[str, Call]
    outputs: dict[str, Tensor]


@contextmanager
def followed(model: nn.Module) -> Iterator[Followed]:
    """Inside, a forward pass notes inputs and outputs of every outermost mixer, in its graph."""
    outputs: dict[str, Tensor] = {}

    def note(name: str, mixer: nn.Module, given: tuple[Any, ...], mixed: Mixed) -> None:
        outputs[name] = mixed.x

    with recorded(model) as calls:
        handles = [mixer.register_forward_hook(partial(note, name)) for name, mixer in mixers_of(model)]
        try:
            yield Followed(calls, outputs)
        finally:
            for handle in handles:
                handle.remove()


def layers_apart(
    term: str, original: nn.Module, model: nn.Module, theirs: Followed, own: Followed | None = None
) -> dict[str, Tensor]:
    """How far each layer of the model is from that of the original, by its name: scalars.

    Args:
        term: `rows`, KL of the rows of attention, or `outputs`, the mean square of what mixers give.
        original, model: with the same places.
        theirs: a pass of the original.
        own: one of the model; None: its layers are given the tokens of the original.
    """
    apart, places = {}, dict(mixers_of(original))
    for name, mixer in mixers_of(model):
        given = theirs.calls[name]
        taken = given if own is None else own.calls[name]
        if term == "rows":
            with torch.no_grad():
                p_BMNS = places[name].attention_matrix(*given)
            apart[name] = divergence(p_BMNS, mixer.attention_matrix(*taken))
        else:
            o_BNC = mixer(*taken).x if own is None else own.outputs[name]
            apart[name] = F.mse_loss(o_BNC.float(), theirs.outputs[name].float())
    return apart


def divergence(p_BMNS: Tensor, q_BMNS: Tensor) -> Tensor:
    """KL(p ‖ q) of rows that sum to one, in float32; the mean over all rows."""
    p, q = (rows.float().clamp(min=EPS) for rows in (p_BMNS, q_BMNS))
    return (p * (p.log() - q.log())).sum(-1).mean()


def check_places(original: nn.Module, model: nn.Module) -> None:
    """Refuses another backbone, or one for other tokens.

    Raises:
        ValueError: naming what both are.
    """
    theirs, mine = dict(mixers_of(original)), dict(mixers_of(model))
    kinds = [f"{type(net).__name__} with {len(dict(mixers_of(net)))} layers" for net in (original, model)]
    alike = theirs.keys() == mine.keys() and all(theirs[name].site.dim == mine[name].site.dim for name in mine)
    if type(original) is not type(model) or not alike or not mine:
        raise UserError(
            f"task: match needs the same backbone with attention, got {kinds[0]} in the original and {kinds[1]}; "
            "set task.match.original to what the model was converted from"
        )
    for name in mine:
        grids = [tuple(mixers[name].site.grid) for mixers in (theirs, mine)]
        if grids[0] != grids[1]:
            raise UserError(
                f"task: match needs the same tokens, got (height, width, prefix) {grids[0]} in the original and "
                f"{grids[1]} in {name}; set image_size to that of the original"
            )


def check_layers(original: nn.Module, model: nn.Module, rows: bool, alone: bool) -> None:
    """Refuses mechanisms whose layers cannot be compared.

    Args:
        original, model: with the same places.
        rows: their rows are compared.
        alone: a layer of the model is called with the tokens of the original.

    Raises:
        ValueError: naming the layer and the settings that mend it.
    """
    theirs = dict(mixers_of(original))
    for name, mine in mixers_of(model):
        for mixer in (theirs[name], mine):
            who = f"{type(mixer).__name__} in {name}"
            if (alone or rows) and (mixer.reads_stream or mixer.carries):
                raise UserError(
                    f"task: match calls single layers, got {who}, which needs more than its tokens; set "
                    "task.match.tokens=own task.match.rows=0"
                )
            if rows and not (mixer.has_matrix and mixer.row_stochastic):
                raise UserError(
                    f"task: match.rows needs weights of attention that sum to one, got {who}, which has none; set "
                    "task.match.rows=0 task.match.outputs=1"
                )
        shapes = [_shape_of_rows(mixer) for mixer in (theirs[name], mine)] if rows else [()]
        if shapes[0] != shapes[-1]:
            raise UserError(
                f"task: match.rows needs the same heads and keys, got rows (1, heads, tokens, keys) of {shapes[0]} in "
                f"the original and {shapes[1]} in {name}; set task.match.rows=0 task.match.outputs=1"
            )


def _shape_of_rows(mixer: Mixer) -> tuple[int, ...]:
    """Of one image at the site."""
    weight = next(mixer.parameters())
    x_BNC = torch.zeros(1, mixer.site.grid.tokens, mixer.site.dim, device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        return tuple(mixer.attention_matrix(x_BNC, mixer.site.grid).shape)
