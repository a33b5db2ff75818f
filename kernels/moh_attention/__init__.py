"""Mixture-of-head attention: every head of every token has a gate, and heads whose gate is 0 are not computed.

    o[n, h] = gate[n, h] · softmax(q[n, h] k[·, h]ᵀ · scale) v[·, h]

over all N tokens. The router makes the gates, from logits wg (E), w0 (2) and w1 (S) of each token, for S shared heads,
which come first, and K of E routed heads:

    r = softmax(wg),  m = its K largest;   g = K r m / Σ r m,   s = S softmax(w1),   a1, a2 = 2 softmax(w0)
    gates = [a1 s, a2 g];   balance = E Σ P f with P the mean of r and f the mean of m over all tokens

A pair of token and head with gate 0 adds nothing to the output nor to any gradient, so leaving it out is exact. The
gradient of such a gate is 0 by definition here; in the router its factor m is 0 as well.

Source: MoH, Jin et al., ICML 2025, arXiv:2410.11842, equations 4 to 7, with the factors of the authors' code.
Shapes: B = batch, N = tokens, C = M·D, M = heads, D = channels per head, E = routed heads, S = shared heads.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.dispatch import autocast, check_head_dim, check_tensors, is_fused
from kernels.heads import gated, merge_heads, split_heads
from kernels.moh_attention.register import attend, route, routed_heads
from kernels.order import sorted_stably

WHO, ROUTE = "moh_attention", "route_heads"
# From so many tokens on "auto" leaves heads out: below, a tile of 128 queries would often stay dense or half empty,
# and the list of tokens costs a launch.
SKIP_FROM = 512


def moh_attention(
    qkv_BNC: Tensor,
    gates_BNM: Tensor,
    num_heads: int,
    *,
    scale: float | None = None,
    skip: str = "auto",
    backend: str = "auto",
) -> Tensor:
    """Gated softmax attention over all tokens, (B, N, M·D) in the dtype of qkv.

    Args:
        qkv_BNC: (B, N, 3·M·D) queries, keys, values of `nn.Linear`, each M heads of D channels. May be strided.
        gates_BNM: (B, N, M), any floating dtype. Where a gate is exactly 0, output and all gradients are exactly 0.
        num_heads: M.
        scale: of the scores, above 0; None for D^-1/2.
        skip: "always" leaves out pairs of token and head whose gate is 0, "never" computes and gates all of them,
            "auto" leaves out from 512 tokens on. The result is the same.
        backend: "auto", "triton" or "torch".

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together, an unknown `skip`, a scale that is not above 0,
            or heads of more than 128 channels on the fused path.
    """
    _check(qkv_BNC, gates_BNM, num_heads, scale, skip)
    if not is_fused(WHO, backend, qkv_BNC):
        heads = split_heads(qkv_BNC, 3, num_heads)
        return merge_heads(definition(*heads, gates_BNM, scale=scale)).to(qkv_BNC.dtype)
    (qkv_BNC,) = autocast(qkv_BNC)
    head_dim = qkv_BNC.shape[2] // (3 * num_heads)
    check_tensors(WHO, {"qkv": qkv_BNC}, {"gates": gates_BNM})
    check_head_dim(WHO, head_dim)
    skips = skip == "always" or (skip == "auto" and qkv_BNC.shape[1] >= SKIP_FROM)
    return attend(qkv_BNC, gates_BNM, head_dim**-0.5 if scale is None else float(scale), skips)


def definition(
    q_BMND: Tensor, k_BMND: Tensor, v_BMND: Tensor, gates_BNM: Tensor, *, scale: float | None = None
) -> Tensor:
    """Softmax attention of heads, each times its gate, (B, M, N, D). It computes all of them."""
    o_BMND = F.scaled_dot_product_attention(q_BMND, k_BMND, v_BMND, scale=scale)
    return gated(o_BMND, torch.where(gates_BNM != 0, gates_BNM, 0.0))


def _check(qkv: Tensor, gates: Tensor, num_heads: int, scale: float | None, skip: str) -> None:
    if skip not in ("auto", "always", "never"):
        raise ValueError(f"{WHO}: skip must be auto, always or never, got {skip}; choose one of them")
    if scale is not None and not scale > 0:
        raise ValueError(f"{WHO}: scale must be above 0, got {scale}; use None for D^-1/2")
    if qkv.dim() != 3 or num_heads < 1 or qkv.shape[2] % (3 * num_heads) or not qkv.shape[2]:
        raise ValueError(
            f"{WHO}: qkv must be (B, N, 3·{num_heads}·D), got {tuple(qkv.shape)}; pass the output of the projection"
        )
    if gates.shape != (*qkv.shape[:2], num_heads) or not gates.is_floating_point():
        raise ValueError(
            f"{WHO}: gates must be {(*qkv.shape[:2], num_heads)} and floating, got {tuple(gates.shape)} "
            f"{str(gates.dtype).removeprefix('torch.')}; give one gate per token and head"
        )


def route_heads(logits_BNL: Tensor, shared: int, routed: int, *, backend: str = "auto") -> tuple[Tensor, Tensor | None]:
    """Gates (B, N, M) of all heads and the load balance loss (a scalar), both float32; no loss without routed heads.

    Args:
        logits_BNL: (B, N, L) outputs of the router's layers next to each other: wg (E, if routed), w0 (2, if routed
            and shared), w1 (S, if more than one is shared). Half precision is computed in float32.
        shared: S. A single shared head has s = 1 and no logits.
        routed: K, how many of the E a token chooses; among equal scores the lowest index. Without routed heads the
            gates are s alone, without shared ones g alone.
        backend: "auto", "triton" or "torch".

    Raises:
        ValueError: numbers of heads that are negative or choose nothing, or logits that do not fit them.
    """
    _check_router(logits_BNL, shared, routed)
    if logits_BNL.dtype in (torch.float16, torch.bfloat16):
        logits_BNL = logits_BNL.float()
    if not is_fused(ROUTE, backend, logits_BNL):
        return route_definition(logits_BNL, shared, routed)
    check_tensors(ROUTE, {"logits": logits_BNL})
    gates, balance = route(logits_BNL, shared, routed)
    return gates, balance if routed else None


def route_definition(logits_BNL: Tensor, shared: int, routed: int) -> tuple[Tensor, Tensor | None]:
    """Gates and balance in the dtype of the logits."""
    E = routed_heads(logits_BNL.shape[2], shared, routed)
    wg, w0, w1 = logits_BNL.split([E, 2 if routed and shared else 0, shared if shared > 1 else 0], dim=2)
    if not routed:
        return shared_gates(w1, shared), None
    scores = wg.softmax(2)
    mask = largest(scores, routed)
    chosen = scores * mask
    gates = routed * chosen / chosen.sum(2, keepdim=True)
    balance = E * (scores.mean((0, 1)) * mask.mean((0, 1))).sum()
    return joined(gates, w0, w1, shared), balance


def shared_gates(w1_BNS: Tensor, shared: int) -> Tensor:
    """s (B, N, S); 1 for a single shared head, which has no logits."""
    return shared * w1_BNS.softmax(2) if shared > 1 else w1_BNS.new_ones(*w1_BNS.shape[:2], shared)


def joined(gates_BNE: Tensor, w0_BN2: Tensor, w1_BNS: Tensor, shared: int) -> Tensor:
    """Gates of all heads from those of the routed ones: [a1 s, a2 g], or g alone."""
    if not shared:
        return gates_BNE
    alpha_1, alpha_2 = (2 * w0_BN2.softmax(2)).split(1, dim=2)
    return torch.cat([alpha_1 * shared_gates(w1_BNS, shared), alpha_2 * gates_BNE], dim=2)


def largest(scores_BNE: Tensor, count: int) -> Tensor:
    """1 at the `count` largest scores of each token and 0 elsewhere; ties go to the lowest index.

    A stable sort, because the order of ties in torch.topk is unspecified and differs between devices.
    """
    order = sorted_stably(scores_BNE.detach(), descending=True).indices
    return torch.zeros_like(scores_BNE).scatter(-1, order[..., :count], 1.0)


def _check_router(logits: Tensor, shared: int, routed: int) -> None:
    if min(shared, routed) < 0 or shared + routed == 0:
        raise ValueError(
            f"{ROUTE}: shared and routed heads must be at least 0, and one of them above, got {shared} and {routed}; "
            "change them"
        )
    E = routed_heads(logits.shape[-1], shared, routed)
    least = max(E, routed) + (shared if shared > 1 else 0) + (2 if shared and routed else 0)
    if logits.dim() != 3 or logits.shape[2] != least:
        raise ValueError(
            f"{ROUTE}: logits of {shared} shared and {routed} routed heads must be (B, N, {least}"
            f"{' or more' if routed else ''}), got {tuple(logits.shape)}; pass wg, w0 and w1 next to each other"
        )
    if not logits.is_floating_point():
        raise ValueError(f"{ROUTE}: logits must be floating, got {str(logits.dtype).removeprefix('torch.')}; cast them")
