"""Channel attention: the D channels of each head attend to one another, with logits summed over all tokens.

    A = softmax((k s)ᵀ v),  o = q Aᵀ,  s = D^-1/2

for every image and head; q, k, v are (N, D) and A is D×D, normalised over the channels of v. The sum over tokens is
accumulated in float32. Nothing grows with N², and forward moves q, k, v and o once.

`channel_attention_folded` computes the same from the input of the projection without forming q, k, v. With G = xᵀ x
and t = Σ x over the tokens of an image, and per head
    kᵀ v = W_k G W_vᵀ + (W_k t) b_vᵀ + b_k (W_v t)ᵀ + N b_k b_vᵀ,   o = x (A W_q)ᵀ + A b_q,
so that x is read twice and the result written once. Its C×C algebra costs about 4 C³ per image: it pays from N ≈ 3 C.

Source: DaViT, Ding et al., ECCV 2022, arXiv:2204.03645, section 3.3 (channel group attention). Their code's q, k, v are
the paper's values, queries and keys; the names here are those of the code.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.dispatch import autocast, check_head_dim, check_tensors, is_fused
from kernels.operation import Cost, Operation
from kernels.registration import define

WHO = "channel_attention"
FOLDED_WHO = "channel_attention_folded"
# With up to this many tokens backward computes the weights again, which costs less memory than to keep them.
KEPT_ABOVE = 64


def channel_attention(qkv_BNC: Tensor, num_heads: int, *, scale: float | None = None, backend: str = "auto") -> Tensor:
    """`q softmax((k scale)ᵀ v)ᵀ` per head, (B, N, C) in the dtype of qkv.

    Args:
        qkv_BNC: a packed projection (B, N, 3C): q, k and v, each of num_heads × D channels. It may be strided.
        num_heads: number of heads (channel groups) M.
        scale: of the logits, D^-1/2 by default.
        backend: "auto", "triton" or "torch".

    Raises:
        ValueError: a projection that does not divide into heads, or more than 128 channels per head on the fused path.
    """
    if num_heads < 1 or qkv_BNC.dim() != 3 or qkv_BNC.shape[2] % (3 * num_heads):
        raise ValueError(
            f"{WHO}: qkv must be (B, N, 3 * {num_heads} heads * D), got {tuple(qkv_BNC.shape)}; pass the output of "
            "nn.Linear(C, 3 * C) and a number of heads that divides C"
        )
    head_dim = qkv_BNC.shape[2] // (3 * num_heads)
    scale = head_dim**-0.5 if scale is None else scale
    if not is_fused(WHO, backend, qkv_BNC):
        return reference(qkv_BNC, num_heads, scale=scale)
    (qkv_BNC,) = autocast(qkv_BNC)
    check_tensors(WHO, {"qkv": qkv_BNC})
    check_head_dim(WHO, head_dim)
    return _ChannelAttention.apply(qkv_BNC, num_heads, scale)


def reference(qkv_BNC: Tensor, num_heads: int, *, scale: float | None = None) -> Tensor:
    """The definition in plain PyTorch."""
    q, k, v = qkv_BNC.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4).unbind()
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    with _full_precision(qkv_BNC):
        weights_BMDD = ((_wide(k) * scale).mT @ _wide(v)).softmax(-1)
    return (q @ weights_BMDD.to(q.dtype).mT).transpose(1, 2).flatten(2)


def channel_attention_folded(
    x_BNC: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    num_heads: int,
    *,
    scale: float | None = None,
    proj_weight: Tensor | None = None,
    proj_bias: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Projection, channel attention and, if given, output projection of x, (B, N, C) in the dtype of x.

    Args:
        x_BNC: tokens.
        qkv_weight: (3C, C) as in `nn.Linear(C, 3 * C)`.
        qkv_bias: (3C,), or None.
        num_heads: number of heads M.
        scale: of the logits, D^-1/2 by default.
        proj_weight: (C, C) of a projection applied to the result, or None.
        proj_bias: (C,) of that projection, or None.
        backend: "auto", "triton" or "torch".

    Raises:
        ValueError: shapes that do not fit together, or a bias of a projection that is not there.
    """
    _check_folded(x_BNC, qkv_weight, qkv_bias, num_heads, proj_weight, proj_bias)
    parameters = {"qkv_weight": qkv_weight, "qkv_bias": qkv_bias, "proj_weight": proj_weight, "proj_bias": proj_bias}
    if not is_fused(FOLDED_WHO, backend, x_BNC):
        return folded_reference(x_BNC, num_heads=num_heads, scale=scale, **parameters)
    (x_BNC,) = autocast(x_BNC)
    check_tensors(FOLDED_WHO, {"x": x_BNC}, parameters)
    with _full_precision(x_BNC):
        gram_BCC, total_BC = _Gram.apply(x_BNC)
        weight_BCC, bias_BC = _fold(gram_BCC, total_BC, x_BNC.shape[1], num_heads, scale, qkv_weight, qkv_bias)
        if proj_weight is not None:
            weight_BCC, bias_BC = proj_weight.float() @ weight_BCC, bias_BC @ proj_weight.float().mT
        if proj_bias is not None:
            bias_BC = bias_BC + proj_bias.float()
        return torch.baddbmm(bias_BC.to(x_BNC.dtype).unsqueeze(1), x_BNC, weight_BCC.to(x_BNC.dtype).mT)


def folded_reference(
    x_BNC: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    num_heads: int,
    *,
    scale: float | None = None,
    proj_weight: Tensor | None = None,
    proj_bias: Tensor | None = None,
) -> Tensor:
    """The definition in plain PyTorch: projection, attention, projection."""
    qkv_weight, qkv_bias, proj_weight, proj_bias = (
        p if p is None else p.to(x_BNC.dtype) for p in (qkv_weight, qkv_bias, proj_weight, proj_bias)
    )
    o_BNC = reference(F.linear(x_BNC, qkv_weight, qkv_bias), num_heads, scale=scale)
    return o_BNC if proj_weight is None else F.linear(o_BNC, proj_weight, proj_bias)


def _fold(
    gram_BCC: Tensor,
    total_BC: Tensor,
    tokens: int,
    num_heads: int,
    scale: float | None,
    weight: Tensor,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Weight (B, C, C) and bias (B, C) that make the attention a linear map of the tokens of an image, in float32."""
    wq_MDC, wk_MDC, wv_MDC = weight.float().unflatten(0, (3, num_heads, -1)).unbind()
    bias = weight.new_zeros(weight.shape[0]) if bias is None else bias
    bq_MD, bk_MD, bv_MD = bias.float().unflatten(0, (3, num_heads, -1)).unbind()
    k_BMDC = (wk_MDC.flatten(0, 1) @ gram_BCC).unflatten(1, wk_MDC.shape[:2])
    # (W_k t + N b_k) b_vᵀ + b_k (W_v t)ᵀ
    left_BMD = (total_BC @ wk_MDC.flatten(0, 1).mT).unflatten(1, bk_MD.shape) + tokens * bk_MD
    right_BMD = (total_BC @ wv_MDC.flatten(0, 1).mT).unflatten(1, bv_MD.shape)
    products = k_BMDC @ wv_MDC.mT + left_BMD.unsqueeze(-1) * bv_MD.unsqueeze(-2)
    products = products + bk_MD.unsqueeze(-1) * right_BMD.unsqueeze(-2)
    scale = wq_MDC.shape[1] ** -0.5 if scale is None else scale
    weights_BMDD = (products * scale).softmax(-1)
    return (weights_BMDD @ wq_MDC).flatten(1, 2), (weights_BMDD @ bq_MD.unsqueeze(-1)).flatten(1)


def _check_folded(
    x: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    num_heads: int,
    proj_weight: Tensor | None,
    proj_bias: Tensor | None,
) -> None:
    if num_heads < 1 or x.dim() != 3 or x.shape[2] % num_heads:
        raise ValueError(
            f"{FOLDED_WHO}: x must be (B, N, {num_heads} heads * D), got {tuple(x.shape)}; choose heads that divide C"
        )
    C = x.shape[2]
    expected = {
        "qkv_weight": (qkv_weight, (3 * C, C)),
        "qkv_bias": (qkv_bias, (3 * C,)),
        "proj_weight": (proj_weight, (C, C)),
        "proj_bias": (proj_bias, (C,)),
    }
    for name, (parameter, shape) in expected.items():
        if parameter is not None and tuple(parameter.shape) != shape:
            raise ValueError(
                f"{FOLDED_WHO}: {name} must be {shape}, got {tuple(parameter.shape)}; pass those of nn.Linear"
            )
    if proj_bias is not None and proj_weight is None:
        raise ValueError(f"{FOLDED_WHO}: proj_bias needs proj_weight, got None; pass both or neither")


def _full_precision(x: Tensor):
    """Autocast off inside."""
    return torch.autocast("cpu" if x.device.type == "meta" else x.device.type, enabled=False)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


# Registration


def _kept(qkv: Tensor, num_heads: int) -> tuple:
    """Shape of the weights that are kept for backward: a row of D for each channel."""
    channels = qkv.shape[2] // 3
    return qkv.shape[0], channels, channels // num_heads if qkv.shape[1] > KEPT_ABOVE else 0


def _forward(qkv, num_heads, scale):
    from kernels.channel_attention import triton as fused

    o = torch.empty(*qkv.shape[:2], qkv.shape[2] // 3, dtype=qkv.dtype, device=qkv.device)
    state = torch.empty(_kept(qkv, num_heads), dtype=torch.float32, device=qkv.device)
    fused.forward(qkv, o, state, num_heads, scale)
    return o, state


def _backward(grad, qkv, state, num_heads, scale):
    from kernels.channel_attention import triton as fused

    return fused.backward(grad, qkv, state, num_heads, scale)


def _fake_forward(qkv, num_heads, scale):
    o = qkv.new_empty(*qkv.shape[:2], qkv.shape[2] // 3)
    return o, qkv.new_empty(_kept(qkv, num_heads), dtype=torch.float32)


def _fake_backward(grad, qkv, state, num_heads, scale):
    return qkv.new_empty(qkv.shape)


def _flops(qkv, num_heads, *_, out_shape=None, **__):
    return 4 * qkv[0] * qkv[1] * (qkv[2] // 3) ** 2 // num_heads


def _flops_backward(grad, qkv, state, num_heads, *_, out_shape=None, **__):
    return 8 * qkv[0] * qkv[1] * (qkv[2] // 3) ** 2 // num_heads


forward_op = define(
    "channel_attention_forward(Tensor qkv, int num_heads, float scale) -> (Tensor, Tensor)",
    _forward,
    _fake_forward,
    _flops,
)
backward_op = define(
    "channel_attention_backward(Tensor grad, Tensor qkv, Tensor state, int num_heads, float scale) -> Tensor",
    _backward,
    _fake_backward,
    _flops_backward,
)


class _ChannelAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, num_heads, scale):
        o, state = forward_op(qkv, num_heads, scale)
        ctx.save_for_backward(qkv, state)
        ctx.options = num_heads, scale
        return o

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return backward_op(grad, *ctx.saved_tensors, *ctx.options), None, None


def _gram(x):
    from kernels.channel_attention import triton as fused

    return fused.gram(x)


def _fake_gram(x):
    B, _, C = x.shape
    return x.new_empty(B, C, C, dtype=torch.float32), x.new_empty(B, C, dtype=torch.float32)


def _flops_gram(x, *_, out_shape=None, **__):
    return 2 * x[0] * x[1] * x[2] ** 2


gram_op = define("channel_gram(Tensor x) -> (Tensor, Tensor)", _gram, _fake_gram, _flops_gram)


class _Gram(torch.autograd.Function):
    """xᵀ x and the sum over tokens, in float32."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return gram_op(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dgram, dtotal):
        (x,) = ctx.saved_tensors
        with _full_precision(x):
            return torch.baddbmm(dtotal.to(x.dtype).unsqueeze(1), x, (dgram + dgram.mT).to(x.dtype))


# Shapes for the tests and the benchmark


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


def folded_inputs(
    device: str | torch.device,
    dtype: torch.dtype,
    seed: int = 0,
    *,
    batch: int,
    tokens: int,
    dim: int,
    heads: int,
    bias: bool = True,
    projection: bool = True,
    scale: float | None = None,
) -> dict:
    """Keyword arguments of `channel_attention_folded`; parameters are float32."""
    generator = torch.Generator(device).manual_seed(seed)

    def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    return {
        "x_BNC": random(batch, tokens, dim, dtype=dtype).requires_grad_(),
        "qkv_weight": (random(3 * dim, dim) * dim**-0.5).requires_grad_(),
        "qkv_bias": (random(3 * dim) * 0.1).requires_grad_() if bias else None,
        "num_heads": heads,
        "scale": scale,
        "proj_weight": (random(dim, dim) * dim**-0.5).requires_grad_() if projection else None,
        "proj_bias": random(dim).requires_grad_() if projection and bias else None,
    }


def folded_cost(itemsize: int, *, batch: int, tokens: int, dim: int, heads: int, projection: bool = True, **_) -> Cost:
    """Forward reads x twice and writes y; backward reads x twice and the gradient twice and writes that of x."""
    tensor, width = batch * tokens * dim, dim // heads
    large = 2 * tensor * dim
    small = batch * dim * (2 * dim * dim + 4 * dim * width + 4 * dim + 2 * width)
    small += batch * dim * (2 * dim * dim + 2 * dim) if projection else 0
    return Cost(3 * tensor * itemsize, 5 * tensor * itemsize, 2 * large + small, 3 * large + 2 * small)


FOLDED_CHECKS = {
    "63 tokens, width 24": {"batch": 2, "tokens": 63, "dim": 72, "heads": 3, "scale": 0.05},
    "one token": {"batch": 1, "tokens": 1, "dim": 16, "heads": 1},
    "100 tokens, no projection": {"batch": 1, "tokens": 100, "dim": 96, "heads": 3, "projection": False},
    "300 tokens, no bias": {"batch": 1, "tokens": 300, "dim": 144, "heads": 3, "bias": False, "scale": 0.02},
}
FOLDED_STAGES = {
    "224 px stage 1 (DaViT-B)": {"batch": 128, "tokens": 3136, "dim": 128, "heads": 4},
    "224 px stage 2 (DaViT-B)": {"batch": 128, "tokens": 784, "dim": 256, "heads": 8},
    "512 px stage 2": {"batch": 16, "tokens": 4096, "dim": 256, "heads": 8},
    "1024 px stage 1": {"batch": 4, "tokens": 65536, "dim": 128, "heads": 4},
    "1024 px stage 3": {"batch": 4, "tokens": 4096, "dim": 512, "heads": 16},
    "1024 px stage 1, one image": {"batch": 1, "tokens": 65536, "dim": 128, "heads": 4},
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
    reference=reference,
    inputs=inputs,
    checks=CHECKS,
    stages=STAGES,
    cost=cost,
    baselines={"official": _as_authors, "pytorch": _batched, "sdpa": _dense},
)
FOLDED = Operation(
    name=FOLDED_WHO,
    run=channel_attention_folded,
    reference=folded_reference,
    inputs=folded_inputs,
    checks=FOLDED_CHECKS,
    stages=FOLDED_STAGES,
    cost=folded_cost,
    baselines={"pytorch": folded_reference},
)
OPERATIONS = (OPERATION, FOLDED)
