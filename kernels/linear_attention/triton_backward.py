"""Gradients of `kernels.linear_attention`: of queries, of keys and values, and of the convolutions; see `triton`."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.depthwise_conv import triton_backward as depthwise_conv
from kernels.device.conv import convolve, widened
from kernels.device.launch import launch, rows
from kernels.device.memory import load_tile, store_tile
from kernels.linear_attention import EPS
from kernels.linear_attention.features import (
    feature_of,
    flipped,
    inverse_of,
    operand,
    place_of_program,
    product,
    state_of,
    through_feature,
)
from kernels.linear_attention.triton import constants_of, extra_rows, of_images, shares, tiles, weight_of, whole


@triton.jit(do_not_specialize=["plane"])
def _backward_q(
    q, grad, scale, stats, state, pulls, dq, dstate, dscale, N, span, chunks, groups, per, batch, row, grad_batch,
    grad_row, plane, eps, factor,
    M: tl.constexpr, D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, FOCUSED: tl.constexpr, POWER: tl.constexpr,
    EXTRA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of the queries; of a share of the tokens that of the state, in the row below that of z or of the mean of
    v, and that of the scale.

    "focused": f is homogeneous, so Σ grad·phi over a head is eps times the gradient of 1 / (φ(q) z + eps).
    """
    image, chunk, start, stop, first, last = place_of_program(N, span, chunks, groups, per, M)
    C: tl.constexpr = M * D
    q += image * batch
    grad += image * grad_batch
    dq += image * N * 3 * C
    stats += image * N
    pulls += image * N
    state += image * M * (D + EXTRA) * D
    t = tl.arange(0, BT)
    d = tl.arange(0, BD)
    live = d < D
    zero = tl.zeros([BT, BD], tl.float32)
    if FOCUSED:
        for n0 in tl.range(start, stop, BT):
            n = n0 + t
            there = n < stop
            total = tl.zeros([BT], tl.float32)
            square = tl.zeros([BT], tl.float32)
            for h in tl.range(0, tl.minimum(groups * per, M), num_stages=1):
                c = h * D + d
                S, z, _unused = state_of(state, h, D, BD, EXTRA, PRECISION)
                x = widened(load_tile(q, n, row, c, there, live))
                g = load_tile(grad, n, grad_row, c, there, live)
                b, slope = feature_of(x, inverse_of(scale, c, live), stats, plane, n, there, POWER)
                phi = slope * b
                through = product(operand(g, PRECISION), flipped(S), zero, PRECISION)
                over = 1.0 / (tl.sum(phi * z[None, :], 1) + eps)
                total += tl.sum(through * phi, 1) * over * over
                square += tl.sum(b * b, 1)
            tl.store(pulls + n, eps * total / square, mask=there)
        tl.debug_barrier()
    for h in range(first, last):
        c = h * D + d
        if FOCUSED:
            inverse = inverse_of(scale, c, live)
        S, z, _unused = state_of(state, h, D, BD, EXTRA, PRECISION)
        S = flipped(S)
        acc = tl.zeros([BD, BD], tl.float32)
        below = tl.zeros([BD], tl.float32)  # sums of a column: a sum for each token would not fit in the registers
        scales = tl.zeros([BD], tl.float32)
        for n0 in range(start, stop, BT):
            n = n0 + t
            there = n < stop
            x = load_tile(q, n, row, c, there, live)
            g = load_tile(grad, n, grad_row, c, there, live)
            through = product(operand(g, PRECISION), S, zero, PRECISION)
            if FOCUSED:
                x = widened(x)
                b, slope = feature_of(x, inverse, stats, plane, n, there, POWER)
                phi = slope * b
                over = 1.0 / (tl.sum(phi * z[None, :], 1) + eps)
                lost = tl.sum(through * phi, 1) * over
                pull = tl.load(pulls + n, mask=there, other=0.0)
                through = (through - lost[:, None] * z[None, :]) * (POWER * over)[:, None]
                through, log_b = through_feature(through, x, b, slope, inverse, pull, POWER)
                scales += tl.sum(log_b, 0)
                phi *= over[:, None]
                below -= tl.sum(lost[:, None] * phi, 0)
                left = operand(phi, PRECISION)
            else:
                through *= factor
                below += tl.sum(widened(g), 0)
                left = operand(x, PRECISION)
            store_tile(dq, n, 3 * C, c, there, live, through)
            acc = product(flipped(left), operand(g, PRECISION), acc, PRECISION)
        if not FOCUSED:
            acc *= factor
        out = dstate + ((image * chunks + chunk) * M + h) * (D + 1) * D
        tl.store(out + d[:, None] * D + d[None, :], acc, mask=live[:, None] & live[None, :])
        tl.store(out + D * D + d, below, mask=live)
        if FOCUSED:
            tl.store(dscale + (image * chunks + chunk) * C + c, -scales * inverse, mask=live)


@triton.jit(do_not_specialize=["plane"])
def _backward_k(
    k, v, grad, scale, position, stats, state, dstate, taps, pulls, dk, dv, dscale, N, W, H, prefix, span, chunks,
    groups, per, batch, row, grad_batch, grad_row, plane, inverse_N,
    M: tl.constexpr, D: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, FOCUSED: tl.constexpr,
    POWER: tl.constexpr, POSITION: tl.constexpr, EXTRA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of keys and values of a share of the tokens, and that of the scale."""
    image, chunk, start, stop, first, last = place_of_program(N, span, chunks, groups, per, M)
    C: tl.constexpr = M * D
    k += image * batch
    v += image * batch
    dk += image * N * 3 * C
    dv += image * N * 3 * C
    stats += 2 * plane + image * N
    pulls += image * N
    state += image * M * (D + EXTRA) * D
    dstate += image * M * (D + 1) * D
    if K > 0:
        grad += image * grad_batch
        taps += image * K * K * C
    t = tl.arange(0, BT)
    d = tl.arange(0, BD)
    live = d < D
    zero = tl.zeros([BT, BD], tl.float32)
    if FOCUSED:
        for n0 in tl.range(start, stop, BT):
            n = n0 + t
            there = n < stop
            total = tl.zeros([BT], tl.float32)
            square = tl.zeros([BT], tl.float32)
            for h in tl.range(0, tl.minimum(groups * per, M), num_stages=1):
                c = h * D + d
                dS, dz, _unused = state_of(dstate, h, D, BD, 1, PRECISION)
                key = widened(load_tile(k, n, row, c, there, live))
                if POSITION:
                    key += load_tile(position, n, C, c, there, live).to(tl.float32)
                value = load_tile(v, n, row, c, there, live)
                b, slope = feature_of(key, inverse_of(scale, c, live), stats, plane, n, there, POWER)
                dphi = product(operand(value, PRECISION), flipped(dS), zero, PRECISION) + dz[None, :]
                total += tl.sum(dphi * (slope * b), 1)
                square += tl.sum(b * b, 1)
            tl.store(pulls + n, total / square * inverse_N, mask=there)
        tl.debug_barrier()
    for h in range(first, last):
        c = h * D + d
        dS, dz, _unused = state_of(dstate, h, D, BD, 1, PRECISION)
        if FOCUSED:
            inverse = inverse_of(scale, c, live)
        else:
            _unused, k_mean, v_mean = state_of(state, h, D, BD, EXTRA, PRECISION)
        scales = tl.zeros([BT, BD], tl.float32)
        for n0 in range(start, stop, BT):
            n = n0 + t
            there = n < stop
            key = widened(load_tile(k, n, row, c, there, live))
            value = load_tile(v, n, row, c, there, live)
            if FOCUSED:
                if POSITION:
                    key += load_tile(position, n, C, c, there, live).to(tl.float32)
                b, slope = feature_of(key, inverse, stats, plane, n, there, POWER)
                phi = slope * b
                pull = tl.load(pulls + n, mask=there, other=0.0)
                dphi = product(operand(value, PRECISION), flipped(dS), zero, PRECISION) + dz[None, :]
                dphi *= POWER * inverse_N
                dkey, log_b = through_feature(dphi, key, b, slope, inverse, pull, POWER)
                scales += log_b
            else:
                value = widened(value) - v_mean[None, :]
                phi = key - k_mean[None, :]
                dkey = product(operand(value, PRECISION), flipped(dS), zero, PRECISION) * inverse_N
            store_tile(dk, n, 3 * C, c, there, live, dkey)
            dvalue = product(operand(phi, PRECISION), dS, zero, PRECISION)
            if not FOCUSED:
                dvalue += dz[None, :]
            dvalue *= inverse_N
            if K > 0:
                dvalue += convolve(
                    grad + h * D, grad_row, taps + h * D, n, there, d, D, W, H, prefix, C, K, BT, BD, True
                )
            store_tile(dv, n, 3 * C, c, there, live, dvalue)
        if FOCUSED:
            tl.store(dscale + (image * chunks + chunk) * C + c, -tl.sum(scales, 0) * inverse, mask=live)


def backward(
    grad: Tensor, qkv: Tensor, state: Tensor, stats: Tensor, taps: Tensor, scale: Tensor | None,
    position: Tensor | None, weight: Tensor | None, bias: Tensor | None, lepe_weight: Tensor | None,
    lepe_bias: Tensor | None, grid: tuple[int, int, int], M: int, feature: str, constant: float, needed: list[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of the packed projection and of the six parameters; empty ones for parameters that are None.

    Those of the convolutions, the last four, are empty too where none of them is `needed`.
    """
    qkv, grad = rows(qkv), rows(grad)
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    dscale = _token_gradients(dqkv, grad, qkv, state, stats, scale, position, weight, grid, M, feature, constant)
    C = grad.shape[2]
    dposition = _none(qkv) if position is None else dqkv[:, :, C : 2 * C].sum(0, dtype=torch.float32)
    parameters = (weight, bias, lepe_weight, lepe_bias)
    return (
        dqkv,
        _none(qkv) if scale is None else dscale.sum(0).to(scale.dtype),
        dposition if position is None else dposition.to(position.dtype),
        *_through_convolution(grad, qkv[..., 2 * C :], taps, dqkv[..., 2 * C :], grid, *parameters, any(needed[3:])),
    )


def _token_gradients(
    dqkv: Tensor, grad: Tensor, qkv: Tensor, state: Tensor, stats: Tensor, scale: Tensor | None,
    position: Tensor | None, weight: Tensor | None, grid: tuple[int, int, int], M: int, feature: str, constant: float,
) -> Tensor:  # fmt: skip
    """Writes dqkv, without what passes through a convolution that all images share; shares of the scale's gradient."""
    (q, k, v), (dq, dk, dv) = qkv.chunk(3, -1), dqkv.chunk(3, -1)
    (B, N, C), (H, W, prefix) = grad.shape, grid
    D, together = C // M, feature == "focused"
    common = constants_of(qkv, M, feature, constant) | {"EXTRA": extra_rows(feature)}
    strides = (qkv.stride(0), qkv.stride(1), grad.stride(0), grad.stride(1), B * N)
    tile, tile_k = tiles("backward_q", D, N), tiles("backward_k", D, N)
    span, chunks, groups, per = shares(B, N, M, tile["BT"], max(8 * D, 512), together)
    span_k, chunks_k, groups_k, per_k = shares(B, N, M, tile_k["BT"], 4 * tile_k["BT"], together)
    partial = torch.empty(B, chunks, M, D + 1, D, dtype=torch.float32, device=qkv.device)
    pulls = torch.empty((B, N) if together else 0, dtype=torch.float32, device=qkv.device)
    dscale = torch.empty((B * (chunks + chunks_k), C) if together else 0, dtype=torch.float32, device=qkv.device)
    launch(
        _backward_q, (B * chunks * groups,), q, grad, scale, stats, state, pulls, dq, partial, dscale, N, span,
        chunks, groups, per, *strides, EPS, constant, stages=1, **common, **tile,
    )  # fmt: skip
    dstate = partial.sum(1) if chunks > 1 else partial
    apart = together or weight is None
    launch(
        _backward_k, (B * chunks_k * groups_k,), k, v, k if apart else grad, scale, whole(position), stats, state,
        dstate, k if apart else of_images(weight), pulls, dk, dv, dscale[B * chunks :], N, W, H, prefix, span_k,
        chunks_k, groups_k, per_k, *strides, 1 / N, stages=1, K=0 if apart else weight.shape[-1],
        POSITION=position is not None, **common, **tile_k,
    )  # fmt: skip
    return dscale


def _none(like: Tensor) -> Tensor:
    return torch.empty(0, dtype=torch.float32, device=like.device)


def _through_convolution(
    grad: Tensor, v: Tensor, taps: Tensor, dv: Tensor, grid: tuple[int, int, int], weight: Tensor | None,
    bias: Tensor | None, lepe_weight: Tensor | None, lepe_bias: Tensor | None, trained: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Adds to the gradient of the values; those of weight, bias, and of the second convolution.

    They are parts and sums over heads of one gradient per channel; or of each image, without taps.
    """
    parameters = (weight, bias, lepe_weight, lepe_bias)
    if taps.numel():
        sums = depthwise_conv.gradients(grad, v, weight_of(taps), dv, grid, other=dv, trained=trained)
        if trained:
            return tuple(_none(v) if p is None else _part(sums[p.dim() < 4], p) for p in parameters)
    elif weight is not None and trained:
        sums = depthwise_conv.weight_gradient_of_images(grad, v, weight.shape[-1], grid)
        return sums.to(weight.dtype), *(_none(v) for _ in parameters[1:])
    return tuple(_none(v) for _ in parameters)


def _part(total: Tensor, parameter: Tensor) -> Tensor:
    """The gradient of a parameter that is shared by heads, and smaller than the convolution that it is part of."""
    if parameter.dim() == 4:
        edge = (total.shape[-1] - parameter.shape[-1]) // 2
        total = total[:, :, edge : total.shape[-1] - edge, edge : total.shape[-1] - edge]
    return total.unflatten(0, (-1, parameter.shape[0])).sum(0).to(parameter.dtype)
