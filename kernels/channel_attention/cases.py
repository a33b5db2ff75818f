"""Inputs, shapes, least work and baselines of channel attention, for the tests and the benchmark."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.channel_attention import (
    WHO,
    channel_attention,
)
from kernels.operation import Cost, Operation


def inputs(
    device: str | torch.device,
    dtype: torch.dtype,
    seed: int = 0,
    *,
    batch: int,
    tokens: int,
    dim: int,
    heads: int,
    strided: bool = False,
    scale: float | None = None,
) -> dict:
    """Keyword arguments of `channel_attention`; `strided` takes the projection out of a wider tensor."""
    generator = torch.Generator(device).manual_seed(seed)
    width = 3 * dim + (16 if strided else 0)
    qkv = torch.randn(batch, tokens, width, generator=generator, device=device, dtype=dtype)[..., width - 3 * dim :]
    return {"qkv_BNC": qkv.detach().requires_grad_(), "num_heads": heads, "scale": scale}


def cost(itemsize: int, *, batch: int, tokens: int, dim: int, heads: int, **_) -> Cost:
    """Forward reads q, k, v and writes o; backward reads q, k, v and the gradient and writes those of q, k, v.

    The weights kept for backward are left out: they are 2 D / N of one tensor.
    """
    tensor = batch * tokens * dim
    flops = 4 * tensor * (dim // heads)
    return Cost(4 * tensor * itemsize, 7 * tensor * itemsize, flops, 2 * flops)


CHECKS = {
    "49 tokens, width 32, three heads": {"batch": 2, "tokens": 49, "dim": 96, "heads": 3},
    "one token": {"batch": 1, "tokens": 1, "dim": 32, "heads": 2},
    "7 tokens, width 16": {"batch": 2, "tokens": 7, "dim": 96, "heads": 6},
    "63 tokens, width 24": {"batch": 1, "tokens": 63, "dim": 72, "heads": 3, "strided": True},
    "100 tokens, width 48": {"batch": 2, "tokens": 100, "dim": 96, "heads": 2, "scale": 0.1},
    "100 tokens, width 64": {"batch": 1, "tokens": 100, "dim": 128, "heads": 2},
    "300 tokens in parts, width 32": {"batch": 1, "tokens": 300, "dim": 64, "heads": 2, "strided": True},
    "13 tokens, width 72": {"batch": 1, "tokens": 13, "dim": 72, "heads": 1},
    "259 tokens in parts, width 96": {"batch": 1, "tokens": 259, "dim": 96, "heads": 1},
}
STAGES = {
    "224 px stage 1 (DaViT-B)": {"batch": 128, "tokens": 3136, "dim": 128, "heads": 4},
    "224 px stage 2 (DaViT-B)": {"batch": 128, "tokens": 784, "dim": 256, "heads": 8},
    "224 px stage 3 (DaViT-B)": {"batch": 128, "tokens": 196, "dim": 512, "heads": 16},
    "224 px stage 4 (DaViT-B)": {"batch": 128, "tokens": 49, "dim": 1024, "heads": 32},
    "224 px stage 1 (DaViT-T)": {"batch": 128, "tokens": 3136, "dim": 96, "heads": 3},
    "224 px stage 3 (DaViT-T)": {"batch": 128, "tokens": 196, "dim": 384, "heads": 12},
    "512 px stage 1": {"batch": 16, "tokens": 16384, "dim": 128, "heads": 4},
    "512 px stage 3": {"batch": 16, "tokens": 1024, "dim": 512, "heads": 16},
    "1024 px stage 1": {"batch": 4, "tokens": 65536, "dim": 128, "heads": 4},
    "1024 px stage 3": {"batch": 4, "tokens": 4096, "dim": 512, "heads": 16},
    "224 px stage 1, one image": {"batch": 1, "tokens": 3136, "dim": 128, "heads": 4},
    "224 px stage 3, one image": {"batch": 1, "tokens": 196, "dim": 512, "heads": 16},
}


def _split(qkv_BNC: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v as (B, M, N, D), copied as the authors' code does before its matrix products."""
    qkv = qkv_BNC.reshape(*qkv_BNC.shape[:2], 3, num_heads, -1).permute(2, 0, 3, 1, 4)
    return qkv[0].contiguous(), qkv[1].contiguous(), qkv[2].contiguous()


def _as_authors(qkv_BNC: Tensor, num_heads: int, scale: float | None = None) -> Tensor:
    """As the authors' code does it, softmax in float32 as under autocast: every layout change is a copy."""
    q, k, v = _split(qkv_BNC, num_heads)
    scores = (k * (q.shape[-1] ** -0.5 if scale is None else scale)).transpose(-1, -2) @ v
    o = scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ q.transpose(-1, -2)
    return o.transpose(-1, -2).transpose(1, 2).reshape(*qkv_BNC.shape[:2], -1)


def _batched(qkv_BNC: Tensor, num_heads: int, scale: float | None = None) -> Tensor:
    """Matrix products on views of the projection, and the result in the order of the tokens."""
    q, k, v = (t.unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in qkv_BNC.chunk(3, dim=-1))
    scores = (k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)) @ v
    return (q @ scores.softmax(-1).mT).transpose(1, 2).flatten(2)


def _dense(qkv_BNC: Tensor, num_heads: int, scale: float | None = None) -> Tensor:
    """Attention of tokens on tokens."""
    q, k, v = (t.unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in qkv_BNC.chunk(3, dim=-1))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


OPERATION = Operation(
    name=WHO,
    run=channel_attention,
    inputs=inputs,
    checks=CHECKS,
    stages=STAGES,
    cost=cost,
    baselines={"official": _as_authors, "pytorch": _batched, "sdpa": _dense},
)
