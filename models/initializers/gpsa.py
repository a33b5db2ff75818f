"""The convolutional start of ConViT, as far as mixers without its gated positional attention can have it.

Source: ConViT: Improving Vision Transformers with Soft Convolutional Inductive Biases, d'Ascoli et al., ICML 2021,
arXiv:2103.10697, section 3 and appendix: values are the input (W_V = I), and head h looks at the cell that is Δ_h away,
for the k² offsets of a k×k kernel, k = ⌊√M⌋, by logits −locality · ‖δ − Δ_h‖² of the offset δ of a key.
What a mixer can take of it:
- W_V = I wherever there are `qkv` and `proj` of as many inner as outer channels;
- the logits where it has a learned table of relative positions, to which they are given: there they are added to those
  of queries and keys, which start small, in place of being mixed with them behind two softmaxes by a learned gate;
- the gate λ never: that is the mechanism `attention=gpsa`, whose heads look at their cells by themselves.
Without a table the start is W_V = I alone.
Shapes: C = channels, M = heads, D = channels per head.
"""

import math

import torch
from torch import nn

from conf import values
from conf.errors import UserError
from models.attention.cores.gpsa import GatedPositionalCore
from models.attention.projections import projections
from models.attention.softmax import RelativePositionBias


@torch.no_grad()
def gpsa(model: nn.Module, *, locality: float = 1.0, only_gated: bool = False) -> None:
    """Sets values, and tables of relative positions where there are some, of every mixer of a built model.

    Args:
        model: a built model.
        locality: how sharply a head looks at its cell.
        only_gated: leave mixers alone that are no gated positional attention, as in ConViT the last blocks.

    Raises:
        ValueError: an option that is none, or a mixer without such projections, or of other channels.
    """
    values.flag("gpsa", "only_gated", only_gated, fix="set initializer.only_gated=true or false")
    if isinstance(locality, bool) or not isinstance(locality, int | float) or not 0 < locality < float("inf"):
        raise UserError(f"gpsa: locality must be a number above 0, got {locality!r}; set initializer.locality")
    places = projections(model, "gpsa", "initializer")
    if only_gated:
        places = [place for place in places if any(isinstance(m, GatedPositionalCore) for m in place.mixer.modules())]
    for place in places:
        if place.inner != place.qkv.in_features:
            raise UserError(
                f"gpsa: values start as the tokens, so heads must have as many channels together, got {place.inner} "
                f"and {place.qkv.in_features} in {place.name}; leave attention.head_dim out, or set initializer=none"
            )
    for place in places:
        place.qkv.weight[2 * place.inner :] = torch.eye(place.inner)
        for table in (m for m in place.mixer.modules() if isinstance(m, RelativePositionBias)):
            _look_around(table, locality)


def _look_around(bias: RelativePositionBias, locality: float) -> None:
    """Head h₁ + k·h₂ looks at (row, column) = (h₁ − c, h₂ − c), c = (k − 1) / 2; heads beyond k² stay as they are."""
    (height, width), heads = bias.window, bias.table.shape[1]
    # the table goes by query less key
    rows, columns = (-torch.arange(1 - side, side, dtype=bias.table.dtype) for side in (height, width))
    side = math.isqrt(heads)
    for head in range(side * side):
        column, row = (position - (side - 1) / 2 for position in divmod(head, side))
        distance = (rows[:, None] - row) ** 2 + (columns - column) ** 2
        bias.table[:, head] = -locality * distance.flatten()
