"""Aggregated attention: every token sees its neighbours and a pooled map, in one softmax; what TransNeXt mixes with.

With q̂ = q/‖q‖, k̂ = k/‖k‖, n_i the number of neighbours of token i that are in the map, plus P, and per head a scale τ,
a query embedding e, biases b and B, learned tokens t and their bias c:

    s_ij = τ log(n_i) (q̂_i + e)·k̂_j + b_j        for the T neighbours j of i, -inf outside of the map
    s_ip = τ log(n_i) (q̂_i + e)·k̂_p + B_ip       for the P pooled tokens p
    a_i = softmax(s_i)                            over both
    o_i = Σ_j (a_ij + q̂_i·t_j + c_j) v_j + Σ_p a_ip v_p

v is 0 outside of the map. The learned tokens see the unscaled query and take no part in the softmax. Gates of a mixture
of heads multiply o.

Source: TransNeXt, Shi, CVPR 2024, arXiv:2311.17132, section 3.1; gates: MoH, Jin et al., ICML 2025,
arXiv:2410.11842.
Shapes: B = batch, N = H·W tokens, C = M·D channels, M = heads, D = channels per head, P = pooled tokens,
T = window² neighbours in row-major order, the token itself in the middle.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.dispatch import autocast, check_head_dim, check_tensors, is_fused
from kernels.operation import Cost, Operation
from kernels.registration import define

WHO = "aggregated_attention"
# Below the norm of any query in use, and large enough for finite gradients at an all-zero token.
EPSILON = 1e-6


def aggregated_attention(
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
    backend: str = "auto",
) -> Tensor:
    """Attention to neighbours and pooled tokens, (B, N, M·D) in the dtype of qkv. Logits are computed in float32.

    Args:
        qkv_BNC: (B, N, 3·M·D), the packed projection: queries, keys and values, each M heads × D. May be strided.
        kv_pool_BPC: (B, P, 2·M·D), keys and values of the pooled tokens, P ≥ 1.
        scale_M: (M,), τ. As all parameters below, any floating dtype.
        query_embedding_MD: (M, D), e.
        local_bias_MT: (M, T), b.
        pool_bias_MNP: (M, N, P), B.
        tokens_MDT: (M, D, T), t.
        token_bias_MT: (M, T), c.
        grid: (height, width) of the map; prefix tokens have no place in it.
        num_heads: M.
        window: side of the neighbourhood, odd.
        gates_BNM: (B, N, M) factors of the outputs, or None.
        backend: "auto", "triton" or "torch".

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together, an even window, or heads of more than 128
            channels on the fused path.
    """
    parameters = (scale_M, query_embedding_MD, local_bias_MT, pool_bias_MNP, tokens_MDT, token_bias_MT, gates_BNM)
    _check(qkv_BNC, kv_pool_BPC, parameters, grid, num_heads, window)
    fused = is_fused(WHO, backend, qkv_BNC)
    qkv_BNC, kv_pool_BPC = autocast(qkv_BNC, kv_pool_BPC)
    if not fused:
        return reference(qkv_BNC, kv_pool_BPC, *parameters[:-1], grid, num_heads, window, gates_BNM)
    check_tensors(WHO, {"qkv": qkv_BNC, "kv_pool": kv_pool_BPC}, dict(zip(_PARAMETERS, parameters, strict=True)))
    check_head_dim(WHO, qkv_BNC.shape[2] // (3 * num_heads))
    return _AggregatedAttention.apply(qkv_BNC, kv_pool_BPC, *parameters, *grid[:2], window)


def reference(
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
    """The definition in plain PyTorch, in float32 or wider.

    The neighbours of all tokens at one offset are a view of the keys, shifted in the row-major order of the map; what
    comes from the other side of the map by that is masked. So keys and values are never copied per neighbour, and
    backward needs q̂, k̂ and v once.
    """
    device, dtype = qkv_BNC.device.type, torch.promote_types(qkv_BNC.dtype, torch.float32)
    with torch.autocast(device if device != "meta" else "cpu", enabled=False):
        q, k, v = qkv_BNC.to(dtype).unflatten(2, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)
        k_pool, v_pool = kv_pool_BPC.to(dtype).unflatten(2, (2, num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, k_pool = (F.normalize(t, dim=-1, eps=EPSILON) for t in (q, k, k_pool))
        inside_NT = _inside(grid, window, q.device)
        keys_N = inside_NT.sum(1) + k_pool.shape[2]
        scale_MN1 = (scale_M.to(dtype)[:, None] * keys_N.to(dtype).log()).unsqueeze(-1)
        scaled = (q + query_embedding_MD.to(dtype)[:, None]) * scale_MN1
        local = torch.stack([(scaled * k_j).sum(-1) for k_j in _neighbours(k, grid, window)], dim=-1)
        local = (local + local_bias_MT.to(dtype)[:, None]).masked_fill(~inside_NT, float("-inf"))
        pooled = scaled @ k_pool.mT + pool_bias_MNP.to(dtype)
        local, pooled = torch.cat([local, pooled], dim=-1).softmax(-1).split([window**2, k_pool.shape[2]], dim=-1)
        learned = q @ tokens_MDT.to(dtype) + token_bias_MT.to(dtype)[:, None]
        weights_BMNT = local + learned * inside_NT
        o_BMND = pooled @ v_pool
        for weight, v_j in zip(weights_BMNT.split(1, dim=-1), _neighbours(v, grid, window), strict=True):
            o_BMND = o_BMND + weight * v_j
        if gates_BNM is not None:
            o_BMND = o_BMND * gates_BNM.to(dtype).transpose(1, 2).unsqueeze(-1)
        return o_BMND.transpose(1, 2).flatten(2).to(qkv_BNC.dtype)


def _neighbours(x_BMND: Tensor, grid: tuple[int, ...], window: int) -> list[Tensor]:
    """Views of x, one per offset; what is outside of the map is 0, or a token from the other side of the map."""
    radius, tokens = window // 2, x_BMND.shape[2]
    margin = radius * (grid[1] + 1)
    padded = F.pad(x_BMND, (0, 0, margin, margin))
    starts = (y * grid[1] + x + margin for y in range(-radius, radius + 1) for x in range(-radius, radius + 1))
    return [padded.narrow(2, start, tokens) for start in starts]


def _inside(grid: tuple[int, ...], window: int, device: torch.device) -> Tensor:
    """Which neighbours of which token are in the map: bool (N, T)."""
    offsets = torch.arange(window, device=device) - window // 2
    y, x = (torch.arange(side, device=device)[:, None] + offsets for side in grid[:2])
    y, x = (y >= 0) & (y < grid[0]), (x >= 0) & (x < grid[1])
    return (y[:, None, :, None] & x[:, None]).flatten(0, 1).flatten(1, 2)


_PARAMETERS = ("scale", "query_embedding", "local_bias", "pool_bias", "tokens", "token_bias", "gates")


def _check(
    qkv: Tensor, kv_pool: Tensor, parameters: tuple[Tensor | None, ...], grid: tuple[int, ...], heads: int, window: int
) -> None:
    if len(grid) > 2 and grid[2]:
        raise ValueError(
            f"{WHO}: a neighbourhood has no prefix tokens, got {grid[2]}; pass the tokens of the map alone"
        )
    if qkv.dim() != 3 or qkv.shape[1] != grid[0] * grid[1]:
        raise ValueError(
            f"{WHO}: qkv must be (B, {grid[0]}*{grid[1]}, 3C), got {tuple(qkv.shape)}; pass the grid of this map"
        )
    if heads < 1 or not qkv.shape[2] or qkv.shape[2] % (3 * heads):
        raise ValueError(
            f"{WHO}: qkv must be 3 x heads x head width wide, got {qkv.shape[2]} for {heads} heads; project to 3C"
        )
    B, N, D = *qkv.shape[:2], qkv.shape[2] // (3 * heads)
    if kv_pool.dim() != 3 or kv_pool.shape[0] != B or kv_pool.shape[2] != 2 * heads * D or not kv_pool.shape[1]:
        raise ValueError(
            f"{WHO}: kv_pool must be ({B}, P, {2 * heads * D}) with P >= 1, got {tuple(kv_pool.shape)}; "
            "project the pooled map to keys and values"
        )
    if window < 1 or window % 2 == 0:
        raise ValueError(f"{WHO}: window must be odd, got {window}; a neighbourhood has its token in the middle")
    P, T = kv_pool.shape[1], window**2
    shapes = ((heads,), (heads, D), (heads, T), (heads, N, P), (heads, D, T), (heads, T), (B, N, heads))
    for name, parameter, shape in zip(_PARAMETERS, parameters, shapes, strict=True):
        if parameter is not None and (tuple(parameter.shape) != shape or not parameter.is_floating_point()):
            raise ValueError(
                f"{WHO}: {name} must be {shape} and floating, got {tuple(parameter.shape)} "
                f"{str(parameter.dtype).removeprefix('torch.')}; see the shapes of the function"
            )


# Registration


def _forward(qkv, kv_pool, scale, embedding, local_bias, pool_bias, tokens, token_bias, gates, height, width, window):
    from kernels.aggregated_attention import triton as fused

    parameters = (scale, embedding, local_bias, pool_bias, tokens, token_bias, gates)
    return fused.forward(qkv, kv_pool, parameters, (height, width), window)


def _backward(
    grad, qkv, kv_pool, scale, embedding, local_bias, pool_bias, tokens, token_bias, gates, lse, height, width, window
):
    from kernels.aggregated_attention import triton as fused

    parameters = (scale, embedding, local_bias, pool_bias, tokens, token_bias, gates)
    return fused.backward(grad, qkv, kv_pool, parameters, lse, (height, width), window)


def _fake_forward(qkv, kv_pool, scale, *_):
    B, N, C = qkv.shape
    return qkv.new_empty(B, N, C // 3), qkv.new_empty(B, scale.shape[0], N, dtype=torch.float32)


def _fake_backward(grad, qkv, kv_pool, *others):
    *parameters, gates = others[: len(_PARAMETERS)]
    gates = qkv.new_empty(0) if gates is None else gates.new_empty(gates.shape)
    return (*(t.new_empty(t.shape) for t in (qkv, kv_pool, *parameters)), gates)


def _flops(qkv, kv_pool, *others, out_shape=None, **__):
    window = others[-1]
    return 2 * qkv[0] * qkv[1] * qkv[2] // 3 * (2 * kv_pool[1] + 3 * window**2)


def _flops_backward(grad, qkv, kv_pool, *others, out_shape=None, **__):
    window = others[-1]
    return 2 * qkv[0] * qkv[1] * qkv[2] // 3 * (5 * kv_pool[1] + 8 * window**2)


_TENSORS = (
    "Tensor qkv, Tensor kv_pool, Tensor scale, Tensor embedding, Tensor local_bias, Tensor pool_bias, Tensor tokens, "
    "Tensor token_bias, Tensor? gates"
)
_SIZES = "SymInt height, SymInt width, int window"
forward_op = define(
    f"aggregated_attention_forward({_TENSORS}, {_SIZES}) -> (Tensor, Tensor)", _forward, _fake_forward, _flops
)
backward_op = define(
    f"aggregated_attention_backward(Tensor grad, {_TENSORS}, Tensor lse, {_SIZES}) -> ({', '.join(['Tensor'] * 9)})",
    _backward,
    _fake_backward,
    _flops_backward,
)


class _AggregatedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *arguments):
        out, lse = forward_op(*arguments)
        ctx.save_for_backward(*arguments[:-3], lse)
        ctx.sizes = arguments[-3:]
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        *gradients, dgates = backward_op(grad, *ctx.saved_tensors, *ctx.sizes)
        return *gradients, dgates if ctx.needs_input_grad[len(gradients)] else None, None, None, None


# Shapes for the tests and the benchmark


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
    inside_NT = _inside(grid, window, q.device)
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
    reference=reference,
    inputs=inputs,
    checks=CHECKS,
    stages=STAGES,
    cost=cost,
    baselines={"official": _official, "pytorch": reference},
)
