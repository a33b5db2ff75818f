"""Triton kernels of `kernels.layer_norm`: forward, and the backward of the norm, without atomics.

A program holds all channels of its tokens. The convolution goes through the rows of the map as in
`kernels.device.conv`: each row that is read is added to all of the four output rows that see it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.depthwise_conv import triton_backward as depthwise_conv
from kernels.device.conv import four_rows, tile_of_map
from kernels.device.launch import MULTIPROCESSORS, launch, power_of_2, rows

FULL = 4 * MULTIPROCESSORS  # programs


@triton.jit
def _standardise(x, real, live, C, eps):
    """(x - mean) / √(var + ε), and 1 / √(var + ε), of each row; x is 0 beyond C and in rows that are not real."""
    centred = tl.where(live[None, :], x - (tl.sum(x, 1) / C)[:, None], 0.0)
    variance = tl.where(real, tl.sum(centred * centred, 1) / C, 1.0)
    factor = 1.0 / tl.sqrt(variance + eps)
    return centred * factor[:, None], factor


@triton.jit
def _finish(acc, keep, real, place, x, x_row, y, n, w, b, C, live, eps):
    """Adds x to one row of the map, and stores it and its norm."""
    acc += tl.load(x + place * x_row, mask=keep, other=0.0).to(tl.float32)
    tl.store(y + place * C, acc.to(y.dtype.element_ty), mask=keep)
    value = _standardise(acc, real, live, C, eps)[0] * w[None, :] + b[None, :]
    tl.store(n + place * C, value.to(n.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["H", "W", "tokens"])
def _conv_norm(
    x, taps, bias, norm_weight, norm_bias, y, n, eps, H, W, C, tokens, x_batch, x_row,
    K: tl.constexpr, BX: tl.constexpr, BC: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    image, first, col, c = tile_of_map(H, W, C, BX, BC)
    x += image * x_batch
    live = c < C
    acc0, acc1, acc2, acc3 = four_rows(x, taps, bias, first, col, c, live, H, W, C, x_row, K, BX, BC, BIAS)
    w = tl.load(norm_weight + c, mask=live, other=0.0).to(tl.float32)
    b = tl.load(norm_bias + c, mask=live, other=0.0).to(tl.float32)
    real = col < W
    inside = real[:, None] & live[None, :]
    place = first * W + col[:, None]
    x += c[None, :]
    y += image * tokens * C + c[None, :]
    n += image * tokens * C + c[None, :]
    _finish(acc0, inside & (first < H), real, place, x, x_row, y, n, w, b, C, live, eps)
    _finish(acc1, inside & (first + 1 < H), real, place + W, x, x_row, y, n, w, b, C, live, eps)
    _finish(acc2, inside & (first + 2 < H), real, place + 2 * W, x, x_row, y, n, w, b, C, live, eps)
    _finish(acc3, inside & (first + 3 < H), real, place + 3 * W, x, x_row, y, n, w, b, C, live, eps)


@triton.jit(do_not_specialize=["rows_total", "tokens", "programs"])
def _norm_backward(
    x, dn, dy, norm_weight, dx, partial, eps, rows_total, tokens, C, programs,
    x_batch, x_row, dn_batch, dn_row, dy_batch, dy_row,
    BT: tl.constexpr, BC: tl.constexpr, MORE: tl.constexpr,
):  # fmt: skip
    """dx, with MORE on top of dy; sums for the weights over every `programs`-th tile of tokens of all images."""
    c = tl.arange(0, BC)
    live = c < C
    w = tl.load(norm_weight + c, mask=live, other=0.0).to(tl.float32)
    for_weight = tl.zeros([BT, BC], tl.float32)
    for_bias = tl.zeros([BT, BC], tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(rows_total, BT), programs):
        row = tile * BT + tl.arange(0, BT)
        real = row < rows_total
        image = (row // tokens).to(tl.int64)[:, None]
        token = (row % tokens)[:, None]
        keep = real[:, None] & live[None, :]
        value = tl.load(x + image * x_batch + token * x_row + c[None, :], mask=keep, other=0.0).to(tl.float32)
        slope = tl.load(dn + image * dn_batch + token * dn_row + c[None, :], mask=keep, other=0.0).to(tl.float32)
        if MORE:
            more = tl.load(dy + image * dy_batch + token * dy_row + c[None, :], mask=keep, other=0.0).to(tl.float32)
        value, factor = _standardise(value, real, live, C, eps)
        for_weight += slope * value
        for_bias += slope
        slope *= w[None, :]
        slope -= (tl.sum(slope, 1) / C)[:, None] + value * (tl.sum(slope * value, 1) / C)[:, None]
        slope *= factor[:, None]
        if MORE:
            slope += more
        tl.store(dx + (image * tokens + token) * C + c[None, :], slope.to(dx.dtype.element_ty), mask=keep)
    # (2, programs, C)
    tl.store(partial + tl.program_id(0) * C + c, tl.sum(for_weight, 0), mask=live)
    tl.store(partial + (programs + tl.program_id(0)) * C + c, tl.sum(for_bias, 0), mask=live)


def tiles(positions: int, channels: int, elements: int) -> tuple[int, int, int]:
    """Tokens and channels of a program that holds about so many elements, and its warps: 8 of 256 channels or more."""
    width = power_of_2(channels)
    warps = 8 if width >= 256 else 4
    return min(max(1, elements * warps // 4 // width), power_of_2(positions, least=1)), width, warps


def conv_forward(
    x: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    grid: tuple[int, int, int],
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """y and its norm."""
    x, norm = rows(x), (norm_weight.contiguous(), norm_bias.contiguous())
    (_, N, C), (H, W, prefix), K = x.shape, grid, conv_weight.shape[-1]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    n = torch.empty(x.shape, dtype=dtype, device=x.device)
    taps = conv_weight.reshape(C, K * K).t().contiguous()
    _conv_into(y[:, prefix:], n[:, prefix:], x[:, prefix:], taps, conv_bias, norm, (H, W, N), K, eps)
    if prefix:
        # a convolution of nothing
        taps = torch.zeros(1, C, dtype=torch.float32, device=x.device)
        _conv_into(y, n, x, taps, None, norm, (1, prefix, N), 1, eps)
    return y, n


def _conv_into(y, n, x, taps, bias, norm, sizes, K, eps) -> None:
    B, C, (H, W, N) = x.shape[0], x.shape[2], sizes
    BX, BC, warps = tiles(W, C, 1024)
    launch(
        _conv_norm, (B * triton.cdiv(H, 4) * triton.cdiv(W, BX),),
        x, taps, bias, *norm, y, n, eps, H, W, C, N, x.stride(0), x.stride(1),
        warps=warps, K=K, BX=BX, BC=BC, BIAS=bias is not None,
    )  # fmt: skip


def conv_backward(
    dy: Tensor | None,
    dn: Tensor | None,
    x: Tensor,
    y: Tensor,
    conv_weight: Tensor,
    norm_weight: Tensor,
    grid: tuple[int, int, int],
    eps: float,
    needed: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, the weight and bias of the convolution, and the weight and bias of the norm.

    Those of x and of the convolution are empty where they are not `needed`. None for dy or dn: it was not used.
    """
    dn = torch.zeros(y.shape, dtype=y.dtype, device=y.device) if dn is None else dn
    total, norm_weight_grad, norm_bias_grad = norm_backward(dy, dn, y, norm_weight, eps)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if needed[0] else None
    trained = any(needed[1:3])
    sums = depthwise_conv.gradients(total, x, conv_weight, dx, grid, other=total, trained=trained)
    nothing = conv_weight.new_empty(0)
    weight_grad, bias_grad = (g.to(conv_weight.dtype) for g in sums) if sums else (nothing, nothing.clone())
    return nothing.to(x.dtype) if dx is None else dx, weight_grad, bias_grad, norm_weight_grad, norm_bias_grad


def norm_backward(
    dy: Tensor | None, dn: Tensor, x: Tensor, norm_weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of x through the norm, added to dy, and those of the weight and bias of the norm."""
    x, dn, dy = rows(x), rows(dn), None if dy is None else rows(dy)
    B, N, C = x.shape
    BT, BC, warps = tiles(B * N, C, 4096 // x.element_size())
    programs = min(FULL, triton.cdiv(B * N, BT))
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    partial = torch.empty(2, programs, C, dtype=torch.float32, device=x.device)
    launch(
        _norm_backward, (programs,),
        x, dn, dy, norm_weight.contiguous(), dx, partial, eps, B * N, N, C, programs,
        x.stride(0), x.stride(1), dn.stride(0), dn.stride(1), *((0, 0) if dy is None else dy.stride()[:2]),
        warps=warps, BT=BT, BC=BC, MORE=dy is not None,
    )  # fmt: skip
    return dx, *(p.sum(0).to(norm_weight.dtype) for p in partial)
