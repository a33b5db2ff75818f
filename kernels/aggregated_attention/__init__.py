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

from kernels.aggregated_attention.constants import EPSILON
from kernels.aggregated_attention.register import PARAMETERS, attend
from kernels.dispatch import autocast, check_head_dim, check_neighbors, check_tensors, is_fused
from kernels.heads import gated, merge_heads, split_heads
from kernels.precision import full_precision, wide

WHO = "aggregated_attention"


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
        heads = *split_heads(qkv_BNC, 3, num_heads), *split_heads(kv_pool_BPC, 2, num_heads)
        o_BMND = definition(*heads, *parameters[:-1], grid, window)
        o_BMND = o_BMND if gates_BNM is None else gated(o_BMND, gates_BNM.to(o_BMND.dtype))
        return merge_heads(o_BMND).to(qkv_BNC.dtype)
    check_tensors(WHO, {"qkv": qkv_BNC, "kv_pool": kv_pool_BPC}, dict(zip(PARAMETERS, parameters, strict=True)))
    check_head_dim(WHO, qkv_BNC.shape[2] // (3 * num_heads))
    return attend(qkv_BNC, kv_pool_BPC, *parameters, *grid[:2], window)


def definition(
    q_BMND: Tensor,
    k_BMND: Tensor,
    v_BMND: Tensor,
    k_pool_BMPD: Tensor,
    v_pool_BMPD: Tensor,
    scale_M: Tensor,
    query_embedding_MD: Tensor,
    local_bias_MT: Tensor,
    pool_bias_MNP: Tensor,
    tokens_MDT: Tensor,
    token_bias_MT: Tensor,
    grid: tuple[int, ...],
    window: int = 3,
) -> Tensor:
    """The heads o (B, M, N, D), in float32 at least; the other arguments are those of `aggregated_attention`.

    The neighbours of all tokens at one offset are a view of the keys, shifted in the row-major order of the map; what
    comes from the other side of the map by that is masked. So keys and values are never copied per neighbour, and
    backward needs q̂, k̂ and v once.
    """
    with full_precision(q_BMND.device):
        q, k, v, k_pool, v_pool = (wide(t) for t in (q_BMND, k_BMND, v_BMND, k_pool_BMPD, v_pool_BMPD))
        dtype = q.dtype
        q, k, k_pool = (F.normalize(t, dim=-1, eps=EPSILON) for t in (q, k, k_pool))
        inside_NT = inside_map(grid, window, q.device)
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
        return o_BMND


def _neighbours(x_BMND: Tensor, grid: tuple[int, ...], window: int) -> list[Tensor]:
    """Views of x, one per offset; what is outside of the map is 0, or a token from the other side of the map."""
    radius, tokens = window // 2, x_BMND.shape[2]
    margin = radius * (grid[1] + 1)
    padded = F.pad(x_BMND, (0, 0, margin, margin))
    starts = (y * grid[1] + x + margin for y in range(-radius, radius + 1) for x in range(-radius, radius + 1))
    return [padded.narrow(2, start, tokens) for start in starts]


def inside_map(grid: tuple[int, ...], window: int, device: torch.device) -> Tensor:
    """Which neighbours of which token are in the map: bool (N, T)."""
    offsets = torch.arange(window, device=device) - window // 2
    y, x = (torch.arange(side, device=device)[:, None] + offsets for side in grid[:2])
    y, x = (y >= 0) & (y < grid[0]), (x >= 0) & (x < grid[1])
    return (y[:, None, :, None] & x[:, None]).flatten(0, 1).flatten(1, 2)


def _check(
    qkv: Tensor, kv_pool: Tensor, parameters: tuple[Tensor | None, ...], grid: tuple[int, ...], heads: int, window: int
) -> None:
    check_neighbors(WHO, qkv, grid, heads)
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
    for name, parameter, shape in zip(PARAMETERS, parameters, shapes, strict=True):
        if parameter is not None and (tuple(parameter.shape) != shape or not parameter.is_floating_point()):
            raise ValueError(
                f"{WHO}: {name} must be {shape} and floating, got {tuple(parameter.shape)} "
                f"{str(parameter.dtype).removeprefix('torch.')}; see the shapes of the function"
            )
