"""Gradients of `kernels.linear_attention`: of queries, of keys and values, and of the convolutions; see `triton`."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.depthwise_conv import triton_backward as depthwise_conv
from kernels.device.conv import convolve
from kernels.device.launch import MULTIPROCESSORS, launch, power_of_2, rows
from kernels.linear_attention import EPS
from kernels.linear_attention.features import (
    feature_of,
    inverse_of,
    load,
    operand,
    place_of_program,
    positive,
    state_of,
    through_feature,
)
from kernels.linear_attention.triton import constants_of, extra_rows, per_image, shares, side_of, tiles, whole


@triton.jit
def _query_gradient(phi, grad, S, z, eps, factor, FOCUSED: tl.constexpr, PRECISION: tl.constexpr):
    """Gradient of φ(q), that of φ(q) S, and minus that of φ(q) z."""
    # S on the left, as forward if large: a warp holds some of its rows, but would hold all of a right factor
    through = tl.trans(tl.dot(S, tl.trans(grad), input_precision=PRECISION))
    if FOCUSED:
        over = 1.0 / (tl.sum(phi * z[None, :], 1) + eps)
        pull = tl.sum(through * phi, 1) * over
        through = (through - pull[:, None] * z[None, :]) * over[:, None]
        grad *= over[:, None]
        pull *= over
    else:
        through *= factor
        grad *= factor
        pull = tl.zeros_like(tl.sum(phi, 1))
    return through, grad, pull


@triton.jit(do_not_specialize=["plane"])
def _backward_q(
    qkv, grad, scale, stats, state, pulls, dqkv, dstate, dscale, N, span, chunks, groups, per, batch, row, grad_batch,
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
    q = qkv + image * batch
    grad += image * grad_batch
    dqkv += image * N * 3 * C
    stats += image * N
    pulls += image * N
    state += image * M * (D + EXTRA) * D
    t = tl.arange(0, BT)
    d = tl.arange(0, BD)
    live = d < D
    if FOCUSED:
        for n0 in tl.range(start, stop, BT):
            n = n0 + t
            total = tl.zeros([BT], tl.float32)
            square = tl.zeros([BT], tl.float32)
            for h in tl.range(0, tl.minimum(groups * per, M), num_stages=1):
                c = h * D + d
                inside = (n < stop)[:, None] & live[None, :]
                inverse = inverse_of(scale, c, live)
                S, z, _unused = state_of(state, h, D, BD, EXTRA, PRECISION)
                x = load(q, n, row, c, inside)
                phi = feature_of(x, inverse, stats, plane, n, n < stop, FOCUSED, POWER)
                g = load(grad, n, grad_row, c, inside)
                _unused, g, pull = _query_gradient(phi, g, S, z, eps, factor, FOCUSED, PRECISION)
                b = positive(x, inverse)
                total += pull
                square += tl.sum(b * b, 1)
            tl.store(pulls + n, eps * total / square, mask=n < stop)
        tl.debug_barrier()
    for h in range(first, last):
        c = h * D + d
        inverse = live
        if FOCUSED:
            inverse = inverse_of(scale, c, live)
        S, z, _unused = state_of(state, h, D, BD, EXTRA, PRECISION)
        acc = tl.zeros([BD, BD], tl.float32)
        below = tl.zeros([BD], tl.float32)
        scales = tl.zeros([BD], tl.float32)
        for n0 in range(start, stop, BT):
            n = n0 + t
            inside = (n < stop)[:, None] & live[None, :]
            x = load(q, n, row, c, inside)
            phi = feature_of(x, inverse, stats, plane, n, n < stop, FOCUSED, POWER)
            g = load(grad, n, grad_row, c, inside)
            if not FOCUSED:
                below += tl.sum(g, 0)
            dphi, g, pull = _query_gradient(phi, g, S, z, eps, factor, FOCUSED, PRECISION)
            if FOCUSED:
                below -= tl.sum(pull[:, None] * phi, 0)
            b = x
            if FOCUSED:
                b = positive(x, inverse)
                pull = tl.load(pulls + n, mask=n < stop, other=0.0)
            dx, log_b = through_feature(dphi, x, phi, b, pull, FOCUSED, POWER)
            scales += tl.sum(log_b, 0)
            tl.store(dqkv + n[:, None] * 3 * C + c[None, :], dx.to(dqkv.dtype.element_ty), mask=inside)
            acc = tl.dot(tl.trans(operand(phi, PRECISION)), operand(g, PRECISION), acc, input_precision=PRECISION)
        out = dstate + ((image * chunks + chunk) * M + h) * (D + 1) * D
        tl.store(out + d[:, None] * D + d[None, :], acc, mask=live[:, None] & live[None, :])
        tl.store(out + D * D + d, below, mask=live)
        if FOCUSED:
            tl.store(dscale + (image * chunks + chunk) * C + c, -scales * inverse, mask=live)


@triton.jit(do_not_specialize=["plane"])
def _backward_k(
    qkv, grad, scale, position, stats, state, dstate, taps, dqkv, dscale, N, W, H, prefix, chunks, groups, per, batch,
    row, grad_batch, grad_row, plane, taps_batch, inverse_N,
    M: tl.constexpr, D: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, FOCUSED: tl.constexpr,
    POWER: tl.constexpr, POSITION: tl.constexpr, EXTRA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of keys and values of one tile, and that of the scale."""
    image, chunk, start, stop, first, last = place_of_program(N, BT, chunks, groups, per, M)
    C: tl.constexpr = M * D
    k = qkv + image * batch + C
    v = k + C
    grad += image * grad_batch
    dk = dqkv + image * N * 3 * C + C
    stats += 2 * plane + image * N
    state += image * M * (D + EXTRA) * D
    dstate += image * M * (D + 1) * D
    if K > 0:
        taps += image * taps_batch
    n = start + tl.arange(0, BT)
    there = n < stop
    d = tl.arange(0, BD)
    live = d < D
    inside = there[:, None] & live[None, :]
    pull = tl.zeros([BT], tl.float32)
    if FOCUSED:
        square = tl.zeros([BT], tl.float32)
        for h in range(0, tl.minimum(groups * per, M)):
            c = h * D + d
            inverse = inverse_of(scale, c, live)
            dS, dz, _unused = state_of(dstate, h, D, BD, 1, PRECISION)
            key = load(k, n, row, c, inside)
            if POSITION:
                key += load(position, n, C, c, inside)
            phi = feature_of(key, inverse, stats, plane, n, there, FOCUSED, POWER)
            value = load(v, n, row, c, inside)
            dphi = tl.dot(value, tl.trans(dS), input_precision=PRECISION) + dz[None, :]
            b = positive(key, inverse)
            pull += tl.sum(dphi * phi, 1) * inverse_N
            square += tl.sum(b * b, 1)
        pull /= square
    for h in range(first, last):
        c = h * D + d
        inverse = live
        if FOCUSED:
            inverse = inverse_of(scale, c, live)
        dS, dz, _unused = state_of(dstate, h, D, BD, 1, PRECISION)
        key = load(k, n, row, c, inside)
        value = load(v, n, row, c, inside)
        if POSITION:
            key += load(position, n, C, c, inside)
        if not FOCUSED:
            _unused, k_mean, v_mean = state_of(state, h, D, BD, EXTRA, PRECISION)
            value = operand(value - v_mean[None, :], PRECISION)
            phi = key - k_mean[None, :]
        else:
            phi = feature_of(key, inverse, stats, plane, n, there, FOCUSED, POWER)
        dphi = tl.dot(value, tl.trans(dS), input_precision=PRECISION)
        if FOCUSED:
            dphi += dz[None, :]
        b = key
        if FOCUSED:
            b = positive(key, inverse)
        dkey, log_b = through_feature(dphi * inverse_N, key, phi, b, pull, FOCUSED, POWER)
        tl.store(dk + n[:, None] * 3 * C + c[None, :], dkey.to(dqkv.dtype.element_ty), mask=inside)
        if FOCUSED:
            log_b = tl.where(inside, log_b, 0.0)
            tl.store(dscale + (image * chunks + chunk) * C + c, -tl.sum(log_b, 0) * inverse, mask=live)
        if BD > 64:  # read again: two forms of it at once would not fit in shared memory
            dS, dz, _unused = state_of(dstate, h, D, BD, 1, PRECISION)
        dvalue = tl.dot(operand(phi, PRECISION), dS, input_precision=PRECISION)
        if not FOCUSED:
            dvalue += dz[None, :]
        dvalue *= inverse_N
        if K > 0:
            dvalue += convolve(grad + h * D, grad_row, taps + h * D, n, there, d, D, W, H, prefix, C, K, BT, BD, True)
        tl.store(dk + n[:, None] * 3 * C + C + c[None, :], dvalue.to(dqkv.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize_on_alignment=["splits"])
def _correlate(grad, v, partial, N, W, H, prefix, C, splits, grad_batch, grad_row, v_batch, v_row,
               BT: tl.constexpr, BC: tl.constexpr):  # fmt: skip
    """One row of the 3×3 weight gradient of one image over a share of its tokens: (B, splits, C, 9)."""
    dy = tl.program_id(0) % 3
    split = tl.program_id(0) // 3 % splits
    image = (tl.program_id(0) // 3 // splits).to(tl.int64)
    grad += image * grad_batch
    v += image * v_batch
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    live = c < C
    acc0 = tl.zeros([BT, BC], tl.float32)
    acc1 = tl.zeros([BT, BC], tl.float32)
    acc2 = tl.zeros([BT, BC], tl.float32)
    for n0 in range(prefix + split * BT, N, splits * BT):
        n = n0 + tl.arange(0, BT)
        y = (n - prefix) // W + dy - 1
        x = (n - prefix) % W
        there = (n < N) & (y >= 0) & (y < H)
        near = n + (dy - 1) * W
        g = load(grad, n, grad_row, c, there[:, None] & live[None, :])
        acc0 += g * load(v, near - 1, v_row, c, (there & (x > 0))[:, None] & live[None, :])
        acc1 += g * load(v, near, v_row, c, there[:, None] & live[None, :])
        acc2 += g * load(v, near + 1, v_row, c, (there & (x < W - 1))[:, None] & live[None, :])
    out = partial + ((image * splits + split) * C + c) * 9 + dy * 3
    tl.store(out, tl.sum(acc0, 0).to(partial.dtype.element_ty), mask=live)
    tl.store(out + 1, tl.sum(acc1, 0).to(partial.dtype.element_ty), mask=live)
    tl.store(out + 2, tl.sum(acc2, 0).to(partial.dtype.element_ty), mask=live)


def backward(
    grad: Tensor, qkv: Tensor, state: Tensor, stats: Tensor, taps: Tensor, scale: Tensor | None,
    position: Tensor | None, weight: Tensor | None, bias: Tensor | None, lepe_weight: Tensor | None,
    lepe_bias: Tensor | None, grid: tuple[int, int, int], M: int, feature: str, constant: float, needed: list[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of the packed projection and of the six parameters; empty ones for parameters that are None.

    Those of the convolutions, the last four, are empty too where none of them is `needed`.
    """
    qkv, grad = rows(qkv), rows(grad)
    B, N, C = grad.shape
    H, W, prefix = grid
    D, together = C // M, feature == "focused"
    dqkv = torch.empty(B, N, 3 * C, dtype=qkv.dtype, device=qkv.device)
    common = constants_of(qkv, M, feature, constant) | {"EXTRA": extra_rows(feature)}
    strides = (qkv.stride(0), qkv.stride(1), grad.stride(0), grad.stride(1), B * N)
    tile, tile_k = tiles("backward_q", D, N), tiles("backward_k", D, N)
    span, chunks, groups, per = shares(B, N, M, tile["BT"], max(8 * D, 512), together)
    chunks_k = triton.cdiv(N, tile_k["BT"])
    partial = torch.empty(B, chunks, M, D + 1, D, dtype=torch.float32, device=qkv.device)
    pulls = torch.empty((B, N) if together else 0, dtype=torch.float32, device=qkv.device)
    dscale = torch.empty((B * (chunks + chunks_k), C) if together else 0, dtype=torch.float32, device=qkv.device)
    launch(
        _backward_q, (B * chunks * groups,), qkv, grad, scale, stats, state, pulls, dqkv, partial, dscale, N, span,
        chunks, groups, per, *strides, EPS, constant, **common,
        **tile,
    )  # fmt: skip
    dstate = partial.sum(1) if chunks > 1 else partial
    _, _, groups, per = shares(B, N, M, tile_k["BT"], tile_k["BT"], together)
    launch(
        _backward_k, (B * chunks_k * groups,), qkv, grad, scale, whole(position), stats, state, dstate, taps, dqkv,
        dscale[B * chunks :], N, W, H, prefix, chunks_k, groups, per, *strides, per_image(taps), 1 / N,
        stages=1, K=side_of(weight, lepe_weight), POSITION=position is not None, **common, **tile_k,
    )  # fmt: skip
    convolutions = (weight, bias, lepe_weight, lepe_bias) if any(needed[3:]) else [None] * 4
    dposition = _none(qkv) if position is None else dqkv[:, :, C : 2 * C].sum(0, dtype=torch.float32)
    return (
        dqkv,
        _none(qkv) if scale is None else dscale.sum(0).to(scale.dtype),
        dposition if position is None else dposition.to(position.dtype),
        *_weight_gradients(grad, qkv[..., 2 * C :], *convolutions, grid, feature),
    )


def _none(like: Tensor) -> Tensor:
    return torch.empty(0, dtype=torch.float32, device=like.device)


def _weight_gradients(grad, v, weight, bias, lepe_weight, lepe_bias, grid, feature: str) -> tuple[Tensor, ...]:
    """Of weight, bias, and those of the second convolution: parts and sums over heads of one gradient per channel."""
    parameters = (weight, bias, lepe_weight, lepe_bias)
    if weight is None and lepe_weight is None:
        return tuple(_none(v) for _ in parameters)
    if feature == "inline":
        return _dynamic_gradient(grad, v, weight, grid), _none(v), _none(v), _none(v)
    larger = max((w for w in (weight, lepe_weight) if w is not None), key=lambda w: w.shape[-1])
    total, total_bias = depthwise_conv.weight_gradient(grad, v, larger, grid)
    return tuple(_none(v) if p is None else _part(total if p.dim() == 4 else total_bias, p) for p in parameters)


def _part(total: Tensor, parameter: Tensor) -> Tensor:
    """The gradient of a parameter that is shared by heads, and smaller than the convolution that it is part of."""
    if parameter.dim() == 4:
        edge = (total.shape[-1] - parameter.shape[-1]) // 2
        total = total[:, :, edge : total.shape[-1] - edge, edge : total.shape[-1] - edge]
    return total.unflatten(0, (-1, parameter.shape[0])).sum(0).to(parameter.dtype)


def _dynamic_gradient(grad: Tensor, v: Tensor, weight: Tensor, grid: tuple[int, int, int]) -> Tensor:
    B, N, C = grad.shape
    H, W, prefix = grid
    BC = min(128, power_of_2(C))
    BT = 1024 // BC
    blocks = triton.cdiv(C, BC)
    splits = max(1, min(4 * MULTIPROCESSORS // max(1, 3 * B * blocks), triton.cdiv(N, 4 * BT)))
    dtype = weight.dtype if splits == 1 else torch.float32
    partial = torch.empty(B, splits, C, 9, dtype=dtype, device=grad.device)
    launch(
        _correlate, (3 * B * splits, blocks), grad, v, partial, N, W, H, prefix, C, splits,
        grad.stride(0), grad.stride(1), v.stride(0), v.stride(1), BT=BT, BC=BC,
    )  # fmt: skip
    return (partial.sum(1).to(weight.dtype) if splits > 1 else partial).view(weight.shape)
