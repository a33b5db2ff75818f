"""Tversky head: a class is a prototype, and how similar an image is to it goes by common and distinctive features.

With X = relu(x Fᵀ) and P = relu(p Fᵀ): contrast θ f(X, P) − α (X without P) − β (P without X), or ratio
f / (f + α (X without P) + β (P without X) + 1).

Source: Doumbouya et al., Tversky Neural Networks, 2025, arXiv:2506.11035. The names of the measures are those of the
authors' library, `substractmatch` too. Its `gmean` of common features is left out: it takes the logarithm of 0 wherever
two have none.
Shapes: B = batch, C = features of the pool, F = size of the feature bank, K = classes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conf import values

WHO = "TverskyHead"
INTERSECTIONS = ("product", "mean", "min", "softmin", "max")
DIFFERENCES = ("ignorematch", "substractmatch")


class TverskyHead(nn.Module):
    """(B, C) → (B, K).

    Args:
        dim: features C.
        num_classes: K, the prototypes.
        features: F.
        form: "contrast" or "ratio".
        intersection: f, how much two have in common: "product" of the features that both have, or of the sums of
            either's measures of these the "mean", "min", "softmin" or "max".
        difference: "ignorematch" counts the features that the other lacks, "substractmatch" also by how much those are
            larger that both have.
        normalize: x and prototypes to length 1; without, as by default in the library, logits start in the hundreds.

    Raises:
        ValueError: an option out of range.
    """

    undecayed = ("prototypes", "features")

    def __init__(
        self,
        dim: int,
        num_classes: int,
        *,
        features: int = 128,
        form: str = "contrast",
        intersection: str = "product",
        difference: str = "ignorematch",
        normalize: bool = True,
    ) -> None:
        values.whole(WHO, "features", features, fix="set head.features")
        values.choice(WHO, "form", form, ("contrast", "ratio"), fix="set head.form")
        fix = "gmean has no gradient where nothing is in common: set head.intersection=mean, for instance"
        values.choice(WHO, "intersection", intersection, INTERSECTIONS, fix=fix)
        values.choice(WHO, "difference", difference, DIFFERENCES, fix="set head.difference")
        values.flag(WHO, "normalize", normalize, fix="set head.normalize=true or false")
        super().__init__()
        self.intersection, self.difference, self.normalize = intersection, difference, normalize
        self.prototypes = nn.Parameter(torch.rand(num_classes, dim))
        self.features = nn.Parameter(torch.rand(features, dim))
        self.theta = nn.Parameter(torch.tensor(1.0)) if form == "contrast" else None
        self.alpha, self.beta = nn.Parameter(torch.tensor(0.5)), nn.Parameter(torch.tensor(0.5))

    def forward(self, x_BC: Tensor) -> Tensor:
        p_KC = self.prototypes
        if self.normalize:
            x_BC, p_KC = F.normalize(x_BC, dim=1), F.normalize(p_KC, dim=1)
        X_BF, P_KF = (x_BC @ self.features.T).relu(), (p_KC @ self.features.T).relu()
        common_BK = self._common(X_BF, P_KF)
        lacking_BK = self.alpha * self._without(X_BF, P_KF) + self.beta * self._without(P_KF, X_BF).T
        if self.theta is None:
            return common_BK / (common_BK + lacking_BK + 1)
        return self.theta * common_BK - lacking_BK

    def _common(self, X_BF: Tensor, P_KF: Tensor) -> Tensor:
        """f(X, P): (B, K)."""
        if self.intersection == "product":
            return X_BF @ P_KF.T
        of_x, of_p = X_BF @ (P_KF > 0).to(X_BF).T, (X_BF > 0).to(P_KF) @ P_KF.T
        if self.intersection == "softmin":
            return -torch.logaddexp(-of_x, -of_p)
        return {"mean": (of_x + of_p) / 2, "min": torch.minimum(of_x, of_p), "max": torch.maximum(of_x, of_p)}[
            self.intersection
        ]

    def _without(self, a_BF: Tensor, b_KF: Tensor) -> Tensor:
        """What a has and b has not, or by `substractmatch` less: (B, K)."""
        missing = a_BF @ (b_KF <= 0).to(a_BF).T
        if self.difference == "ignorematch":
            return missing
        return missing + (a_BF @ (b_KF > 0).to(a_BF).T - (a_BF > 0).to(b_KF) @ b_KF.T).relu()
