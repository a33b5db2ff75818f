"""Hedgehog: linear attention whose features of queries and keys are learned to be as spiky as softmax attention is.

Source: The Hedgehog & the Porcupine: Expressive Linear Attentions with Softmax Mimicry, Zhang et al., ICLR 2024,
arXiv:2402.04347:
    o = φ(q) φ(k)ᵀ v / (φ(q) · Σ φ(k)),   φ(x) = [softmax(W x), softmax(-W x)],   one W per head
Shapes: B = batch, N = tokens, S = keys, M = heads, D = channels per head, F = features, φ has 2F of them.
There is no D^-1/2: W has it, if anything does. That is the authors' later code (lolcats). `feature="joint"` is another
function, which flash-linear-attention has under this name: one softmax of [2(W x + b), -2(W x + b)] together, W and b
shared by all heads. W starts as the identity where it is square; lolcats draws it at random. How W learns to give the
rows of softmax attention: `models.tasks.matching`.
"""

from typing import Unpack

import torch
from torch import Tensor, nn

from conf import values
from conf.errors import UserError
from kernels.precision import full_precision, wide
from models.attention.assemble import Composition, assemble
from models.attention.contract import Grid, Mixer, Site
from models.attention.contract.heads import head_channels
from models.attention.contract.options import check_flags, check_whole
from models.attention.cores.stateful import State, StateCore

FEATURES = ("softmax", "exp", "joint")
EPS = 1e-12


def hedgehog_attention(
    site: Site,
    *,
    feature: str = "softmax",
    feature_dim: int | None = None,
    tied: bool = False,
    both_signs: bool = True,
    skip: bool = False,
    **composition: Unpack[Composition],
) -> Mixer:
    """Linear attention with learned, softmax-like features.

    Args:
        site: the place in the backbone.
        feature: φ: "softmax", "exp" (without the quotient of the softmax, shifted by its largest) or "joint"
            (flash-linear-attention's).
        feature_dim: F; D by default.
        tied: queries and keys have the same features.
        both_signs: φ has a part of -W x too; "joint" always has.
        skip: W x + x in place of W x.
        composition: layout, other parts, projection and backend, see `models.attention.assemble.Composition`.

    Raises:
        ValueError: an unknown feature, or `skip` where F is not D.
    """
    values.choice("hedgehog", "feature", feature, FEATURES, fix="set attention.feature")
    check_whole("hedgehog", feature_dim=1 if feature_dim is None else feature_dim)
    check_flags("hedgehog", tied=tied, both_signs=both_signs, skip=skip)
    dim = head_channels(site)
    width = feature_dim or dim
    if skip and width != dim:
        raise UserError(f"hedgehog: skip needs feature_dim={dim}, got {width}; set attention.feature_dim=null")
    options = {"feature": feature, "both_signs": both_signs, "skip": skip}
    return assemble(site, lambda heads, *_: HedgehogCore(heads, dim, width, tied=tied, **options), **composition)


class Features(nn.Module):
    """φ: (B, M, N, D) → (B, M, N, F'), positive, in float32 at least; options as of `hedgehog_attention`."""

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        feature_dim: int,
        *,
        feature: str = "softmax",
        both_signs: bool = True,
        skip: bool = False,
    ) -> None:
        super().__init__()
        self.feature, self.both_signs, self.skip = feature, both_signs, skip
        shape = (head_dim, feature_dim) if feature == "joint" else (num_heads, head_dim, feature_dim)
        self.weight = nn.Parameter(torch.zeros(shape))
        self.bias = nn.Parameter(torch.zeros(feature_dim)) if feature == "joint" else None
        if head_dim != feature_dim:
            nn.init.uniform_(self.weight, -(head_dim**-0.5), head_dim**-0.5)
        elif not skip:
            nn.init.ones_(self.weight.detach().diagonal(dim1=-2, dim2=-1))

    def forward(self, x_BMND: Tensor) -> Tensor:
        x_BMND = wide(x_BMND)
        y_BMNF = x_BMND @ self.weight.to(x_BMND.dtype)
        y_BMNF = y_BMNF + x_BMND if self.skip else y_BMNF
        if self.feature == "joint":
            y_BMNF = 2 * (y_BMNF + self.bias)
            return torch.cat([y_BMNF, -y_BMNF], dim=-1).softmax(-1)
        signed = [y_BMNF, -y_BMNF] if self.both_signs else [y_BMNF]
        if self.feature == "exp":
            parts = [(y - y.amax(-1, keepdim=True)).exp() for y in signed]
        else:
            parts = [y.softmax(-1) for y in signed]
        return torch.cat(parts, dim=-1).clamp(min=EPS)


class HedgehogCore(StateCore):
    """Features, the state φ(k)ᵀ v, and its reading by every query."""

    row_stochastic = True
    ignores_grid = True

    def __init__(self, num_heads: int, head_dim: int, feature_dim: int, *, tied: bool = False, **features: str | bool):
        super().__init__()
        self.feature_q = Features(num_heads, head_dim, feature_dim, **features)
        self.feature_k = None if tied else Features(num_heads, head_dim, feature_dim, **features)

    def queried(self, q_BMND: Tensor, grid: Grid) -> Tensor:
        return self.feature_q(q_BMND)

    def state(self, k_BMSD: Tensor, v_BMSD: Tensor, kv_grid: Grid) -> State:
        k = self._of_keys(k_BMSD)
        return k.mT @ wide(v_BMSD), k.sum(2, keepdim=True)

    def read(self, q_BMND: Tensor, state: State, keys: int) -> Tensor:
        state_BMFD, k_BM1F = state
        return q_BMND @ state_BMFD / (q_BMND @ k_BM1F.mT + EPS)

    def matrix(self, q_BMND: Tensor, k_BMSD: Tensor, grid: Grid, kv_grid: Grid) -> Tensor:
        """The weights (B, M, N, S): quadratic, for looking at, for distillation and for tests."""
        with full_precision(q_BMND.device):
            q, k = self.feature_q(q_BMND), self._of_keys(k_BMSD)
            weights = q @ k.mT
            return weights / (weights.sum(-1, keepdim=True) + EPS)

    def _of_keys(self, k_BMSD: Tensor) -> Tensor:
        return (self.feature_k or self.feature_q)(k_BMSD)
