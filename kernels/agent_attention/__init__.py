"""Agent attention: a few pooled agent tokens gather from all tokens, and all tokens read from the agents.

    A = pool(Q),  V_A = softmax(A Kᵀ · scale + B1) V,  O = softmax(Q Aᵀ · scale + B2) V_A + conv(V)

Shapes: B = batch, N = P + H·W tokens in row-major order with P prefix tokens in front, M = heads, D = channels per
head, C = M·D, A = agents. pool is torch's adaptive average pooling of the map of Q: its bins overlap where the agents
do not divide the map. Prefix tokens are keys and read from the agents; they are not pooled, and the convolution skips
them.

B1 and B2 are tables that all images share, built by the caller once per step: cheaper than generating them in the
kernels up to about 64 000 tokens, where they no longer stay in the L2 cache. Their gradients are sums over images in a
fixed order. Saved for the backward pass: Q, K, V, the agents, V_A, and a number per agent.

Source: Agent Attention: On the Integration of Softmax and Linear Attention, Han et al., ECCV 2024, arXiv:2312.08874,
eq. 2 to 6. Where the authors' code is followed: prefix tokens are no agents, and the convolution is added before the
output projection.
"""

import torch.nn.functional as F
from torch import Tensor

from kernels.agent_attention.register import attend
from kernels.dispatch import autocast, check_head_dim, check_tensors, is_fused
from kernels.heads import heads_to_map, map_to_heads, merge_heads, split_heads
from kernels.precision import is_written_out

WHO = "agent_attention"
MOST_AGENTS = 256
LARGEST = 7


def agent_attention(
    qkv_BNC: Tensor,
    grid: tuple[int, ...],
    num_heads: int,
    agents: tuple[int, int],
    *,
    gather_bias_MAN: Tensor | None = None,
    scatter_bias_MNA: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention through agents, and the convolution of the values: (B, N, C) in the dtype of qkv.

    Args:
        qkv_BNC: (B, N, 3C), the queries, keys and values of all heads in this order, as a projection gives them.
        grid: (height, width) or (height, width, prefix) of the tokens.
        num_heads: M.
        agents: height and width of the grid of agents.
        gather_bias_MAN: B1 (M, A, N), added to the scores of agents on keys; None for none. Any dtype.
        scatter_bias_MNA: B2 (M, N, A), added to the scores of queries on agents; None for none. Any dtype.
        weight: (C, 1, k, k) of the depth-wise convolution as in `nn.Conv2d`, k odd; None for no convolution.
        bias: (C,) of the convolution, or None.
        scale: of the scores in both softmaxes; None for 1 / √D.
        backend: "auto", "triton" or "torch".

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together; on the fused path more than 256 agents, heads
            wider than 128 channels, or a kernel side above 7.
    """
    prefix = grid[2] if len(grid) > 2 else 0
    _check(qkv_BNC, grid, prefix, num_heads, agents)
    _check_parameters(qkv_BNC, num_heads, agents, gather_bias_MAN, scatter_bias_MNA, weight, bias)
    options = {"gather_bias_MAN": gather_bias_MAN, "scatter_bias_MNA": scatter_bias_MNA, "weight": weight, "bias": bias}
    if not is_fused(WHO, backend, qkv_BNC):
        tables = {"gather_bias": gather_bias_MAN, "scatter_bias": scatter_bias_MNA}
        tables = {name: table if table is None else table[None] for name, table in tables.items()}
        heads = split_heads(qkv_BNC, 3, num_heads)
        return merge_heads(definition(*heads, grid, grid, agents, **tables, weight=weight, bias=bias, scale=scale))
    (qkv_BNC,) = autocast(qkv_BNC)
    check_tensors(WHO, {"qkv": qkv_BNC}, options)
    head_dim = qkv_BNC.shape[2] // (3 * num_heads)
    check_head_dim(WHO, head_dim)
    _check_limits(agents, weight)
    scale = head_dim**-0.5 if scale is None else float(scale)
    sizes = grid[0], grid[1], prefix, num_heads, *agents, scale
    return attend(qkv_BNC, gather_bias_MAN, scatter_bias_MNA, weight, bias, *sizes)


def definition(
    q_BMND: Tensor,
    k_BMSD: Tensor,
    v_BMSD: Tensor,
    grid: tuple[int, ...],
    kv_grid: tuple[int, ...],
    agents: tuple[int, int],
    *,
    gather_bias: Tensor | None = None,
    scatter_bias: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """`softmax(Q Aᵀ + B2) (softmax(A Kᵀ + B1) V) + conv(V)` of heads, (B, M, N, D), with A = pool(Q).

    Args:
        q_BMND: queries of the map `grid`.
        k_BMSD, v_BMSD: keys and values of the map `kv_grid`, which may be a smaller one.
        grid, kv_grid: (height, width) or (height, width, prefix).
        agents: height and width of the grid of agents.
        gather_bias, scatter_bias: B1 and B2, broadcast to (B, M, A, S) and (B, M, N, A); None for none.
        weight, bias: of the convolution, (C, 1, k, k) and (C,), or None.
        scale: of both softmaxes; None for 1 / √D.
    """
    agents_BMAD = pooled(q_BMND, grid, agents)
    o_BMND = attend_through(q_BMND, k_BMSD, v_BMSD, agents_BMAD, gather_bias, scatter_bias, scale, scale)
    return o_BMND if weight is None else o_BMND + local(v_BMSD, grid, kv_grid, weight, bias)


def pooled(q_BMND: Tensor, grid: tuple[int, ...], agents: tuple[int, int]) -> Tensor:
    """The agents (B, M, A, D): queries averaged over bins of the map, which overlap where they do not divide it."""
    pooled_BCHW = F.adaptive_avg_pool2d(heads_to_map(q_BMND, grid), agents)
    return map_to_heads(pooled_BCHW, q_BMND.shape[1]).to(q_BMND.dtype)


def attend_through(
    q_BMND: Tensor,
    k_BMSD: Tensor,
    v_BMSD: Tensor,
    agents_BMAD: Tensor,
    gather_bias: Tensor | None = None,
    scatter_bias: Tensor | None = None,
    gather_scale: float | None = None,
    scatter_scale: float | None = None,
) -> Tensor:
    """`softmax(Q Aᵀ + B2) (softmax(A Kᵀ + B1) V)`, (B, M, N, D), for any agents; scales are 1 / √D without others."""
    gather, scatter = (b if b is None else b.to(q_BMND.dtype) for b in (gather_bias, scatter_bias))
    gathered_BMAD = _softmax_attention(agents_BMAD, k_BMSD, v_BMSD, gather, gather_scale)
    return _softmax_attention(q_BMND, agents_BMAD, gathered_BMAD, scatter, scatter_scale)


def _softmax_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float | None) -> Tensor:
    if is_written_out(q, bias):
        return ((q * (q.shape[-1] ** -0.5 if scale is None else scale)) @ k.mT + bias).softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v, bias, scale=scale)


def local(
    v_BMSD: Tensor, grid: tuple[int, ...], kv_grid: tuple[int, ...], weight: Tensor, bias: Tensor | None
) -> Tensor:
    """The convolution of the values, (B, M, N, D), enlarged bilinearly from a smaller map; zero for prefix tokens."""
    v_BCHW = heads_to_map(v_BMSD, kv_grid)
    if tuple(kv_grid[:2]) != tuple(grid[:2]):
        v_BCHW = F.interpolate(v_BCHW, size=grid[:2], mode="bilinear")
    weight, bias = (p if p is None else p.to(v_BCHW.dtype) for p in (weight, bias))
    local_BCHW = F.conv2d(v_BCHW, weight, bias, padding=weight.shape[-1] // 2, groups=weight.shape[0])
    return map_to_heads(local_BCHW, v_BMSD.shape[1], sum(grid[2:]))


def _check(qkv: Tensor, grid: tuple[int, ...], prefix: int, num_heads: int, agents: tuple[int, int]) -> None:
    if qkv.dim() != 3 or qkv.shape[1] != prefix + grid[0] * grid[1]:
        raise ValueError(
            f"{WHO}: qkv must be (B, {prefix} + {grid[0]}*{grid[1]}, 3C), got {tuple(qkv.shape)}; "
            "pass the grid of this map"
        )
    if num_heads < 1 or qkv.shape[2] % (3 * num_heads):
        raise ValueError(
            f"{WHO}: the channels of qkv must be 3 * {num_heads} heads * D, got {qkv.shape[2]}; change num_heads"
        )
    if len(agents) != 2 or min(agents) < 1:
        raise ValueError(f"{WHO}: agents must be (height, width), both positive, got {tuple(agents)}; use e.g. (7, 7)")


def _check_parameters(
    qkv: Tensor,
    num_heads: int,
    agents: tuple[int, int],
    gather: Tensor | None,
    scatter: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
) -> None:
    N, C, M, A = qkv.shape[1], qkv.shape[2] // 3, num_heads, agents[0] * agents[1]
    if gather is not None and tuple(gather.shape) != (M, A, N):
        raise ValueError(
            f"{WHO}: gather_bias_MAN must be {(M, A, N)}, got {tuple(gather.shape)}; build it for this map"
        )
    if scatter is not None and tuple(scatter.shape) != (M, N, A):
        raise ValueError(
            f"{WHO}: scatter_bias_MNA must be {(M, N, A)}, got {tuple(scatter.shape)}; build it for this map"
        )
    k = 1 if weight is None else weight.shape[-1]
    if weight is not None and (tuple(weight.shape) != (C, 1, k, k) or k % 2 == 0):
        raise ValueError(f"{WHO}: weight must be ({C}, 1, k, k) with odd k, got {tuple(weight.shape)}; see nn.Conv2d")
    if bias is not None and (weight is None or tuple(bias.shape) != (C,)):
        raise ValueError(f"{WHO}: bias must be ({C},) and come with weight, got {tuple(bias.shape)}; see nn.Conv2d")


def _check_limits(agents: tuple[int, int], weight: Tensor | None) -> None:
    if agents[0] * agents[1] > MOST_AGENTS:
        raise ValueError(
            f"{WHO}: the kernels take at most {MOST_AGENTS} agents, got {agents[0]}*{agents[1]}; "
            "use fewer, backend=torch, or softmax attention"
        )
    if weight is not None and weight.shape[-1] > LARGEST:
        raise ValueError(
            f"{WHO}: the kernels go up to {LARGEST}x{LARGEST} weights, got {weight.shape[-1]}; use backend=torch"
        )
