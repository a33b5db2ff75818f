"""Sparsifiner: softmax attention of every query on the few keys that a predictor chooses for it.

Source: Sparsifiner: Learning Sparse Instance-Dependent Attention for Efficient Vision Transformers, Wei et al., CVPR
2023, arXiv:2303.13755; the predictor, its two phases and its loss: `models.attention.layouts.predicted`.
Shapes: B = batch, N = tokens, M = heads, D = channels per head.
The authors' pruning of tokens is left out; here the weights of a token on all others are computed, then masked, as in
their training. In the first phase they compare scores with the attention of a teacher that starts as the model; here
they are compared with the model's own, as in their self-distillation.
"""

from typing import Any, Unpack

from conf import values
from conf.errors import UserError
from models.attention.contract import Grid, Mixer, Refused, Site
from models.attention.contract.options import check_flags, check_whole
from models.attention.layouts.predicted import MaskPredictor, Predicted, Rule
from models.attention.softmax import SoftmaxParts, softmax_attention

WHO = "sparsifiner"
PHASES = ("masked", "reconstruction")


def sparsifiner_attention(
    site: Site,
    *,
    keep: float | None = 0.25,
    threshold: float | None = None,
    basis_threshold: float = 0.0,
    coefficients: int | float | None = None,
    reduce_tokens: int = 8,
    reduce_channels: int = 2,
    shared: bool = False,
    phase: str = "masked",
    **parts: Unpack[SoftmaxParts],
) -> Mixer:
    """Softmax attention in the layout `predicted`.

    Args:
        site: the place in the backbone.
        keep: the share of all tokens that a token sees, rounded up to a number of them; None for `threshold`.
        threshold: a token sees those whose score, an estimate of their weight, is above it.
        basis_threshold: entries of |U| up to this count as 0.
        coefficients: how many of the r coefficients of a query are kept, or, below 1, above which; None for all.
        reduce_tokens: N / r.
        reduce_channels: D / E.
        shared: U = W.
        phase: "masked"; "reconstruction": in training a token sees all, while the predictor learns.
        parts: parts, projection and backend, see `models.attention.softmax.SoftmaxParts`.

    Raises:
        ValueError: an option out of range, or neither or both of `keep` and `threshold`.
        Refused: another layout, a map of more than `max_tokens`, or heads of too few channels.
    """
    _check(keep, threshold, basis_threshold, coefficients)
    check_whole(WHO, reduce_tokens=reduce_tokens, reduce_channels=reduce_channels)
    check_flags(WHO, shared=shared)
    values.choice(WHO, "phase", phase, PHASES, fix="set attention.phase")
    if parts.get("layout") is not None:
        raise Refused("sparsifiner is a layout by itself", "choose attention=softmax with attention/layout")
    rule, most = Rule(keep, threshold, basis_threshold, coefficients), parts.get("max_tokens", 4096)

    def layout(place: Site) -> Predicted:
        check_size(place.grid, most)
        width, columns = place.head_dim // reduce_channels, max(place.grid.tokens // reduce_tokens, 1)
        if not width:
            raise Refused(
                f"reduce_channels={reduce_channels} leaves none of the {place.head_dim} channels of a head for the "
                "predictor",
                "lower attention.reduce_channels",
            )
        made = MaskPredictor(place.num_heads, place.head_dim, place.grid, width, columns, rule, shared)
        return Predicted(made, dense=phase == "reconstruction")

    return softmax_attention(site, **parts | {"layout": layout})


def check_size(grid: Grid, most: int) -> None:
    """Refuses scores of all pairs of more tokens than `most`."""
    if grid.tokens > most:
        raise Refused(
            f"the predictor writes out the scores of {grid.tokens} x {grid.tokens} pairs, more than max_tokens={most} "
            "allows",
            "raise attention.max_tokens, or choose another mechanism for large maps",
        )


def _check(keep: Any, threshold: Any, basis_threshold: Any, coefficients: Any) -> None:
    above = "a number above 0 and below 1"
    if (keep is None) == (threshold is None):
        raise UserError(
            f"{WHO}: keys are chosen by their share or by a threshold, got keep={keep} and threshold={threshold}; "
            "set one of attention.keep and attention.threshold to null"
        )
    if keep is not None and not (values.is_number(keep, 0, 1) and keep > 0):
        values.refuse(WHO, "keep", "a share above 0, at most 1", keep, "set attention.keep, e.g. to 0.25")
    if threshold is not None and not _inside(threshold):
        values.refuse(WHO, "threshold", above, threshold, "set attention.threshold, e.g. to 0.02")
    values.fraction(WHO, "basis_threshold", basis_threshold, fix="set attention.basis_threshold, e.g. to 0.0")
    if coefficients is not None and not (values.is_whole(coefficients) or _inside(coefficients)):
        what = f"a whole number of at least 1, {above}, or null"
        values.refuse(WHO, "coefficients", what, coefficients, "set attention.coefficients, e.g. to 8")


def _inside(value: Any) -> bool:
    return values.is_number(value, 0, 1) and 0 < value < 1
