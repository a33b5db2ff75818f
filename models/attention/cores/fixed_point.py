"""A reading of fixed-point self-attention: weights that mix the queries they are made of, round after round.

Source: Change of Thought: Adaptive Test-Time Computation (SELF-Transformer), Mathur et al., 2025, arXiv:2507.13569: a
layer that "iteratively refines its own attention weights to a fixed point". There is no released code. Read as
    A₁ = softmax(q kᵀ / √D),   Aₜ₊₁ = softmax((Aₜ q) kᵀ / √D),
since a projection of mixed tokens is the mixed projection of tokens where rows sum to one: no weights are added. The
number of rounds is fixed, or the weights of a head stay where they change by less than a tolerance; the gradient goes
through the last round alone, which takes the weights before it for given.
Shapes: B = batch, M = heads, N = queries, S = keys, as many, D = channels per head, R = groups.
"""

from typing import Unpack

import torch
from torch import Tensor

from conf import values
from kernels.window_attention import added_to_logits
from models.attention.assemble import Composition, assemble
from models.attention.contract import Grid, Mixer, Site
from models.attention.contract.heads import head_channels
from models.attention.contract.layout import SAME
from models.attention.contract.options import check_whole
from models.attention.multihead import Core
from models.attention.softmax import check_tokens


def fixed_point_attention(
    site: Site,
    *,
    rounds: int = 4,
    tolerance: float | None = None,
    max_tokens: int = 4096,
    **composition: Unpack[Composition],
) -> Mixer:
    """Softmax attention whose weights are refined.

    Args:
        site: the place in the backbone.
        rounds: how often weights are computed, at the most; 1 is softmax attention.
        tolerance: the weights of a head stay once a round changes them by a smaller Frobenius norm; None for never.
        max_tokens: most tokens of a group whose weights are written out.
        composition: layout, other parts, projection and backend, see `models.attention.assemble.Composition`.

    Raises:
        ValueError: no round, or a tolerance that is no positive number.
        Refused: a group of more than `max_tokens`.
    """
    check_whole("fixed_point", rounds=rounds, max_tokens=max_tokens)
    if tolerance is not None and not (values.is_number(tolerance) and tolerance > 0):
        fix = "set attention.tolerance, e.g. to 1e-3, or to null for all rounds"
        values.refuse("fixed_point", "tolerance", "a positive number, or null", tolerance, fix)
    dim = head_channels(site)

    def core(num_heads: int, grid: Grid, kv_grid: Grid) -> FixedPointCore:
        check_tokens(grid, kv_grid, explicit=True, most=max_tokens)
        return FixedPointCore(dim, rounds, tolerance, max_tokens)

    return assemble(site, core, **composition)


class FixedPointCore(Core):
    """See the module's docstring; arguments as of `fixed_point_attention`."""

    keys = frozenset({SAME})
    masks = True
    row_stochastic = True
    ignores_grid = True

    def __init__(self, head_dim: int, rounds: int, tolerance: float | None, max_tokens: int) -> None:
        super().__init__()
        self.scale, self.rounds, self.tolerance, self.max_tokens = head_dim**-0.5, rounds, tolerance, max_tokens

    def forward(
        self, q_BMND: Tensor, k_BMSD: Tensor, v_BMSD: Tensor, grid: Grid, kv_grid: Grid, mask: Tensor | None = None
    ) -> Tensor:
        check_tokens(grid, kv_grid, explicit=True, most=self.max_tokens)
        return self.matrix(q_BMND, k_BMSD, grid, kv_grid, mask).to(v_BMSD.dtype) @ v_BMSD

    def matrix(self, q_BMND: Tensor, k_BMSD: Tensor, grid: Grid, kv_grid: Grid, mask: Tensor | None = None) -> Tensor:
        """The weights (B, M, N, S) of the last round."""
        if self.rounds == 1:
            return self.weights(q_BMND, k_BMSD, mask)
        with torch.no_grad():
            before_BMNS = self.refined(q_BMND, k_BMSD, mask)
        return self.weights(before_BMNS @ q_BMND, k_BMSD, mask)

    def weights(self, q_BMND: Tensor, k_BMSD: Tensor, mask: Tensor | None) -> Tensor:
        """Of one round."""
        logits = q_BMND @ k_BMSD.mT * self.scale
        return (logits if mask is None else logits + added_to_logits(logits, None, mask)).softmax(-1)

    def refined(self, q_BMND: Tensor, k_BMSD: Tensor, mask: Tensor | None) -> Tensor:
        """The weights of all rounds but the last."""
        A_BMNS = self.weights(q_BMND, k_BMSD, mask)
        moving = torch.ones_like(A_BMNS[..., :1, :1], dtype=torch.bool)
        for _ in range(self.rounds - 2):
            after = self.weights(A_BMNS @ q_BMND, k_BMSD, mask)
            if self.tolerance is not None:
                after = torch.where(moving, after, A_BMNS)
                moving = moving & ((after - A_BMNS).float().norm(dim=(-2, -1), keepdim=True) >= self.tolerance)
            A_BMNS = after
            if self._may_stop() and not moving.any():
                break
        return A_BMNS

    def _may_stop(self) -> bool:
        """Whether to ask if any weights still move: not in training or graphs, which then need not wait for it."""
        return self.tolerance is not None and not self.training and not torch.compiler.is_compiling()
