"""Softmax attention: over the whole map, in windows or another layout, with parts in place of its single steps.

Source: Attention Is All You Need, Vaswani et al., 2017, arXiv:1706.03762, equation 1; windows, shift and bias: Swin
Transformer, Liu et al., ICCV 2021, arXiv:2103.14030, equation 4. With the parts score s, bias b, weights w, factor c:
    o = (w(s(q, k) + b) ∘ c) v,       by default  s = q kᵀ / √D,  b = 0,  w = softmax,  c = 1.
Shapes: B = batch, N = tokens, S = keys, C = channels, M = heads, D = channels per head, R = groups, T = their queries.
"""

from collections.abc import Callable
from typing import Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.moh_attention import moh_attention
from kernels.neighborhood_attention import neighborhood_attention
from kernels.window_attention import added_to_logits, window_attention
from kernels.window_attention import definition as softmax_heads
from models.attention import flex
from models.attention.assemble import Composition, assemble
from models.attention.biases.relative import RelativePositionBias
from models.attention.biases.rpb import NeighborBias
from models.attention.contract import Grid, Mixer, Refused, Runs, Site
from models.attention.contract.heads import head_channels, heads_to_map, map_to_heads
from models.attention.contract.layout import KEYS, RUNS, SCATTERED, SURROUNDING, Around
from models.attention.contract.options import check_flags, check_whole
from models.attention.contract.places import of_maps
from models.attention.lepe import depthwise
from models.attention.multihead import Core

Part = Callable[[Site], nn.Module]


class SoftmaxParts(Composition, total=False):
    """Options of mechanisms that are softmax attention in a layout of their own: those of `Composition`, and its parts.

    head_dim, score, bias, weights, factor, max_tokens: see `softmax_attention`.
    """

    head_dim: int | None
    score: Part | None
    bias: Part | None
    weights: Part | None
    factor: Part | None
    max_tokens: int


def softmax_attention(
    site: Site,
    *,
    relative_position_bias: bool = False,
    qk_norm: bool = False,
    head_dim: int | None = None,
    score: Part | None = None,
    bias: Part | None = None,
    weights: Part | None = None,
    factor: Part | None = None,
    max_tokens: int = 4096,
    **composition: Unpack[Composition],
) -> Mixer:
    """Scaled dot-product attention, `softmax(q kᵀ / √D) v`, with whichever backend PyTorch finds fastest.

    Args:
        site: the place in the backbone.
        relative_position_bias: a learned bias per head and offset inside the window; short for the bias `relative`.
        qk_norm: LayerNorm on queries and keys.
        head_dim: channels per head D; C / M by default.
        score, bias, weights, factor: factories of parts, see `SoftmaxCore`; None for those of softmax attention.
        max_tokens: most tokens of a group whose weights are written out, as score, weights and factor need.
        composition: layout, other parts and backend, see `models.attention.assemble.Composition`. Over the whole map it
            is PyTorch's own fused kernel in any case.

    Raises:
        Refused: options that exclude each other, or a group of more than `max_tokens`.
    """
    check_flags("softmax", relative_position_bias=relative_position_bias, qk_norm=qk_norm)
    check_whole("softmax", head_dim=1 if head_dim is None else head_dim, max_tokens=max_tokens)
    if composition.get("window") is None and (composition.get("shift") or relative_position_bias):
        raise Refused("shift and relative_position_bias need windows", "set attention.window, or both to false")
    if relative_position_bias and bias is not None:
        raise Refused("two biases, relative_position_bias and attention/bias", "set relative_position_bias=false")
    dim = head_dim or head_channels(site)

    def core(num_heads: int, grid: Grid, kv_grid: Grid) -> SoftmaxCore:
        local = site._replace(num_heads=num_heads, grid=spanned(grid, kv_grid), head_dim=dim)
        table = RelativePositionBias(num_heads, tuple(grid[:2])) if relative_position_bias else bias and bias(local)
        made = {"score": score and score(local), "weights": weights and weights(local)}
        made |= {"factor": factor and factor(local), "bias": table, "max_tokens": max_tokens}
        explicit = any(made[part] is not None for part in ("score", "weights", "factor"))
        check_tokens(grid, kv_grid, explicit=explicit, most=max_tokens)
        return SoftmaxCore(num_heads, dim, qk_norm=qk_norm, **made)

    return assemble(site, core, head_dim=dim, **composition)


class SoftmaxCore(Core):
    """`softmax(q kᵀ / √D + bias) v` per head, and with `lepe` a 3×3 depth-wise convolution of v (CSWin) beside it.

    Args:
        num_heads, head_dim: M and D.
        qk_norm, lepe: LayerNorm on queries and keys, the convolution.
        score: `(q_BMND, k_BMSD) -> logits_BMNS`; None for q kᵀ / √D.
        bias: `(grid, kv_grid) -> (M, N, S)`, added to the logits; None for none.
        weights: `(logits_BMNS, open) -> weights_BMNS`, with `open` bool, False where a pair may not attend, or None;
            None for softmax. Where it has `fused(qkv_BNC, num_heads, scale) -> o_BNC` and nothing else is chosen, that
            computes the heads on a GPU.
        factor: `(grid, kv_grid) -> (M, N, S)`, multiplies the weights; None for none.
        max_tokens: most tokens of a group whose weights are written out.

    With score, weights or factor the weights are written out, unless they are `fused`; otherwise they need not be.
    """

    masks = True
    places = True

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        *,
        qk_norm: bool = False,
        lepe: bool = False,
        score: nn.Module | None = None,
        bias: nn.Module | None = None,
        weights: nn.Module | None = None,
        factor: nn.Module | None = None,
        max_tokens: int = 4096,
    ) -> None:
        super().__init__()
        self.scale = head_dim**-0.5
        self.q_norm = nn.LayerNorm(head_dim) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(head_dim) if qk_norm else nn.Identity()
        self.score, self.bias, self.weights, self.factor, self.max_tokens = score, bias, weights, factor, max_tokens
        self.explicit = any(part is not None for part in (score, weights, factor))
        alone = not (qk_norm or lepe) and all(part is None for part in (score, bias, factor))
        self.weighs = alone and hasattr(weights, "fused")
        self.finds_windows = not self.weighs
        dim = num_heads * head_dim
        self.lepe = depthwise(dim, 3 if lepe else 0)
        self.adds = lepe
        self.ignores_grid = bias is None and factor is None and not lepe
        self.row_stochastic = factor is None and getattr(weights, "row_stochastic", weights is None)
        placed = [part for part in (bias, factor) if part is not None]
        self.flexible = not self.explicit and not lepe and (bias is None or hasattr(bias, "at"))
        self.finds_neighbors = self.flexible and not qk_norm and (bias is None or isinstance(bias, NeighborBias))
        lost = {RUNS, SCATTERED} if placed else set()
        lost |= {SURROUNDING} if any(not hasattr(part, "at") for part in placed) else set()
        self.keys = KEYS - lost

    def runs(self, window: tuple[int, int] | None, gated: bool) -> Runs:
        """Windows and gated heads have a kernel, and some weights; the rest is PyTorch's own attention."""
        if self.weighs:
            return Runs("dense_attention", True)
        if self.explicit:
            names = ", ".join(type(part).__name__ for part in (self.score, self.weights, self.factor) if part)
            return Runs("explicit attention", False, f"the weights of all pairs are written out for {names}")
        if not isinstance(self.q_norm, nn.Identity):
            return Runs("scaled_dot_product_attention", False, "queries and keys are normalised first (qk_norm)")
        if self.lepe is not None:
            return Runs(
                "scaled_dot_product_attention", False, "PyTorch's own fused kernel, and a convolution beside it"
            )
        if window is not None:
            return Runs("window_attention", True)
        if self.bias is not None:
            name = type(self.bias).__name__
            return Runs("scaled_dot_product_attention", False, f"with {name} as a dense mask")
        if gated:
            return Runs("moh_attention", True)
        return Runs("scaled_dot_product_attention", False, "dense attention is PyTorch's own fused kernel")

    def fused(
        self,
        qkv_BNC: Tensor,
        grid: Grid,
        num_heads: int,
        *,
        window: tuple[int, int] | None = None,
        shift: tuple[int, int] = (0, 0),
        padding: Tensor | None = None,
        around: Around | None = None,
        gates: Tensor | None = None,
    ) -> Tensor:
        """(B, N, 3·M·D) → (B, N, M·D); see `Core`."""
        if self.weighs:
            return self.weights.fused(qkv_BNC, num_heads, self.scale)
        if around is not None:
            near = {"kernel": around.kernel, "stride": around.stride, "dilation": around.dilation}
            rpb = None if self.bias is None else self.bias.table
            return neighborhood_attention(qkv_BNC, grid[:2], num_heads, **near, rpb=rpb, scale=self.scale)
        if window is None:
            return moh_attention(qkv_BNC, gates.float(), num_heads, scale=self.scale)
        window_grid = Grid(*window)
        bias = None if self.bias is None else of_maps(self.bias, window_grid, window_grid, qkv_BNC.device)
        layout = {"shift": shift, "padding": padding, "bias_MTT": bias, "scale": self.scale}
        return window_attention(qkv_BNC, grid[:2], num_heads, window, **layout)

    def flex(self, q_BMND: Tensor, k_BMSD: Tensor, v_BMSD: Tensor, grid: Grid, around: Around | None) -> Tensor:
        """See `Core`."""
        q, k = (t.to(v_BMSD.dtype) for t in (self.q_norm(q_BMND), self.k_norm(k_BMSD)))
        return flex.attend(q, k, v_BMSD, grid, scale=self.scale, bias=self.bias, around=around)

    def forward(
        self,
        q_BMND: Tensor,
        k_BMSD: Tensor,
        v_BMSD: Tensor,
        grid: Grid,
        kv_grid: Grid,
        mask: Tensor | None = None,
        offsets: Tensor | None = None,
    ) -> Tensor:
        if self.explicit:
            check_tokens(grid, kv_grid, explicit=True, most=self.max_tokens)
            o_BMND = self.matrix(q_BMND, k_BMSD, grid, kv_grid, mask, offsets).to(v_BMSD.dtype) @ v_BMSD
        else:
            q, k = self.q_norm(q_BMND), self.k_norm(k_BMSD)
            if self.bias is None or offsets is None:
                bias = None if self.bias is None else of_maps(self.bias, grid, kv_grid, q.device)
                o_BMND = softmax_heads(q, k, v_BMSD, bias, mask, scale=self.scale)
            else:
                added = self._added(q, grid, kv_grid, mask, offsets)
                o_BMND = F.scaled_dot_product_attention(q, k, v_BMSD, added, scale=self.scale)
        if self.lepe is None:
            return o_BMND
        return o_BMND + map_to_heads(self.lepe(heads_to_map(v_BMSD, kv_grid)), v_BMSD.shape[1], grid.prefix)

    def matrix(
        self,
        q_BMND: Tensor,
        k_BMSD: Tensor,
        grid: Grid,
        kv_grid: Grid,
        mask: Tensor | None = None,
        offsets: Tensor | None = None,
    ) -> Tensor:
        """The attention weights (B, M, N, S)."""
        q, k = self.q_norm(q_BMND), self.k_norm(k_BMSD)
        logits = q @ k.mT * self.scale if self.score is None else self.score(q, k)
        if self.weights is None:
            added = self._added(logits, grid, kv_grid, mask, offsets)
            weights = (logits if added is None else logits + added).softmax(-1)
        else:
            added = self._added(logits, grid, kv_grid, None, offsets)
            weights = self.weights(logits if added is None else logits + added, _open(mask, logits.shape[0]))
        if self.factor is None:
            return weights
        return weights * _placed(self.factor, grid, kv_grid, offsets, weights).to(weights.dtype)

    def _added(
        self, like: Tensor, grid: Grid, kv_grid: Grid, mask: Tensor | None, offsets: Tensor | None
    ) -> Tensor | None:
        """Bias and mask together, broadcastable to (B, M, N, S); None for nothing."""
        if self.bias is None or offsets is None:
            bias = None if self.bias is None else of_maps(self.bias, grid, kv_grid, like.device)
            return added_to_logits(like, bias, mask)
        placed, closed = _placed(self.bias, grid, kv_grid, offsets, like), added_to_logits(like, None, mask)
        return placed.to(like.dtype) if closed is None else placed.to(like.dtype) + closed


def spanned(grid: Grid, kv_grid: Grid) -> Grid:
    """A map whose offsets are all those between two: of the queries, or of the keys where these lie around them."""
    return grid._replace(height=max(grid.height, kv_grid.height), width=max(grid.width, kv_grid.width))


def check_tokens(grid: Grid, kv_grid: Grid, *, explicit: bool, most: int) -> None:
    """Refuses weights of all pairs of more tokens than `most`."""
    queries, keys = grid.tokens, kv_grid.tokens
    if explicit and queries * keys > most**2:
        size = 4 * queries * keys / 2**20
        raise Refused(
            f"score, weights and factor write out the weights of {queries} x {keys} pairs, {size:.0f} MiB per image "
            f"and head, more than max_tokens={most} allows",
            "choose attention/layout=window, or raise attention.max_tokens",
        )


def _open(mask: Tensor | None, batch: int) -> Tensor | None:
    """Which pairs may attend, (B, 1, T, S), or (B, M, T, S) where heads differ, of a mask of all groups of a map."""
    if mask is None:
        return None
    allowed = mask if mask.dtype == torch.bool else mask == 0
    if mask.dim() == 4:
        return allowed
    return allowed[:, None].repeat(batch // mask.shape[0], 1, 1, 1)


def _placed(part: nn.Module, grid: Grid, kv_grid: Grid, offsets: Tensor | None, like: Tensor) -> Tensor:
    """What a part of positions gives, broadcastable to (B, M, N, S)."""
    if offsets is None:
        return of_maps(part, grid, kv_grid, like.device)[None]
    table = part.at(offsets)
    if offsets.dim() == 3:
        return table[None]
    return table.transpose(0, 1).repeat(like.shape[0] // offsets.shape[0], 1, 1, 1)
