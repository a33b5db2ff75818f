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
from kernels.operation import Cost, Operation
from kernels.registration import define

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
        return reference(qkv_BNC, gates_BNM, num_heads, scale=scale)
    (qkv_BNC,) = autocast(qkv_BNC)
    head_dim = qkv_BNC.shape[2] // (3 * num_heads)
    check_tensors(WHO, {"qkv": qkv_BNC}, {"gates": gates_BNM})
    check_head_dim(WHO, head_dim)
    skips = skip == "always" or (skip == "auto" and qkv_BNC.shape[1] >= SKIP_FROM)
    return _MoHAttention.apply(qkv_BNC, gates_BNM, head_dim**-0.5 if scale is None else float(scale), skips)


def reference(
    qkv_BNC: Tensor, gates_BNM: Tensor, num_heads: int, *, scale: float | None = None, skip: str = "auto"
) -> Tensor:
    """The definition in plain PyTorch. It computes all heads, whatever `skip` is."""
    q_BMND, k_BMND, v_BMND = qkv_BNC.unflatten(2, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)
    o_BMND = F.scaled_dot_product_attention(q_BMND, k_BMND, v_BMND, scale=scale)
    gates_BNM = torch.where(gates_BNM != 0, gates_BNM, 0.0)
    return (o_BMND.transpose(1, 2) * gates_BNM.unsqueeze(-1)).flatten(2).to(qkv_BNC.dtype)


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
        return route_reference(logits_BNL, shared, routed)
    check_tensors(ROUTE, {"logits": logits_BNL})
    gates, balance = _RouteHeads.apply(logits_BNL, shared, routed)
    return gates, balance if routed else None


def route_reference(logits_BNL: Tensor, shared: int, routed: int) -> tuple[Tensor, Tensor | None]:
    """The definition in plain PyTorch, in the dtype of the logits, half precision in float32."""
    if logits_BNL.dtype in (torch.float16, torch.bfloat16):
        logits_BNL = logits_BNL.float()
    E = _routed_heads(logits_BNL.shape[2], shared, routed)
    wg, w0, w1 = logits_BNL.split([E, 2 if routed and shared else 0, shared if shared > 1 else 0], dim=2)
    shared_BNS = shared * w1.softmax(2) if shared > 1 else logits_BNL.new_ones(*logits_BNL.shape[:2], shared)
    if not routed:
        return shared_BNS, None
    scores = wg.softmax(2)
    mask = largest(scores, routed)
    chosen = scores * mask
    gates = routed * chosen / chosen.sum(2, keepdim=True)
    balance = E * (scores.mean((0, 1)) * mask.mean((0, 1))).sum()
    if not shared:
        return gates, balance
    alpha_1, alpha_2 = (2 * w0.softmax(2)).split(1, dim=2)
    return torch.cat([alpha_1 * shared_BNS, alpha_2 * gates], dim=2), balance


def largest(scores_BNE: Tensor, count: int) -> Tensor:
    """1 at the `count` largest scores of each token and 0 elsewhere; ties go to the lowest index.

    A stable sort, because the order of ties in torch.topk is unspecified and differs between devices.
    """
    order = scores_BNE.detach().sort(dim=-1, descending=True, stable=True).indices
    return torch.zeros_like(scores_BNE).scatter(-1, order[..., :count], 1.0)


def _routed_heads(logits: int, shared: int, routed: int) -> int:
    """E, from the number of logits."""
    return logits - (shared if shared > 1 else 0) - (2 if shared else 0) if routed else 0


def _check_router(logits: Tensor, shared: int, routed: int) -> None:
    if min(shared, routed) < 0 or shared + routed == 0:
        raise ValueError(
            f"{ROUTE}: shared and routed heads must be at least 0, and one of them above, got {shared} and {routed}; "
            "change them"
        )
    E = _routed_heads(logits.shape[-1], shared, routed)
    least = max(E, routed) + (shared if shared > 1 else 0) + (2 if shared and routed else 0)
    if logits.dim() != 3 or logits.shape[2] != least:
        raise ValueError(
            f"{ROUTE}: logits of {shared} shared and {routed} routed heads must be (B, N, {least}"
            f"{' or more' if routed else ''}), got {tuple(logits.shape)}; pass wg, w0 and w1 next to each other"
        )
    if not logits.is_floating_point():
        raise ValueError(f"{ROUTE}: logits must be floating, got {str(logits.dtype).removeprefix('torch.')}; cast them")


# Registration


def _forward(qkv, gates, scale, skip):
    from kernels.moh_attention import triton as fused

    return fused.forward(qkv, gates, scale, skip)


def _backward(grad, qkv, gates, out, lse, index, count, scale):
    from kernels.moh_attention import triton as fused

    return fused.backward(grad, qkv, gates, out, lse, index, count, scale)


def _route(logits, shared, routed):
    from kernels.moh_attention import triton as fused

    return fused.route(logits, shared, routed)


def _route_backward(grad, balance, logits, load, shared, routed):
    from kernels.moh_attention import triton as fused

    return fused.route_backward(grad, balance, logits, load, shared, routed)


def _fake_forward(qkv, gates, scale, skip):
    (B, N, C), M = qkv.shape, gates.shape[2]
    return (
        qkv.new_empty(B, N, C // 3),
        qkv.new_empty(B, M, N, dtype=torch.float32),
        qkv.new_empty(B, M, N if skip else 0, dtype=torch.int32),
        qkv.new_empty(B, M if skip else 0, dtype=torch.int32),
    )


def _fake_backward(grad, qkv, gates, out, lse, index, count, scale):
    return qkv.new_empty(qkv.shape), gates.new_empty(gates.shape)


def _fake_route(logits, shared, routed):
    B, N, L = logits.shape
    E = _routed_heads(L, shared, routed)
    return logits.new_empty(B, N, shared + E), logits.new_empty(()), logits.new_empty(E)


def _fake_route_backward(grad, balance, logits, load, shared, routed):
    return logits.new_empty(logits.shape)


def _flops(qkv, *_, out_shape=None, **__):
    """Of all heads: how many gates are 0 is not known on the host."""
    return 4 * qkv[0] * qkv[1] ** 2 * (qkv[2] // 3)


def _flops_backward(grad, *_, out_shape=None, **__):
    return 10 * grad[0] * grad[1] ** 2 * grad[2]


def _flops_route(logits, *_, out_shape=None, **__):
    return 10 * logits[0] * logits[1] * logits[2]


def _flops_route_backward(grad, balance, logits, *_, out_shape=None, **__):
    return 20 * logits[0] * logits[1] * logits[2]


forward_op = define(
    "moh_attention_forward(Tensor qkv, Tensor gates, float scale, bool skip) -> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _fake_forward,
    _flops,
)
backward_op = define(
    "moh_attention_backward(Tensor grad, Tensor qkv, Tensor gates, Tensor out, Tensor lse, Tensor index, Tensor count, "
    "float scale) -> (Tensor, Tensor)",
    _backward,
    _fake_backward,
    _flops_backward,
)
route_op = define(
    "route_heads_forward(Tensor logits, int shared, int routed) -> (Tensor, Tensor, Tensor)",
    _route,
    _fake_route,
    _flops_route,
)
route_backward_op = define(
    "route_heads_backward(Tensor grad, Tensor balance, Tensor logits, Tensor load, int shared, int routed) -> Tensor",
    _route_backward,
    _fake_route_backward,
    _flops_route_backward,
)


class _MoHAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, gates, scale, skip):
        out, *rest = forward_op(qkv, gates, scale, skip)
        ctx.save_for_backward(qkv, gates, out, *rest)
        ctx.scale = scale
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return *backward_op(grad, *ctx.saved_tensors, ctx.scale), None, None


class _RouteHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, shared, routed):
        gates, balance, load = route_op(logits, shared, routed)
        ctx.save_for_backward(logits, load)
        ctx.heads = shared, routed
        return gates, balance

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, balance):
        return route_backward_op(grad, balance, *ctx.saved_tensors, *ctx.heads), None, None


# Shapes for the tests and the benchmark


def inputs(
    device: str | torch.device,
    dtype: torch.dtype,
    seed: int = 0,
    *,
    batch: int,
    tokens: int,
    heads: int,
    head_dim: int,
    shared: int,
    active: int,
    skip: str = "auto",
    strided: bool = False,
    unused: int = 0,
) -> dict:
    """Keyword arguments of `moh_attention`.

    Of `heads`, `active` have a gate: the first `shared`, and for every token others at random. The last `unused` heads
    have none in any token. `strided` takes qkv out of wider rows.
    """
    generator = torch.Generator(device).manual_seed(seed)
    width = 3 * heads * head_dim
    qkv = torch.randn(batch, tokens, width + 16 * strided, generator=generator, device=device, dtype=dtype)[..., :width]
    scores = torch.rand(batch, tokens, heads, generator=generator, device=device)
    scores[..., :shared] += 1
    scores[..., heads - unused :] -= 1
    gates = torch.rand(batch, tokens, heads, generator=generator, device=device) + 0.5
    gates = torch.zeros_like(gates).scatter(2, scores.topk(active).indices, 1.0) * gates
    return {
        "qkv_BNC": qkv.detach().requires_grad_(),
        "gates_BNM": gates.requires_grad_(),
        "num_heads": heads,
        "skip": skip,
    }


def cost(
    itemsize: int, *, batch: int, tokens: int, heads: int, head_dim: int, active: int, skip: str = "auto", **_
) -> Cost:
    """Forward reads the gated queries, all keys and values, and writes the output; backward reads also output and
    gradient of what is gated, and writes the gradient of all. With skip="never" every head counts as gated."""
    active = heads if skip == "never" else active
    part = active / heads
    tensor, gates = batch * tokens * heads * head_dim * itemsize, batch * tokens * heads * 4
    flops = int(4 * batch * tokens**2 * active * head_dim)
    return Cost(int((3 + part) * tensor) + gates, int((5 + 3 * part) * tensor) + 2 * gates, flops, 5 * flops // 2)


def route_inputs(
    device: str | torch.device,
    dtype: torch.dtype,
    seed: int = 0,
    *,
    batch: int,
    tokens: int,
    experts: int,
    shared: int,
    routed: int,
) -> dict:
    """Keyword arguments of `route_heads`; the logits are float32 whatever the dtype."""
    generator = torch.Generator(device).manual_seed(seed)
    width = experts + (2 if shared else 0) + (shared if shared > 1 else 0)
    logits = torch.randn(batch, tokens, width, generator=generator, device=device)
    return {"logits_BNL": logits.requires_grad_(), "shared": shared, "routed": routed}


def route_cost(itemsize: int, *, batch: int, tokens: int, experts: int, shared: int, **_) -> Cost:
    logits, gates = experts + (2 if shared else 0) + (shared if shared > 1 else 0), experts + shared
    T = batch * tokens
    return Cost(4 * T * (logits + gates), 4 * T * (2 * logits + gates), 10 * T * logits, 20 * T * logits)


def _heads(tokens: int, head_dim: int, **shape) -> dict:
    return {"batch": 1, "tokens": tokens, "heads": 2, "head_dim": head_dim, "shared": 0, "active": 1, **shape}


CHECKS = {
    "7 tokens": _heads(7, 24, batch=2, heads=3, shared=1, active=2, skip="never"),
    "one token, skipped": _heads(1, 16, batch=2, heads=3, shared=1, active=2, skip="always"),
    "13 tokens, skipped": _heads(13, 48, batch=2, heads=3, active=2, skip="always"),
    "49 tokens, skipped, strided": _heads(49, 32, skip="always", strided=True),
    "63 tokens, strided": _heads(63, 72, skip="never", strided=True),
    "63 tokens, a head without tokens": _heads(63, 72, heads=3, active=2, unused=1, skip="always"),
    "100 tokens, skipped": _heads(100, 96, skip="always"),
    "100 tokens": _heads(100, 64, skip="never"),
    "63 tokens, all heads, skipped": _heads(63, 64, shared=2, active=2, skip="always"),
    "520 tokens": _heads(520, 16),
}
_VIT = {"heads": 12, "head_dim": 64, "shared": 4}
_DIT = {"heads": 16, "head_dim": 72, "shared": 6}
STAGES = {
    "ViT-B 196 tokens, 75 %": {"batch": 128, "tokens": 196, "active": 9, **_VIT},
    "ViT-B 1024 tokens, 75 %": {"batch": 32, "tokens": 1024, "active": 9, **_VIT},
    "ViT-B 4096 tokens, 75 %": {"batch": 8, "tokens": 4096, "active": 9, **_VIT},
    "ViT-B 4096 tokens, 50 %": {"batch": 8, "tokens": 4096, "active": 6, **_VIT},
    "ViT-B 4096 tokens, 50 %, one image": {"batch": 1, "tokens": 4096, "active": 6, **_VIT},
    "DiT-XL 256 tokens, 75 %": {"batch": 32, "tokens": 256, "active": 12, **_DIT},
    "DiT-XL 1024 tokens, 75 %": {"batch": 8, "tokens": 1024, "active": 12, **_DIT},
    "DiT-XL 4096 tokens, 50 %": {"batch": 8, "tokens": 4096, "active": 8, **_DIT},
}
ROUTE_CHECKS = {
    "one token": {"batch": 1, "tokens": 1, "experts": 2, "shared": 1, "routed": 1},
    "7 tokens": {"batch": 2, "tokens": 7, "experts": 8, "shared": 4, "routed": 5},
    "100 tokens, none shared": {"batch": 2, "tokens": 100, "experts": 6, "shared": 0, "routed": 3},
    "13 tokens, all routed": {"batch": 3, "tokens": 13, "experts": 3, "shared": 2, "routed": 3},
    "63 tokens, 32 heads": {"batch": 1, "tokens": 63, "experts": 27, "shared": 5, "routed": 16},
}
ROUTE_STAGES = {
    "ViT-B 196 tokens, 75 %": {"batch": 128, "tokens": 196, "experts": 8, "shared": 4, "routed": 5},
    "TransNeXt-B stage 4, 75 %": {"batch": 128, "tokens": 49, "experts": 27, "shared": 5, "routed": 16},
    "DiT-XL 256 tokens, 90 %": {"batch": 32, "tokens": 256, "experts": 7, "shared": 9, "routed": 5},
    "ViT-B 4096 tokens, 50 %": {"batch": 8, "tokens": 4096, "experts": 8, "shared": 4, "routed": 2},
    "ViT-B 196 tokens, one image": {"batch": 1, "tokens": 196, "experts": 8, "shared": 4, "routed": 5},
}


def _official(qkv_BNC: Tensor, gates_BNM: Tensor, num_heads: int, **_) -> Tensor:
    """As the authors' code does it: attention with its matrix for all heads, then an einsum with the gates."""
    q, k, v = qkv_BNC.unflatten(2, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)
    p = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1)
    o_BNMD = (p @ v).transpose(1, 2)
    return torch.einsum("bne,bned->bned", gates_BNM.to(o_BNMD.dtype), o_BNMD).flatten(2)


def _dense(qkv_BNC: Tensor, gates_BNM: Tensor, num_heads: int, **_) -> Tensor:
    q, k, v = qkv_BNC.unflatten(2, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def _route_official(logits_BNL: Tensor, shared: int, routed: int) -> tuple[Tensor, Tensor]:
    """As the authors' code does it: torch.topk, a one-hot tensor (B·N, K, E) of integers, one step per operation."""
    E = _routed_heads(logits_BNL.shape[2], shared, routed)
    wg, w0, w1 = logits_BNL.flatten(0, 1).split([E, 2 if shared else 0, shared if shared > 1 else 0], dim=1)
    scores = wg.softmax(1)
    mask = F.one_hot(scores.topk(routed, dim=1).indices, E).sum(1)
    balance = (scores.mean(0) * mask.float().mean(0)).mean() * E**2
    gates = scores * mask
    gates = gates / gates.sum(1, keepdim=True).clamp_min(torch.finfo(gates.dtype).eps) * routed
    if shared:
        shared_gates = w1.softmax(1) * shared if shared > 1 else torch.ones_like(wg[:, :1])
        alphas = w0.softmax(1) * 2
        gates = torch.cat([alphas[:, :1] * shared_gates, alphas[:, 1:] * gates], dim=1)
    return gates.unflatten(0, logits_BNL.shape[:2]), balance


OPERATION = Operation(
    name=WHO,
    run=moh_attention,
    reference=reference,
    inputs=inputs,
    checks=CHECKS,
    stages=STAGES,
    cost=cost,
    baselines={"official": _official, "pytorch": reference, "sdpa": _dense},
)
ROUTER = Operation(
    name=ROUTE,
    run=route_heads,
    reference=route_reference,
    inputs=route_inputs,
    checks=ROUTE_CHECKS,
    stages=ROUTE_STAGES,
    cost=route_cost,
    baselines={"official": _route_official, "pytorch": route_reference},
)
OPERATIONS = (OPERATION, ROUTER)
