"""Clipped softmax: weights that can be exactly 0 or 1, so that a head can leave a token as it is.

Source: Quantizable Transformers: Removing Outliers by Helping Attention Heads Do Nothing, Bondarenko et al., NeurIPS
2023, arXiv:2306.12929, equation 4: clip((ζ − γ) softmax(s) + γ, 0, 1), with γ = −α / T for T tokens.
Shapes: B = batch, M = heads, N = queries, S = keys.
Clipped weights have no gradient, and undecided ones, 1 / T, become about (1 − α) / T: with α ≥ 1 nothing can be learned
from a random start; such an α needs weights that were trained before.
"""

from torch import Tensor, nn

from conf import values
from kernels.dense_attention import clipped_attention, clipped_weights
from models.attention.contract import Refused, Site

WHO = "clipped"


def clipped(
    site: Site,
    *,
    alpha: float | None = 0.5,
    length: int | str | None = None,
    gamma: float | None = None,
    zeta: float = 1.0,
    from_scratch: bool = True,
) -> "ClippedSoftmax":
    """clip((ζ − γ) softmax(s) + γ, 0, 1).

    Args:
        site: the place in the backbone, with the map that the core sees.
        alpha: α of γ = −α / T; unused with `gamma`.
        length: T: a number (the authors' maximal length); "tokens", the keys at hand; None, the tokens that it is built
            for.
        gamma: γ itself, at most 0; None for −α / T.
        zeta: ζ, at least 1.
        from_scratch: refuse what clips undecided weights; false where trained weights are loaded.

    Raises:
        ValueError: a number that is none.
        Refused: undecided weights would be clipped, see above.
    """
    fix = "set attention.weights."
    tokens = site.grid.tokens
    values.flag(WHO, "from_scratch", from_scratch, fix=f"{fix}from_scratch=true or false")
    values.number(WHO, "zeta", zeta, 1, fix=f"{fix}zeta")
    if gamma is None:
        values.number(WHO, "alpha", alpha, fix=f"{fix}alpha, or gamma")
        if length != "tokens" and length is not None:
            values.whole(WHO, "length", length, what="a whole number of at least 1, tokens or null", fix=f"{fix}length")
    elif not values.is_number(gamma, at_most=0):
        values.refuse(WHO, "gamma", "a number of at most 0", gamma, f"{fix}gamma")
    made = ClippedSoftmax(alpha, tokens if length is None else length, gamma, zeta)
    if from_scratch and made.shift(tokens) * tokens + zeta <= 1e-6:
        what = f"alpha={alpha}" if gamma is None else f"gamma={gamma}"
        raise Refused(
            f"{WHO}: {what} clips the undecided weights 1/{tokens} of a random start, which then have no gradient",
            "set attention.weights.alpha below 1, or attention.weights.from_scratch=false for trained weights",
        )
    return made


class ClippedSoftmax(nn.Module):
    """Softmax, stretched and clipped; closed pairs have weight 0. `fused` is attention with them, by a kernel."""

    row_stochastic = False

    def __init__(self, alpha: float | None, length: int | str, gamma: float | None, zeta: float) -> None:
        super().__init__()
        self.alpha, self.length, self.gamma, self.zeta = alpha, length, gamma, zeta

    def shift(self, keys: int) -> float:
        """γ for so many keys."""
        if self.gamma is not None:
            return self.gamma
        return -self.alpha / (keys if self.length == "tokens" else self.length)

    def forward(self, logits_BMNS: Tensor, open: Tensor | None) -> Tensor:
        return clipped_weights(logits_BMNS, open, gamma=self.shift(logits_BMNS.shape[-1]), zeta=self.zeta)

    def fused(self, qkv_BNC: Tensor, num_heads: int, scale: float) -> Tensor:
        """(B, N, 3·M·D) → (B, N, M·D)."""
        return clipped_attention(qkv_BNC, num_heads, gamma=self.shift(qkv_BNC.shape[1]), zeta=self.zeta, scale=scale)
