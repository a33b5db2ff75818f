"""Inputs, shapes, least work and baselines of window attention, for the tests and the benchmark."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import windows
from kernels.operation import Cost, Operation, in_pytorch
from kernels.window_attention import WHO, to_windows, window_attention
from kernels.window_attention.register import windows_of


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
    pairs = batch * windows_of(*grid, *window) * (window[0] * window[1]) ** 2
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
    qkv_WTC = to_windows(qkv_BNC, grid, window, shift, padding)
    W, T, C = qkv_WTC.shape
    q, k, v = qkv_WTC.reshape(W, T, 3, num_heads, -1).permute(2, 0, 3, 1, 4)
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if bias_MTT is not None:
        logits = logits + bias_MTT.to(q.dtype)
    if any(shift):
        far_RTT = ~windows.shift_mask(*grid, window, shift, q.device) * -100.0
        logits = (logits.view(-1, len(far_RTT), num_heads, T, T) + far_RTT[:, None].to(q.dtype)).flatten(0, 1)
    o_WTC = (logits.softmax(-1) @ v).transpose(1, 2).reshape(W, T, C // 3)
    return windows.merge(o_WTC, *grid, window, shift)


def _dense(qkv_BNC: Tensor, grid: tuple[int, int], num_heads: int, *_, **__) -> Tensor:
    """Attention over the whole map."""
    q, k, v = qkv_BNC.unflatten(2, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


OPERATION = Operation(
    name=WHO,
    run=window_attention,
    inputs=inputs,
    checks=CHECKS,
    stages=STAGES,
    cost=cost,
    baselines={"official": _official, "pytorch": in_pytorch(window_attention), "sdpa": _dense},
)
