"""Window attention: softmax attention inside windows of a token map, shifted or not, with a bias on offsets or without.

    o = softmax(scale · q kᵀ + bias) v      among the T = h·w cells of each window

The map is completed at bottom and right to whole windows. What completes it are cells with the query, key and value
`padding` (what the projection makes of a zero token: its bias), or zeros; they are attended to like any other, and
their own queries are dropped. A shifted map is rolled by -shift first, and pairs that were not neighbours before do not
see each other.

Source: Swin Transformer, Liu et al., ICCV 2021, arXiv:2103.14030, section 3.2 and equation 4; without shift and bias:
DaViT, Ding et al., ECCV 2022, arXiv:2204.03645, section 3.2.
Shapes: B = batch, N = H·W tokens, C = M·D channels, M = heads, R = windows per image, T = cells of a window.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.dispatch import autocast, check_head_dim, check_tensors, is_fused
from kernels.operation import Cost, Operation
from kernels.registration import define

WHO = "window_attention"
ONE_TILE = 64


def window_attention(
    qkv_BNC: Tensor,
    grid: tuple[int, ...],
    num_heads: int,
    window: tuple[int, int],
    *,
    shift: tuple[int, int] = (0, 0),
    padding: Tensor | None = None,
    bias_MTT: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention in windows, (B, N, C) in the dtype of qkv.

    Args:
        qkv_BNC: (B, N, 3C), the packed projection of the unpadded map: queries, keys and values, each M heads × D.
        grid: (height, width) of the map; windows take no prefix tokens.
        num_heads: heads M.
        window: (height, width) of the windows, in cells.
        shift: (rows, columns) by which the windows are shifted, below the window's sides.
        padding: (3C,), query, key and value of the cells that complete the map; None for zeros.
        bias_MTT: (M, T, T), added to the logits; None for none.
        scale: of the logits; None for D^-1/2.
        backend: "auto", "triton" or "torch".

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together, or heads above 128 channels on the fused path.
    """
    _check(qkv_BNC, grid, num_heads, window, shift, padding, bias_MTT)
    if not is_fused(WHO, backend, qkv_BNC):
        return reference(qkv_BNC, grid, num_heads, window, shift=shift, padding=padding, bias_MTT=bias_MTT, scale=scale)
    (qkv_BNC,) = autocast(qkv_BNC)
    check_tensors(WHO, {"qkv": qkv_BNC}, {"padding": padding, "bias": bias_MTT})
    head_dim = qkv_BNC.shape[2] // 3 // num_heads
    check_head_dim(WHO, head_dim)
    if grid[0] % window[0] == 0 and grid[1] % window[1] == 0:
        padding = None
    scale = head_dim**-0.5 if scale is None else scale
    return _WindowAttention.apply(qkv_BNC, padding, bias_MTT, *grid[:2], num_heads, *window, *shift, scale)


def reference(
    qkv_BNC: Tensor,
    grid: tuple[int, ...],
    num_heads: int,
    window: tuple[int, int],
    *,
    shift: tuple[int, int] = (0, 0),
    padding: Tensor | None = None,
    bias_MTT: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """The definition in plain PyTorch."""
    qkv_WTC = _split(_completed(qkv_BNC, grid, window, padding), window, shift)
    q, k, v = qkv_WTC.unflatten(2, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)
    mask = None if bias_MTT is None else bias_MTT.to(q.dtype)[None]
    if any(shift):
        apart_RTT = _apart(grid, window, shift, q.device)
        closed = torch.zeros_like(apart_RTT, dtype=q.dtype).masked_fill_(apart_RTT, float("-inf"))[:, None]
        mask = (closed if mask is None else closed + mask).repeat(len(qkv_BNC), 1, 1, 1)
    o_WMTD = F.scaled_dot_product_attention(q, k, v, mask, scale=scale)
    return _merge(o_WMTD.transpose(1, 2).flatten(2), grid, window, shift)


def _completed(x_BNC: Tensor, grid: tuple[int, ...], window: tuple[int, int], padding: Tensor | None) -> Tensor:
    """(B, N, C) → the map (B, H', W', C) of whole windows."""
    below, right = (-size % side for size, side in zip(grid, window, strict=False))
    x_BHWC = x_BNC.unflatten(1, grid[:2])
    if not below and not right:
        return x_BHWC
    y_BHWC = F.pad(x_BHWC, (0, 0, 0, right, 0, below))
    if padding is None:
        return y_BHWC
    outside = torch.ones(*y_BHWC.shape[1:3], 1, dtype=torch.bool, device=y_BHWC.device)
    outside[: grid[0], : grid[1]] = False
    return torch.where(outside, padding.to(x_BNC.dtype), y_BHWC)


def _split(x_BHWC: Tensor, window: tuple[int, int], shift: tuple[int, int]) -> Tensor:
    """The map (B, H', W', C) → windows (B·R, T, C)."""
    x = x_BHWC.roll((-shift[0], -shift[1]), (1, 2)) if any(shift) else x_BHWC
    x = x.unflatten(2, (-1, window[1])).unflatten(1, (-1, window[0]))
    return x.transpose(2, 3).flatten(0, 2).flatten(1, 2)


def _merge(x_WTC: Tensor, grid: tuple[int, ...], window: tuple[int, int], shift: tuple[int, int]) -> Tensor:
    """Windows (B·R, T, C) → (B, N, C), without the cells that complete the map."""
    down, across = (-(-size // side) for size, side in zip(grid, window, strict=False))
    x = x_WTC.unflatten(1, window).unflatten(0, (-1, down, across)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
    x = x.roll(shift, (1, 2)) if any(shift) else x
    return x[:, : grid[0], : grid[1]].flatten(1, 2)


def _apart(grid: tuple[int, ...], window: tuple[int, int], shift: tuple[int, int], device: torch.device) -> Tensor:
    """Pairs in a shifted window that were not neighbours before the shift: bool (R, T, T)."""
    sides = [-(-size // side) * side for size, side in zip(grid, window, strict=False)]
    y, x = (torch.arange(side, device=device) >= side - s for side, s in zip(sides, shift, strict=True))
    seam_RT = _split((2 * y[:, None] + x)[None, ..., None], window, (0, 0))[..., 0]
    return seam_RT[:, :, None] != seam_RT[:, None, :]


def _check(
    qkv: Tensor,
    grid: tuple[int, ...],
    heads: int,
    window: tuple[int, int],
    shift: tuple[int, int],
    padding: Tensor | None,
    bias: Tensor | None,
) -> None:
    if len(grid) > 2 and grid[2]:
        raise ValueError(f"{WHO}: windows take no prefix tokens, got {grid[2]}; pass the tokens of the map alone")
    if qkv.dim() != 3 or qkv.shape[1] != grid[0] * grid[1]:
        raise ValueError(
            f"{WHO}: qkv must be (B, {grid[0]}*{grid[1]}, 3C), got {tuple(qkv.shape)}; pass the grid of this map"
        )
    if heads < 1 or qkv.shape[2] % (3 * heads):
        raise ValueError(
            f"{WHO}: qkv must be 3 x heads x head width wide, got {qkv.shape[2]} for {heads} heads; project to 3C"
        )
    if len(window) != 2 or min(window) < 1:
        raise ValueError(f"{WHO}: window must be (height, width) of at least 1, got {window}; give its sides in cells")
    if len(shift) != 2 or not all(0 <= s < side for s, side in zip(shift, window, strict=True)):
        raise ValueError(f"{WHO}: shift must be from 0 to below the window {window}, got {shift}; half of it is usual")
    if padding is not None and tuple(padding.shape) != (qkv.shape[2],):
        raise ValueError(
            f"{WHO}: padding must be ({qkv.shape[2]},), got {tuple(padding.shape)}; give the bias of the projection"
        )
    T = window[0] * window[1]
    if bias is not None and tuple(bias.shape) != (heads, T, T):
        raise ValueError(f"{WHO}: bias must be ({heads}, {T}, {T}), got {tuple(bias.shape)}; give one number per pair")


# Registration


def _forward(qkv, padding, bias, height, width, heads, h, w, sy, sx, scale):
    from kernels.window_attention import triton as fused

    out, lse = _fake_forward(qkv, padding, bias, height, width, heads, h, w, sy, sx, scale)
    fused.forward(qkv, padding, bias, (height, width), heads, (h, w), (sy, sx), scale, out, lse)
    return out, lse


def _backward(grad, qkv, padding, bias, out, lse, height, width, heads, h, w, sy, sx, scale):
    from kernels.window_attention import triton as fused

    return fused.backward(grad, qkv, padding, bias, out, lse, (height, width), heads, (h, w), (sy, sx), scale)


def _fake_forward(qkv, padding, bias, height, width, heads, h, w, sy, sx, scale):
    B, N, C = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    statistics = (0,) if h * w <= ONE_TILE else (B, heads, N)
    return qkv.new_empty((B, N, C)), qkv.new_empty(statistics, dtype=torch.float32)


def _fake_backward(grad, qkv, padding, bias, *_):
    padding, bias = (qkv.new_empty(0) if p is None else p.new_empty(p.shape) for p in (padding, bias))
    return qkv.new_empty(qkv.shape), padding, bias


def _flops(qkv, padding, bias, height, width, heads, h, w, *_, out_shape=None, **__):
    return 4 * qkv[0] * _windows(height, width, h, w) * (h * w) ** 2 * (qkv[2] // 3)


def _flops_backward(grad, qkv, padding, bias, out, lse, height, width, heads, h, w, *_, out_shape=None, **__):
    return 10 * qkv[0] * _windows(height, width, h, w) * (h * w) ** 2 * (qkv[2] // 3)


def _windows(height, width, h, w):
    return -(-height // h) * -(-width // w)


_SIZES = "SymInt height, SymInt width, int heads, int h, int w, int sy, int sx, float scale"
forward_op = define(
    f"window_attention_forward(Tensor qkv, Tensor? padding, Tensor? bias, {_SIZES}) -> (Tensor, Tensor)",
    _forward,
    _fake_forward,
    _flops,
)
backward_op = define(
    "window_attention_backward(Tensor grad, Tensor qkv, Tensor? padding, Tensor? bias, Tensor? out, Tensor? lse, "
    f"{_SIZES}) -> (Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
    _flops_backward,
)


class _WindowAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, padding, bias, *sizes):
        out, lse = forward_op(qkv, padding, bias, *sizes)
        one_tile = sizes[3] * sizes[4] <= ONE_TILE
        ctx.save_for_backward(qkv, padding, bias, *((None, None) if one_tile else (out, lse)))
        ctx.sizes = sizes
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        saved = ctx.saved_tensors
        dqkv, dpadding, dbias = backward_op(grad, *saved, *ctx.sizes)
        gradients = (
            None if whole is None else share for share, whole in zip((dpadding, dbias), saved[1:3], strict=True)
        )
        return dqkv, *gradients, *[None] * len(ctx.sizes)


# Shapes for the tests and the benchmark


def inputs(
    device: str | torch.device,
    dtype: torch.dtype,
    seed: int = 0,
    *,
    batch: int,
    grid: tuple[int, int],
    heads: int,
    window: tuple[int, int] = (7, 7),
    head_dim: int = 32,
    shift: tuple[int, int] = (0, 0),
    padding: bool = False,
    bias: bool = False,
    strided: bool = False,
) -> dict:
    """Keyword arguments of `window_attention`; `strided` takes qkv out of a wider tensor."""
    generator = torch.Generator(device).manual_seed(seed)
    tokens, T, width = grid[0] * grid[1], window[0] * window[1], 3 * heads * head_dim

    def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    qkv = random(batch, tokens, width + 16 * strided, dtype=dtype)[..., 16 * strided :]
    return {
        "qkv_BNC": qkv.detach().requires_grad_(),
        "grid": grid,
        "num_heads": heads,
        "window": window,
        "shift": shift,
        "padding": random(width).requires_grad_() if padding else None,
        "bias_MTT": random(heads, T, T).requires_grad_() if bias else None,
    }


def cost(
    itemsize: int,
    *,
    batch: int,
    grid: tuple[int, int],
    heads: int,
    window: tuple[int, int] = (7, 7),
    head_dim: int = 32,
    **_,
) -> Cost:
    """Forward reads q, k, v and writes o; backward reads q, k, v and the gradient and writes three."""
    tensor = batch * grid[0] * grid[1] * heads * head_dim * itemsize
    pairs = batch * _windows(*grid, *window) * (window[0] * window[1]) ** 2
    return Cost(4 * tensor, 7 * tensor, 4 * pairs * heads * head_dim, 10 * pairs * heads * head_dim)


SHIFTED = {"shift": (3, 3), "bias": True}
CHECKS = {
    "2x3 on 5x8, shifted": {
        **{"batch": 2, "grid": (5, 8), "heads": 2, "window": (2, 3), "head_dim": 16},
        **{"shift": (1, 1), "padding": True, "bias": True},
    },
    "one token": {"batch": 1, "grid": (1, 1), "heads": 1, "window": (1, 1), "head_dim": 48},
    "1x1 on 1x7": {"batch": 2, "grid": (1, 7), "heads": 2, "window": (1, 1), "head_dim": 24, "strided": True},
    "2x2 on 10x8, bias": {"batch": 1, "grid": (10, 8), "heads": 2, "window": (2, 2), "bias": True},
    "7x7 on 14x14": {"batch": 2, "grid": (14, 14), "heads": 1, "strided": True},
    "7x7 on 14x14, shifted": {"batch": 1, "grid": (14, 14), "heads": 2, "head_dim": 64, **SHIFTED},
    "7x7 on 9x13": {"batch": 1, "grid": (9, 13), "heads": 1, "head_dim": 72, "padding": True},
    "7x7 on 9x13, zeros, shifted": {"batch": 1, "grid": (9, 13), "heads": 1, "head_dim": 96, **SHIFTED},
    "7x7 on 4x5": {"batch": 3, "grid": (4, 5), "heads": 1, "padding": True, "bias": True},
    "10x10": {"batch": 1, "grid": (10, 10), "heads": 2, "window": (10, 10), "head_dim": 24},
    "10x10 on 13x10, shifted": {
        **{"batch": 1, "grid": (13, 10), "heads": 1, "window": (10, 10), "head_dim": 48},
        **{"shift": (5, 0), "padding": True, "bias": True},
    },
    "12x12, bias": {"batch": 1, "grid": (12, 12), "heads": 1, "window": (12, 12), "bias": True, "strided": True},
}


def _stages(batch: int, side: int, heads: int, shifted: bool, **options) -> dict:
    """The four stages of a pyramid: half the side, twice the heads; the last map is one window and is not shifted."""
    shift = tuple(s // 2 for s in options.get("window", (7, 7)))
    return {
        stage: {
            **{"batch": batch, "grid": (side >> stage - 1,) * 2, "heads": heads << stage - 1, **options},
            **({"shift": shift if stage < 4 else (0, 0), "bias": True} if shifted else {}),
        }
        for stage in (1, 2, 3, 4)
    }


DAVIT_TINY, DAVIT_BASE = _stages(128, 56, 3, False), _stages(128, 56, 4, False)
SWIN_TINY, SWIN_BASE_384 = _stages(128, 56, 3, True), _stages(32, 96, 4, True, window=(12, 12))
DAVIT_512, DAVIT_1024 = (_stages(*sizes, 3, False, padding=True) for sizes in ((16, 128), (4, 256)))
STAGES = {
    **{f"7x7 224 px stage {stage} (DaViT-T)": shape for stage, shape in DAVIT_TINY.items()},
    **{f"7x7 224 px stage {stage} (DaViT-B)": DAVIT_BASE[stage] for stage in (1, 3)},
    **{f"7x7 shifted, bias 224 px stage {stage} (Swin-T)": shape for stage, shape in SWIN_TINY.items()},
    **{f"12x12 shifted, bias 384 px stage {stage} (Swin-B)": SWIN_BASE_384[stage] for stage in (1, 3)},
    **{f"7x7 padded 512 px stage {stage}": DAVIT_512[stage] for stage in (1, 3)},
    **{f"7x7 padded 1024 px stage {stage}": DAVIT_1024[stage] for stage in (1, 3)},
    "7x7 shifted, bias, padded 1024 px stage 1": {**DAVIT_1024[1], **SHIFTED},
    "7x7 224 px stage 1, one image": {**DAVIT_TINY[1], "batch": 1},
    "7x7 224 px stage 3, one image": {**DAVIT_TINY[3], "batch": 1},
}


def _official(
    qkv_BNC: Tensor, grid: tuple[int, int], num_heads: int, window: tuple[int, int], *, shift, padding, bias_MTT
) -> Tensor:
    """As the authors' codes do it: copies of windows, explicit weights, copies back."""
    qkv_WTC = _split(_completed(qkv_BNC, grid, window, padding), window, shift)
    W, T, C = qkv_WTC.shape
    q, k, v = qkv_WTC.reshape(W, T, 3, num_heads, -1).permute(2, 0, 3, 1, 4)
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if bias_MTT is not None:
        logits = logits + bias_MTT.to(q.dtype)
    if any(shift):
        far_RTT = _apart(grid, window, shift, q.device).to(q.dtype) * -100
        logits = (logits.view(-1, len(far_RTT), num_heads, T, T) + far_RTT[:, None]).flatten(0, 1)
    o_WTC = (logits.softmax(-1) @ v).transpose(1, 2).reshape(W, T, C // 3)
    return _merge(o_WTC, grid, window, shift).contiguous()


def _dense(qkv_BNC: Tensor, grid: tuple[int, int], num_heads: int, *_, **__) -> Tensor:
    """Attention over the whole map."""
    q, k, v = qkv_BNC.unflatten(2, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


OPERATION = Operation(
    name=WHO,
    run=window_attention,
    reference=reference,
    inputs=inputs,
    checks=CHECKS,
    stages=STAGES,
    cost=cost,
    baselines={"official": _official, "pytorch": reference, "sdpa": _dense},
)
