"""Inputs, shapes, least work and baselines of cross-covariance attention, for the tests and the benchmark."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.cross_covariance import WHO, cross_covariance
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
) -> dict:
    """Keyword arguments of `cross_covariance`; `strided` takes the projection out of a wider tensor."""
    generator = torch.Generator(device).manual_seed(seed)
    width = 3 * dim + (16 if strided else 0)
    qkv = torch.randn(batch, tokens, width, generator=generator, device=device, dtype=dtype)[..., width - 3 * dim :]
    temperature = 2 + torch.randn(heads, generator=generator, device=device)
    given = {"qkv_BNC": qkv.detach(), "temperature_M": temperature.to(dtype)}
    return {name: t.requires_grad_() for name, t in given.items()} | {"num_heads": heads}


def cost(itemsize: int, *, batch: int, tokens: int, dim: int, heads: int, **_) -> Cost:
    """Forward reads q, k, v and writes o; backward reads q, k, v and the gradient and writes those of q, k, v.

    What is kept for backward is left out: it is 2 D / N of one tensor.
    """
    tensor = batch * tokens * dim
    flops = 4 * tensor * (dim // heads)
    return Cost(4 * tensor * itemsize, 7 * tensor * itemsize, flops, 2 * flops)


CHECKS = {
    "49 tokens, width 32, three heads": {"batch": 2, "tokens": 49, "dim": 96, "heads": 3},
    "one token": {"batch": 1, "tokens": 1, "dim": 32, "heads": 2},
    "7 tokens, width 16": {"batch": 2, "tokens": 7, "dim": 96, "heads": 6},
    "63 tokens, width 24": {"batch": 1, "tokens": 63, "dim": 72, "heads": 3, "strided": True},
    "100 tokens, width 48": {"batch": 2, "tokens": 100, "dim": 96, "heads": 2},
    "13 tokens, width 72": {"batch": 1, "tokens": 13, "dim": 72, "heads": 1},
    "65 tokens, width 96": {"batch": 1, "tokens": 65, "dim": 96, "heads": 1},
}
STAGES = {
    "224 px, patches of 16 (XCiT-T)": {"batch": 128, "tokens": 196, "dim": 192, "heads": 4},
    "224 px, patches of 8 (XCiT-T)": {"batch": 128, "tokens": 784, "dim": 192, "heads": 4},
    "224 px, patches of 16 (XCiT-M)": {"batch": 128, "tokens": 196, "dim": 512, "heads": 8},
    "384 px, patches of 8 (XCiT-L)": {"batch": 32, "tokens": 2304, "dim": 768, "heads": 16},
}


def _as_authors(qkv_BNC: Tensor, temperature_M: Tensor, num_heads: int) -> Tensor:
    """As the authors' code does it: channels become rows, and every change of layout is a copy."""
    qkv = qkv_BNC.reshape(*qkv_BNC.shape[:2], 3, num_heads, -1).permute(2, 0, 3, 4, 1)
    q, k, v = (part.contiguous() for part in qkv)
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    weights = (q @ k.mT * temperature_M[:, None, None]).softmax(-1, dtype=torch.float32).to(v.dtype)
    return (weights @ v).permute(0, 3, 1, 2).reshape(*qkv_BNC.shape[:2], -1)


OPERATION = Operation(
    name=WHO,
    run=cross_covariance,
    inputs=inputs,
    checks=CHECKS,
    stages=STAGES,
    cost=cost,
    baselines={"official": _as_authors},
)
