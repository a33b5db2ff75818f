"""Inputs, shapes, least work and baselines of attention with routed heads, for the tests and the benchmark."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.moh_attention import ROUTE, WHO, moh_attention, route_heads
from kernels.moh_attention.register import routed_heads
from kernels.operation import Cost, Operation, in_pytorch


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
    E = routed_heads(logits_BNL.shape[2], shared, routed)
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
    inputs=inputs,
    checks=CHECKS,
    stages=STAGES,
    cost=cost,
    baselines={"official": _official, "pytorch": in_pytorch(moh_attention), "sdpa": _dense},
)
ROUTER = Operation(
    name=ROUTE,
    run=route_heads,
    inputs=route_inputs,
    checks=ROUTE_CHECKS,
    stages=ROUTE_STAGES,
    cost=route_cost,
    baselines={"official": _route_official, "pytorch": in_pytorch(route_heads)},
)
OPERATIONS = (OPERATION, ROUTER)
