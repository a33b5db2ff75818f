"""Inputs, shapes, least work and baselines of dense attention with other weights, for the tests and the benchmark."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.dense_attention import CLIPPED, SIGMOID, clipped_attention, sigmoid_attention
from kernels.operation import Cost, Operation, in_pytorch


def _qkv(device, dtype, seed: int, batch: int, tokens: int, heads: int, head_dim: int, strided: bool) -> Tensor:
    """A packed projection; `strided` takes it out of wider rows."""
    generator = torch.Generator(device).manual_seed(seed)
    width = 3 * heads * head_dim
    qkv = torch.randn(batch, tokens, width + 16 * strided, generator=generator, device=device, dtype=dtype)
    return qkv[..., :width].detach().requires_grad_()


def sigmoid_inputs(
    device: str | torch.device,
    dtype: torch.dtype,
    seed: int = 0,
    *,
    batch: int,
    tokens: int,
    heads: int,
    head_dim: int,
    learned: bool = False,
    strided: bool = False,
) -> dict:
    """Keyword arguments of `sigmoid_attention`: a bias of -log N, or with `learned` around it, one for each head."""
    bias: float | Tensor = -math.log(tokens)
    if learned:
        bias = (torch.linspace(-1, 1, heads, device=device).view(heads, 1, 1) - math.log(tokens)).requires_grad_()
    qkv = _qkv(device, dtype, seed, batch, tokens, heads, head_dim, strided)
    return {"qkv_BNC": qkv, "num_heads": heads, "bias": bias, "factor": 1.5}


def clipped_inputs(
    device: str | torch.device,
    dtype: torch.dtype,
    seed: int = 0,
    *,
    batch: int,
    tokens: int,
    heads: int,
    head_dim: int,
    gamma: float | None = None,
    zeta: float = 1.0,
    strided: bool = False,
) -> dict:
    """Keyword arguments of `clipped_attention`, with γ = -1 / 2 N by default."""
    gamma = -0.5 / tokens if gamma is None else gamma
    qkv = _qkv(device, dtype, seed, batch, tokens, heads, head_dim, strided)
    return {"qkv_BNC": qkv, "num_heads": heads, "gamma": gamma, "zeta": zeta}


def sigmoid_cost(itemsize: int, *, batch: int, tokens: int, heads: int, head_dim: int, learned: bool = False, **_):
    """Forward reads queries, keys and values and writes the output; backward reads them and the gradient."""
    tensor, flops = batch * tokens * heads * head_dim * itemsize, 4 * batch * tokens**2 * heads * head_dim
    return Cost(4 * tensor + 4 * heads * learned, 7 * tensor + 8 * heads * learned, flops, 5 * flops // 2)


def clipped_cost(itemsize: int, *, batch: int, tokens: int, heads: int, **shape) -> Cost:
    """As with sigmoid weights, and a statistic of each row."""
    least = sigmoid_cost(itemsize, batch=batch, tokens=tokens, heads=heads, head_dim=shape["head_dim"])
    statistic = 4 * batch * tokens * heads
    return least._replace(
        forward_bytes=least.forward_bytes + statistic, backward_bytes=least.backward_bytes + statistic
    )


def _check(tokens: int, head_dim: int, **shape) -> dict:
    return {"batch": 1, "tokens": tokens, "heads": 2, "head_dim": head_dim, **shape}


SIGMOID_CHECKS = {
    "7 tokens, learned": _check(7, 24, batch=2, heads=3, learned=True),
    "one token": _check(1, 16, batch=2),
    "49 tokens, strided": _check(49, 32, strided=True),
    "63 tokens, learned, strided": _check(63, 72, heads=3, learned=True, strided=True),
    "64 tokens": _check(64, 96),
    "100 tokens": _check(100, 128, heads=1),
    "150 tokens, learned": _check(150, 64, heads=1, learned=True),
}
CLIPPED_CHECKS = {
    "7 tokens": _check(7, 24, batch=2, heads=3),
    "one token": _check(1, 16, batch=2),
    "49 tokens, both ends, strided": _check(49, 32, gamma=-0.03, zeta=1.03, strided=True),
    "63 tokens, strided": _check(63, 72, heads=3, strided=True),
    "64 tokens, nothing clipped": _check(64, 96, gamma=0.0),
    "100 tokens": _check(100, 128, heads=1),
    "150 tokens, both ends": _check(150, 64, heads=1, gamma=-0.003, zeta=1.1),
}
STAGES = {
    "ViT-B 196 tokens": {"batch": 128, "tokens": 196, "heads": 12, "head_dim": 64},
    "ViT-S 1024 tokens": {"batch": 32, "tokens": 1024, "heads": 6, "head_dim": 64},
    "DiT-XL 256 tokens": {"batch": 32, "tokens": 256, "heads": 16, "head_dim": 72},
    "ViT-B 196 tokens, one image": {"batch": 1, "tokens": 196, "heads": 12, "head_dim": 64},
}


def _heads(qkv_BNC: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    return qkv_BNC.unflatten(2, (3, num_heads, -1)).permute(2, 0, 3, 1, 4).unbind()


def _sigmoid_official(qkv_BNC: Tensor, num_heads: int, bias: float | Tensor, factor: float, **_) -> Tensor:
    """As the authors' eager code does it, with the matrix."""
    q, k, v = _heads(qkv_BNC, num_heads)
    weights = torch.sigmoid((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1) * factor + bias)
    return (weights.to(v.dtype) @ v).transpose(1, 2).flatten(2)


def _clipped_official(qkv_BNC: Tensor, num_heads: int, gamma: float, zeta: float, **_) -> Tensor:
    """As the authors' code does it, with the matrix: softmax, stretched, clipped."""
    q, k, v = _heads(qkv_BNC, num_heads)
    weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
    return (torch.clip(weights * (zeta - gamma) + gamma, 0, 1) @ v).transpose(1, 2).flatten(2)


def _dense(qkv_BNC: Tensor, num_heads: int, **_) -> Tensor:
    return F.scaled_dot_product_attention(*_heads(qkv_BNC, num_heads)).transpose(1, 2).flatten(2)


SIGMOID_OPERATION = Operation(
    name=SIGMOID,
    run=sigmoid_attention,
    inputs=sigmoid_inputs,
    checks=SIGMOID_CHECKS,
    stages=STAGES,
    cost=sigmoid_cost,
    baselines={"official": _sigmoid_official, "pytorch": in_pytorch(sigmoid_attention), "sdpa": _dense},
)
CLIPPED_OPERATION = Operation(
    name=CLIPPED,
    run=clipped_attention,
    inputs=clipped_inputs,
    checks=CLIPPED_CHECKS,
    stages=STAGES,
    cost=clipped_cost,
    baselines={"official": _clipped_official, "pytorch": in_pytorch(clipped_attention), "sdpa": _dense},
)
OPERATIONS = (SIGMOID_OPERATION, CLIPPED_OPERATION)
