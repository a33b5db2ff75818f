"""Inputs, shapes, least work and baselines of aggregated attention, for the tests and the benchmark."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.aggregated_attention import WHO, aggregated_attention, inside_map
from kernels.aggregated_attention.constants import EPSILON
from kernels.operation import Cost, Operation, in_pytorch


def inputs(
    device: str | torch.device,
    dtype: torch.dtype,
    seed: int = 0,
    *,
    batch: int,
    grid: tuple[int, int],
    pool: int,
    heads: int,
    head_dim: int = 24,
    window: int = 3,
    gates: bool = False,
    strided: bool = False,
) -> dict:
    """Keyword arguments of `aggregated_attention`; `pool` is P, `strided` takes qkv out of a wider tensor."""
    generator = torch.Generator(device).manual_seed(seed)
    tokens, T, width = grid[0] * grid[1], window**2, heads * head_dim

    def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    def parameter(*shape: int, spread: float = 1.0, middle: float = 0.0) -> Tensor:
        return (middle + spread * random(*shape)).requires_grad_()

    qkv = random(batch, tokens, 3 * width + 16 * strided, dtype=dtype)[..., 16 * strided :]
    return {
        "qkv_BNC": qkv.detach().requires_grad_(),
        "kv_pool_BPC": random(batch, pool, 2 * width, dtype=dtype).requires_grad_(),
        "scale_M": parameter(heads, spread=0.1, middle=1 / 0.24),
        "query_embedding_MD": parameter(heads, head_dim, spread=0.1),
        "local_bias_MT": parameter(heads, T, spread=0.5),
        "pool_bias_MNP": parameter(heads, tokens, pool, spread=0.5),
        "tokens_MDT": parameter(heads, head_dim, T, spread=0.2),
        "token_bias_MT": parameter(heads, T, spread=0.2),
        "grid": grid,
        "num_heads": heads,
        "window": window,
        "gates_BNM": parameter(batch, tokens, heads, spread=0.3, middle=1.0) if gates else None,
    }


def cost(
    itemsize: int,
    *,
    batch: int,
    grid: tuple[int, int],
    pool: int,
    heads: int,
    head_dim: int = 24,
    window: int = 3,
    gates: bool = False,
    **_,
) -> Cost:
    """Forward reads q, k, v, the pooled map and its bias, and writes o; backward also reads the gradient and writes
    those of all."""
    tokens = batch * grid[0] * grid[1]
    map_, pooled = tokens * heads * head_dim * itemsize, batch * pool * heads * head_dim * itemsize
    bias, gate = 4 * heads * grid[0] * grid[1] * pool, 4 * tokens * heads * gates
    pairs = 2 * tokens * heads * head_dim
    return Cost(
        4 * map_ + 2 * pooled + bias + gate,
        7 * map_ + 4 * pooled + 2 * bias + 2 * gate,
        pairs * (2 * pool + 3 * window**2),
        pairs * (5 * pool + 8 * window**2),
    )


CHECKS = {
    "3x5, 3 pooled, gates": {"batch": 1, "grid": (3, 5), "pool": 3, "heads": 1, "gates": True},
    "one token": {"batch": 1, "grid": (1, 1), "pool": 1, "heads": 1, "head_dim": 8},
    "2 images, 2 heads": {
        **{"batch": 2, "grid": (2, 3), "pool": 16, "heads": 2, "head_dim": 12, "window": 1, "strided": True},
    },
    "5x5 window on 4x5": {"batch": 1, "grid": (4, 5), "pool": 5, "heads": 1, "head_dim": 16, "window": 5},
    "3x7, 67 pooled, gates": {"batch": 1, "grid": (3, 7), "pool": 67, "heads": 1, "head_dim": 40, "gates": True},
}


def _stages(batch: int, side: int, heads: int, pool: int, **options) -> dict:
    """The three stages with this mixer: half the side, twice the heads, as many pooled tokens."""
    return {
        stage: {"batch": batch, "grid": (side >> stage - 1,) * 2, "pool": pool, "heads": heads << stage - 1, **options}
        for stage in (1, 2, 3)
    }


TINY, BASE = _stages(128, 56, 3, 49), _stages(128, 56, 4, 49)
STAGES = {
    **{f"3x3 224 px stage {stage} (TransNeXt-T)": shape for stage, shape in TINY.items()},
    **{f"3x3 224 px stage {stage} (TransNeXt-B)": BASE[stage] for stage in (1, 3)},
    "3x3 gates 224 px stage 3 (MoH-ViT-B)": {**BASE[3], "gates": True},
    **{f"3x3 512 px stage {stage} (TransNeXt-T)": _stages(16, 128, 3, 256)[stage] for stage in (1, 3)},
    "3x3 224 px stage 1, one image": {**TINY[1], "batch": 1},
}


def _official(
    qkv_BNC: Tensor,
    kv_pool_BPC: Tensor,
    scale_M: Tensor,
    query_embedding_MD: Tensor,
    local_bias_MT: Tensor,
    pool_bias_MNP: Tensor,
    tokens_MDT: Tensor,
    token_bias_MT: Tensor,
    grid: tuple[int, ...],
    num_heads: int,
    window: int = 3,
    gates_BNM: Tensor | None = None,
) -> Tensor:
    """As the authors' code does it without its extension: T copies of keys and values, by `unfold`."""
    dtype = qkv_BNC.dtype
    q, k, v = qkv_BNC.unflatten(2, (3, num_heads, -1)).unbind(2)
    k_pool, v_pool = kv_pool_BPC.unflatten(2, (2, num_heads, -1)).permute(2, 0, 3, 1, 4)
    q = F.normalize(q.transpose(1, 2).float(), dim=-1, eps=EPSILON)
    inside_NT = inside_map(grid, window, q.device)
    keys_N1 = (inside_NT.sum(1, keepdim=True) + k_pool.shape[2]).float()
    scaled = (q + query_embedding_MD[:, None]) * scale_M[:, None, None] * keys_N1.log()
    k = F.normalize(k.float(), dim=-1, eps=EPSILON)
    kv = torch.cat([k.flatten(2), v.flatten(2).float()], dim=2).mT.unflatten(2, tuple(grid[:2]))
    copies = F.unfold(kv, window, padding=window // 2).unflatten(1, (2, num_heads, -1, window**2))
    k_BMNDT, v_BMNDT = copies.permute(1, 0, 2, 5, 3, 4)
    local = (scaled.unsqueeze(3) @ k_BMNDT).squeeze(3) + local_bias_MT[:, None]
    local = local.masked_fill(~inside_NT, float("-inf"))
    pooled = scaled @ F.normalize(k_pool.float(), dim=-1, eps=EPSILON).mT + pool_bias_MNP
    local, pooled = torch.cat([local, pooled], dim=-1).softmax(-1).split([window**2, k_pool.shape[2]], dim=-1)
    weights = q @ tokens_MDT + token_bias_MT[:, None] + local
    o = (weights.unsqueeze(3) @ v_BMNDT.mT).squeeze(3) + pooled @ v_pool.float()
    o_BNMD = o.transpose(1, 2)
    if gates_BNM is not None:
        o_BNMD = torch.einsum("bne,bned->bned", gates_BNM, o_BNMD)
    return o_BNMD.flatten(2).to(dtype)


OPERATION = Operation(
    name=WHO,
    run=aggregated_attention,
    inputs=inputs,
    checks=CHECKS,
    stages=STAGES,
    cost=cost,
    baselines={"official": _official, "pytorch": in_pytorch(aggregated_attention)},
)
