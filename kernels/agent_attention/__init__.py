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

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.dispatch import autocast, check_head_dim, check_tensors, is_fused
from kernels.operation import Cost, Operation
from kernels.registration import define

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
        return reference(qkv_BNC, grid, num_heads, agents, scale=scale, **options)
    (qkv_BNC,) = autocast(qkv_BNC)
    check_tensors(WHO, {"qkv": qkv_BNC}, options)
    head_dim = qkv_BNC.shape[2] // (3 * num_heads)
    check_head_dim(WHO, head_dim)
    _check_limits(agents, weight)
    scale = head_dim**-0.5 if scale is None else float(scale)
    sizes = grid[0], grid[1], prefix, num_heads, *agents, scale
    return _AgentAttention.apply(qkv_BNC, gather_bias_MAN, scatter_bias_MNA, weight, bias, *sizes)


def reference(
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
) -> Tensor:
    """The definition in plain PyTorch."""
    prefix, dtype = sum(grid[2:]), qkv_BNC.dtype
    q_BNC, _, v_BNC = qkv_BNC.chunk(3, 2)
    q_BMND, k_BMND, v_BMND = qkv_BNC.unflatten(2, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)
    agents_BAC = F.adaptive_avg_pool2d(_map(q_BNC, grid), agents).flatten(2).transpose(1, 2)
    agents_BMAD = agents_BAC.unflatten(2, (num_heads, -1)).transpose(1, 2)
    gather, scatter = (b if b is None else b.to(dtype)[None] for b in (gather_bias_MAN, scatter_bias_MNA))
    gathered_BMAD = F.scaled_dot_product_attention(agents_BMAD, k_BMND, v_BMND, gather, scale=scale)
    o_BMND = F.scaled_dot_product_attention(q_BMND, agents_BMAD, gathered_BMAD, scatter, scale=scale)
    o_BNC = o_BMND.transpose(1, 2).flatten(2)
    if weight is None:
        return o_BNC
    parameters = (p if p is None else p.to(dtype) for p in (weight, bias))
    local_BCHW = F.conv2d(_map(v_BNC, grid), *parameters, padding=weight.shape[-1] // 2, groups=weight.shape[0])
    return o_BNC + F.pad(local_BCHW.flatten(2).transpose(1, 2), (0, 0, prefix, 0))


def _map(x_BNC: Tensor, grid: tuple[int, ...]) -> Tensor:
    """The map (B, C, H, W) without prefix tokens, in channels_last memory."""
    return x_BNC[:, sum(grid[2:]) :].unflatten(1, grid[:2]).permute(0, 3, 1, 2)


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


# Registration


def _forward(qkv, gather, scatter, weight, bias, height, width, prefix, heads, down, across, scale):
    from kernels.agent_attention import triton as fused

    return fused.forward(qkv, gather, scatter, weight, bias, (height, width, prefix), heads, (down, across), scale)


def _backward(
    grad, qkv, agents, gathered, lse, gather, scatter, weight, height, width, prefix, heads, down, across, scale
):
    from kernels.agent_attention import triton as fused

    saved = agents, gathered, lse
    grid = (height, width, prefix)
    return fused.backward(grad, qkv, saved, gather, scatter, weight, grid, heads, (down, across), scale)


def _fake_forward(qkv, gather, scatter, weight, bias, height, width, prefix, heads, down, across, scale):
    B, N, C = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    state = qkv.new_empty((B, heads, down * across, C // heads))
    return (
        qkv.new_empty((B, N, C)),
        state,
        torch.empty_like(state),
        state.new_empty(state.shape[:3], dtype=torch.float32),
    )


def _fake_backward(grad, qkv, agents, gathered, lse, gather, scatter, weight, *_):
    dweight, dbias = _empty(qkv, weight), qkv.new_empty(0) if weight is None else weight.new_empty(weight.shape[0])
    return qkv.new_empty(qkv.shape), _empty(qkv, gather), _empty(qkv, scatter), dweight, dbias


def _empty(qkv: Tensor, like: Tensor | None) -> Tensor:
    return qkv.new_empty(0) if like is None else like.new_empty(like.shape)


def _flops(qkv, gather, scatter, weight, bias, height, width, prefix, heads, down, across, *_, out_shape=None, **__):
    B, N, C3 = qkv
    local = 0 if weight is None else 2 * height * width * weight[-1] ** 2
    return B * C3 // 3 * (8 * N * down * across + local)


def _flops_backward(grad, qkv, agents, gathered, lse, gather, scatter, weight, *sizes, out_shape=None, **__):
    return 2 * _flops(qkv, gather, scatter, weight, None, *sizes)


_SIZES = "SymInt height, SymInt width, int prefix, int heads, int down, int across, float scale"
_TABLES = "Tensor? gather, Tensor? scatter, Tensor? weight"
forward_op = define(
    f"agent_attention_forward(Tensor qkv, {_TABLES}, Tensor? bias, {_SIZES}) -> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _fake_forward,
    _flops,
)
backward_op = define(
    f"agent_attention_backward(Tensor grad, Tensor qkv, Tensor agents, Tensor gathered, Tensor lse, {_TABLES}, "
    f"{_SIZES}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
    _flops_backward,
)


class _AgentAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, gather, scatter, weight, bias, *sizes):
        out, *state = forward_op(qkv, gather, scatter, weight, bias, *sizes)
        ctx.save_for_backward(qkv, *state, gather, scatter, weight)
        ctx.sizes, ctx.given = sizes, [t is not None for t in (qkv, gather, scatter, weight, bias)]
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        gradients = backward_op(grad, *ctx.saved_tensors, *ctx.sizes)
        gradients = (g if given else None for g, given in zip(gradients, ctx.given, strict=True))
        return *gradients, *[None] * len(ctx.sizes)


# Shapes for the tests and the benchmark


def inputs(
    device: str | torch.device,
    dtype: torch.dtype,
    seed: int = 0,
    *,
    batch: int,
    grid: tuple[int, ...],
    dim: int,
    heads: int,
    agents: tuple[int, int],
    tables: bool = True,
    kernel: int = 3,
) -> dict:
    """Keyword arguments of `agent_attention`; kernel 0 for no convolution."""
    generator = torch.Generator(device).manual_seed(seed)
    tokens, count = sum(grid[2:]) + grid[0] * grid[1], agents[0] * agents[1]

    def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    return {
        "qkv_BNC": random(batch, tokens, 3 * dim, dtype=dtype).requires_grad_(),
        "grid": grid,
        "num_heads": heads,
        "agents": agents,
        "gather_bias_MAN": random(heads, count, tokens).requires_grad_() if tables else None,
        "scatter_bias_MNA": random(heads, tokens, count).requires_grad_() if tables else None,
        "weight": (random(dim, 1, kernel, kernel) / kernel).requires_grad_() if kernel else None,
        "bias": random(dim).requires_grad_() if kernel else None,
    }


def cost(
    itemsize: int,
    *,
    batch: int,
    grid: tuple[int, ...],
    dim: int,
    heads: int,
    agents: tuple[int, int],
    tables: bool = True,
    kernel: int = 3,
) -> Cost:
    """Forward reads q, k, v and writes o; backward reads q, k, v and the gradient and writes three more.

    The tables are read once by each pass and their gradients written once, in float32.
    """
    tokens, count = sum(grid[2:]) + grid[0] * grid[1], agents[0] * agents[1]
    tensor, table = batch * tokens * dim * itemsize, 2 * 4 * heads * count * tokens * tables
    flops = batch * dim * (8 * tokens * count + 2 * grid[0] * grid[1] * kernel**2)
    return Cost(4 * tensor + table, 7 * tensor + 2 * table, flops, 2 * flops)


CHECKS = {
    "7x6, prefix": {"batch": 2, "grid": (7, 6, 1), "dim": 32, "heads": 2, "agents": (3, 3)},
    "one token": {"batch": 1, "grid": (1, 1), "dim": 16, "heads": 1, "agents": (1, 1)},
    "7 tokens, no tables": {
        "batch": 2, "grid": (1, 7), "dim": 48, "heads": 2, "agents": (1, 3), "tables": False, "kernel": 5,
    },
    "7x7, as many agents": {"batch": 1, "grid": (7, 7), "dim": 72, "heads": 1, "agents": (7, 7)},
    "9x7, prefix": {"batch": 3, "grid": (9, 7, 1), "dim": 32, "heads": 1, "agents": (3, 3)},
    "7x5, overlapping bins, no convolution": {
        "batch": 2, "grid": (7, 5), "dim": 96, "heads": 1, "agents": (3, 3), "kernel": 0,
    },
    "10x10, prefix, 81 agents": {"batch": 1, "grid": (10, 10, 1), "dim": 64, "heads": 1, "agents": (9, 9)},
    "10x9, overlapping bins": {"batch": 1, "grid": (10, 9), "dim": 48, "heads": 1, "agents": (7, 7), "kernel": 5},
    "16x17, split over tokens": {"batch": 1, "grid": (16, 17), "dim": 32, "heads": 1, "agents": (3, 4)},
}  # fmt: skip
STAGES = {
    "Swin-T 224 px stage 1": {"batch": 128, "grid": (56, 56), "dim": 96, "heads": 3, "agents": (3, 3)},
    "Swin-T 224 px stage 2": {"batch": 128, "grid": (28, 28), "dim": 192, "heads": 6, "agents": (4, 4)},
    "Swin-T 224 px stage 3": {"batch": 128, "grid": (14, 14), "dim": 384, "heads": 12, "agents": (7, 7)},
    "PVT 224 px stage 1": {"batch": 128, "grid": (56, 56), "dim": 64, "heads": 1, "agents": (3, 3)},
    "PVT 224 px stage 2": {"batch": 128, "grid": (28, 28), "dim": 128, "heads": 2, "agents": (4, 4)},
    "PVT 224 px stage 3": {"batch": 128, "grid": (14, 14), "dim": 320, "heads": 5, "agents": (7, 7)},
    "PVT 224 px stage 4": {"batch": 128, "grid": (7, 7), "dim": 512, "heads": 8, "agents": (7, 7)},
    "DeiT-T 224 px": {"batch": 128, "grid": (14, 14, 1), "dim": 192, "heads": 3, "agents": (7, 7)},
    "DeiT-S 224 px": {"batch": 128, "grid": (14, 14, 1), "dim": 384, "heads": 6, "agents": (7, 7)},
    "DeiT-B 224 px": {"batch": 128, "grid": (14, 14, 1), "dim": 768, "heads": 12, "agents": (9, 9)},
    "DeiT-S 448 px": {"batch": 32, "grid": (28, 28, 1), "dim": 384, "heads": 6, "agents": (7, 7)},
    "Swin-T 512 px stage 1": {"batch": 32, "grid": (128, 128), "dim": 96, "heads": 3, "agents": (3, 3)},
    "Swin-T 512 px stage 3": {"batch": 32, "grid": (32, 32), "dim": 384, "heads": 12, "agents": (7, 7)},
    "Swin-T 1024 px stage 1": {"batch": 8, "grid": (256, 256), "dim": 96, "heads": 3, "agents": (3, 3)},
    "Swin-T 1024 px stage 3": {"batch": 8, "grid": (64, 64), "dim": 384, "heads": 12, "agents": (7, 7)},
    "Swin-T 224 px stage 1, one image": {"batch": 1, "grid": (56, 56), "dim": 96, "heads": 3, "agents": (3, 3)},
    "Swin-T 224 px stage 3, one image": {"batch": 1, "grid": (14, 14), "dim": 384, "heads": 12, "agents": (7, 7)},
}


def _official(
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
) -> Tensor:
    """As the authors' code does it: the scores in memory, the maps of q and v copied to channels first."""
    (B, N, C3), (H, W, prefix), dtype = qkv_BNC.shape, (*grid, 0)[:3], qkv_BNC.dtype
    C = C3 // 3
    scale = (C // num_heads) ** -0.5 if scale is None else scale
    q, k, v = qkv_BNC.reshape(B, N, 3, C).permute(2, 0, 1, 3)
    pooled = F.adaptive_avg_pool2d(q[:, prefix:].reshape(B, H, W, C).permute(0, 3, 1, 2), agents).reshape(B, C, -1)
    a = pooled.permute(0, 2, 1).reshape(B, -1, num_heads, C // num_heads).permute(0, 2, 1, 3)
    q, k, v = (t.reshape(B, N, num_heads, C // num_heads).permute(0, 2, 1, 3) for t in (q, k, v))
    to_agents = (a * scale) @ k.transpose(-2, -1)
    to_agents = (to_agents if gather_bias_MAN is None else to_agents + gather_bias_MAN.to(dtype)).softmax(-1)
    to_tokens = (q * scale) @ a.transpose(-2, -1)
    to_tokens = (to_tokens if scatter_bias_MNA is None else to_tokens + scatter_bias_MNA.to(dtype)).softmax(-1)
    x = (to_tokens @ (to_agents @ v)).transpose(1, 2).reshape(B, N, C)
    if weight is None:
        return x
    v_BCHW = v.transpose(1, 2).reshape(B, N, C)[:, prefix:].reshape(B, H, W, C).permute(0, 3, 1, 2).contiguous()
    parameters = (p if p is None else p.to(dtype) for p in (weight, bias))
    local = F.conv2d(v_BCHW, *parameters, padding=weight.shape[-1] // 2, groups=C).permute(0, 2, 3, 1).reshape(B, -1, C)
    return torch.cat([x[:, :prefix], x[:, prefix:] + local], 1)


def _dense(qkv_BNC: Tensor, grid: tuple[int, ...], num_heads: int, agents: tuple[int, int], **_) -> Tensor:
    """Softmax attention of all tokens on all tokens."""
    q, k, v = qkv_BNC.unflatten(2, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


OPERATION = Operation(
    name=WHO,
    run=agent_attention,
    reference=reference,
    inputs=inputs,
    checks=CHECKS,
    stages=STAGES,
    cost=cost,
    baselines={"official": _official, "pytorch": reference, "sdpa": _dense},
)
