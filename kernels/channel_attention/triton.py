"""Triton kernels of `kernels.channel_attention`: forward and the gradient of the projection.

A program holds the D×D matrices of a few neighbouring heads as the diagonal blocks of one matrix, and drops what is
outside the blocks: 64 channels of 16 bits are one line of memory, and fill the matrix unit. With enough images and
heads a program goes over all tokens of an image, and forward and backward are one launch each. Otherwise the tokens are
cut into parts, whose sums are added in a fixed order by a launch in between.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.device.launch import MULTIPROCESSORS, launch, power_of_2, precision, rows
from kernels.device.memory import load_tile, store_tile
from kernels.device.softmax import LOG2E


@triton.jit
def _block(group, C, D: tl.constexpr, HEADS: tl.constexpr, BC: tl.constexpr):
    """Channels of a group of heads, whether they exist, and which pairs of them belong to one head."""
    local = tl.arange(0, BC)
    c = group * (HEADS * D) + local
    live = (local < HEADS * D) & (c < C)
    head = local // D
    return c, live, (head[:, None] == head[None, :]) & live[:, None] & live[None, :]


@triton.jit
def _cells(c, C, D: tl.constexpr, BC: tl.constexpr):
    """Places of the diagonal blocks in (C, D)."""
    return c[:, None] * D + (tl.arange(0, BC) % D)[None, :]


@triton.jit
def _softmax(products, pairs, scale):
    logits = tl.where(pairs, products * (scale * LOG2E), float("-inf"))
    top = tl.max(logits, 1)
    powers = tl.exp2(logits - tl.where(top == float("-inf"), 0.0, top)[:, None])
    total = tl.sum(powers, 1)
    return powers / tl.where(total == 0.0, 1.0, total)[:, None]


@triton.jit
def _sum(x, y, row, first, last, c, live, BC: tl.constexpr, BT: tl.constexpr, PRECISION: tl.constexpr):
    """xᵀ y over the tokens from `first` to `last`."""
    total = tl.zeros([BC, BC], tl.float32)
    for start in range(first, last, BT):
        token = start + tl.arange(0, BT)
        x_tile = load_tile(x, token, row, c, token < last, live)
        y_tile = load_tile(y, token, row, c, token < last, live)
        total = tl.dot(tl.trans(x_tile), y_tile, total, input_precision=PRECISION)
    return total


@triton.jit
def _times(x, out, matrix, row, out_row, first, last, c, live, BT: tl.constexpr, PRECISION: tl.constexpr):
    """x times a matrix, in the precision of that matrix, for the tokens from `first` to `last`."""
    for start in range(first, last, BT):
        token = start + tl.arange(0, BT)
        x_tile = load_tile(x, token, row, c, token < last, live).to(matrix.dtype)
        store_tile(out, token, out_row, c, token < last, live, tl.dot(x_tile, matrix, input_precision=PRECISION))


@triton.jit
def _sum_and_dq(q, grad, dq, weights, q_row, grad_row, dq_row, first, last, c, live,
                BC: tl.constexpr, BT: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Gradient of the weights, doᵀ q, over the tokens from `first` to `last`; with it dq = do A."""
    weights = weights.to(q.dtype.element_ty)
    total = tl.zeros([BC, BC], tl.float32)
    for start in range(first, last, BT):
        token = start + tl.arange(0, BT)
        grad_tile = load_tile(grad, token, grad_row, c, token < last, live)
        q_tile = load_tile(q, token, q_row, c, token < last, live)
        total = tl.dot(tl.trans(grad_tile), q_tile, total, input_precision=PRECISION)
        store_tile(dq, token, dq_row, c, token < last, live, tl.dot(grad_tile, weights, input_precision=PRECISION))
    return total


@triton.jit
def _attend(q, o, weights, q_row, o_row, first, last, c, live, BT: tl.constexpr, PRECISION: tl.constexpr):
    """o = q Aᵀ."""
    _times(q, o, tl.trans(weights.to(q.dtype.element_ty)), q_row, o_row, first, last, c, live, BT, PRECISION)


@triton.jit
def _dk_and_dv(qkv, dqkv, slope, row, out_row, C, first, last, c, live, BT: tl.constexpr, PRECISION: tl.constexpr):
    """dk = v Gᵀ and dv = k G for the gradient G of kᵀ v, which is float32 and keeps at least 11 bits."""
    if slope.shape[0] > 64:
        # one after the other: shared memory has no room for both G and Gᵀ
        _times(qkv + 2 * C, dqkv + C, tl.trans(slope), row, out_row, first, last, c, live, BT, PRECISION)
        _times(qkv + C, dqkv + 2 * C, slope, row, out_row, first, last, c, live, BT, PRECISION)
    else:
        for start in range(first, last, BT):
            token = start + tl.arange(0, BT)
            k = load_tile(qkv + C, token, row, c, token < last, live).to(tl.float32)
            v = load_tile(qkv + 2 * C, token, row, c, token < last, live).to(tl.float32)
            dk = tl.dot(v, tl.trans(slope), input_precision=PRECISION)
            store_tile(dqkv + C, token, out_row, c, token < last, live, dk)
            dv = tl.dot(k, slope, input_precision=PRECISION)
            store_tile(dqkv + 2 * C, token, out_row, c, token < last, live, dv)


@triton.jit
def _forward_whole(
    qkv, o, state, scale, N, C, batch, row,
    D: tl.constexpr, HEADS: tl.constexpr, BC: tl.constexpr, BT: tl.constexpr, PRECISION: tl.constexpr,
    KEEP: tl.constexpr,
):  # fmt: skip
    groups = tl.cdiv(C, HEADS * D)
    image = (tl.program_id(0) // groups).to(tl.int64)
    c, live, pairs = _block(tl.program_id(0) % groups, C, D, HEADS, BC)
    qkv += image * batch
    weights = _softmax(_sum(qkv + C, qkv + 2 * C, row, 0, N, c, live, BC, BT, PRECISION), pairs, scale)
    if KEEP:
        tl.store(state + image * C * D + _cells(c, C, D, BC), weights, mask=pairs)
    _attend(qkv, o + image * N * C, weights, row, C, 0, N, c, live, BT, PRECISION)


@triton.jit
def _backward_whole(
    qkv, grad, state, dqkv, scale, N, C, batch, row, grad_batch, grad_row,
    D: tl.constexpr, HEADS: tl.constexpr, BC: tl.constexpr, BT: tl.constexpr, PRECISION: tl.constexpr,
    WIDE: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    groups = tl.cdiv(C, HEADS * D)
    image = (tl.program_id(0) // groups).to(tl.int64)
    c, live, pairs = _block(tl.program_id(0) % groups, C, D, HEADS, BC)
    qkv += image * batch
    dqkv += image * N * 3 * C
    if KEPT:
        weights = tl.load(state + image * C * D + _cells(c, C, D, BC), mask=pairs, other=0.0)
    else:
        weights = _softmax(_sum(qkv + C, qkv + 2 * C, row, 0, N, c, live, BC, BT, PRECISION), pairs, scale)
    slope = _sum_and_dq(
        qkv, grad + image * grad_batch, dqkv, weights, row, grad_row, 3 * C, 0, N, c, live, BC, BT, PRECISION
    )
    slope = weights * (slope - tl.sum(slope * weights, 1)[:, None]) * scale
    _dk_and_dv(qkv, dqkv, slope, row, 3 * C, C, 0, N, c, live, BT, WIDE)


@triton.jit
def _part(C, N, parts, part_tokens, D: tl.constexpr, HEADS: tl.constexpr):
    """Image, group of heads, part, and its first and last token."""
    groups = tl.cdiv(C, HEADS * D)
    part = tl.program_id(0) % parts
    image = (tl.program_id(0) // (parts * groups)).to(tl.int64)
    first = part * part_tokens
    return image, (tl.program_id(0) // parts) % groups, part, first, tl.minimum(first + part_tokens, N)


@triton.jit(do_not_specialize=["parts"])
def _part_sums(
    qkv, grad, state, dqkv, partial, N, C, batch, row, grad_batch, grad_row, parts, part_tokens,
    D: tl.constexpr, HEADS: tl.constexpr, BC: tl.constexpr, BT: tl.constexpr, PRECISION: tl.constexpr,
    BACKWARD: tl.constexpr,
):  # fmt: skip
    """Sums of one part, kᵀ v or, backward, doᵀ q and with it dq, into (B, C, parts, D)."""
    image, group, part, first, last = _part(C, N, parts, part_tokens, D, HEADS)
    c, live, pairs = _block(group, C, D, HEADS, BC)
    qkv += image * batch
    if BACKWARD:
        weights = tl.load(state + image * C * D + _cells(c, C, D, BC), mask=pairs, other=0.0)
        total = _sum_and_dq(
            qkv, grad + image * grad_batch, dqkv + image * N * 3 * C, weights, row, grad_row, 3 * C, first, last, c,
            live, BC, BT, PRECISION,
        )  # fmt: skip
    else:
        total = _sum(qkv + C, qkv + 2 * C, row, first, last, c, live, BC, BT, PRECISION)
    partial += image * C * parts * D
    tl.store(partial + (c * parts + part)[:, None] * D + (tl.arange(0, BC) % D)[None, :], total, mask=pairs)


@triton.jit(do_not_specialize=["parts"])
def _finish_sums(
    partial, state, out, scale, parts,
    D: tl.constexpr, BD: tl.constexpr, BP: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """One channel: adds the parts, and applies the softmax or, backward, its derivative."""
    line = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BD)
    total = tl.zeros([BP, BD], tl.float32)
    for start in range(0, parts, BP):
        part = start + tl.arange(0, BP)
        mask = (part < parts)[:, None] & (d < D)[None, :]
        total += tl.load(partial + line * parts * D + part[:, None] * D + d[None, :], mask=mask, other=0.0)
    value = tl.sum(total, 0)
    if BACKWARD:
        weights = tl.load(state + line * D + d, mask=d < D, other=0.0)
        value = weights * (value - tl.sum(value * weights, 0)) * scale
    else:
        logits = tl.where(d < D, value * (scale * LOG2E), float("-inf"))
        powers = tl.exp2(logits - tl.max(logits, 0))
        value = powers / tl.sum(powers, 0)
    tl.store(out + line * D + d, value, mask=d < D)


@triton.jit(do_not_specialize=["parts"])
def _part_outputs(
    qkv, state, out, N, C, batch, row, parts, part_tokens,
    D: tl.constexpr, HEADS: tl.constexpr, BC: tl.constexpr, BT: tl.constexpr, PRECISION: tl.constexpr,
    BACKWARD: tl.constexpr,
):  # fmt: skip
    """o of one part from the weights or, backward, dk and dv from the gradient of kᵀ v."""
    image, group, _, first, last = _part(C, N, parts, part_tokens, D, HEADS)
    c, live, pairs = _block(group, C, D, HEADS, BC)
    qkv += image * batch
    matrix = tl.load(state + image * C * D + _cells(c, C, D, BC), mask=pairs, other=0.0)
    if BACKWARD:
        _dk_and_dv(qkv, out + image * N * 3 * C, matrix, row, 3 * C, C, first, last, c, live, BT, PRECISION)
    else:
        _attend(qkv, out + image * N * C, matrix, row, C, first, last, c, live, BT, PRECISION)


def tiles(tokens: int, num_heads: int, head_dim: int, itemsize: int) -> dict:
    """Heads and tokens of a program: 128 bytes of channels, or one wider head, and up to 64 tokens at a time.

    Exact products of float32 run outside the matrix unit and take their operands from registers, and the matrices of
    wide heads leave less room for tokens.
    """
    heads = max(1, min(num_heads, 128 // itemsize // head_dim))
    channels = power_of_2(heads * head_dim)
    most = 128 // itemsize if channels * itemsize <= 128 else 64 // itemsize
    return {"D": head_dim, "HEADS": heads, "BC": channels, "BT": min(most, power_of_2(tokens))}


def parts(batch: int, tokens: int, num_heads: int, heads: int) -> tuple[int, int]:
    """How many parts an image is cut into, and the tokens of a part.

    Two programs for each multiprocessor are enough to keep the memory busy, and below 256 tokens there is
    nothing to divide. With fewer programs there are parts of at least 128 tokens, four programs per multiprocessor.
    """
    programs = batch * triton.cdiv(num_heads, heads)
    if tokens <= 256 or programs >= 256:
        return 1, tokens
    count = min(triton.cdiv(4 * MULTIPROCESSORS, max(programs, 1)), tokens // 128)
    size = triton.cdiv(triton.cdiv(tokens, count), 64) * 64
    return triton.cdiv(tokens, size), size


def _options(qkv: Tensor, channels: int) -> dict:
    small = channels * qkv.element_size() <= 128
    return {"warps": 4 if small else 8, "stages": 3 if small and qkv.element_size() == 2 else 2}


def forward(qkv: Tensor, o: Tensor, state: Tensor, num_heads: int, scale: float) -> None:
    """Writes o and, where `state` has room for them, the weights (B, C, D)."""
    qkv = rows(qkv)
    (B, N, C), (batch, row, _) = o.shape, qkv.stride()
    shape = tiles(N, num_heads, C // num_heads, qkv.element_size())
    options = {**shape, **_options(qkv, shape["BC"]), "PRECISION": precision(qkv.dtype)}
    count, size = parts(B, N, num_heads, shape["HEADS"])
    groups = B * triton.cdiv(num_heads, shape["HEADS"])
    if count == 1:
        keep = state.shape[2] > 0
        launch(_forward_whole, (groups,), qkv, o, state, scale, N, C, batch, row, **options, KEEP=keep)
        return
    partial = torch.empty(B, C, count, shape["D"], dtype=torch.float32, device=qkv.device)
    launch(
        _part_sums, (groups * count,), qkv, None, None, None, partial, N, C, batch, row, 0, 0, count, size,
        **options, BACKWARD=False,
    )  # fmt: skip
    _finish(partial, None, state, scale, backward=False)
    launch(_part_outputs, (groups * count,), qkv, state, o, N, C, batch, row, count, size, **options, BACKWARD=False)


def backward(grad: Tensor, qkv: Tensor, state: Tensor, num_heads: int, scale: float) -> Tensor:
    """The gradient of the projection, packed."""
    qkv, grad = rows(qkv), rows(grad)
    (B, N, C), (batch, row, _), (grad_batch, grad_row, _) = grad.shape, qkv.stride(), grad.stride()
    shape = tiles(N, num_heads, C // num_heads, qkv.element_size())
    options = {**shape, **_options(qkv, shape["BC"])}
    narrow, wide = precision(qkv.dtype), "ieee" if precision(qkv.dtype) == "ieee" else "tf32"
    count, size = parts(B, N, num_heads, shape["HEADS"])
    groups = B * triton.cdiv(num_heads, shape["HEADS"])
    dqkv = torch.empty(B, N, 3 * C, dtype=qkv.dtype, device=qkv.device)
    if count == 1:
        launch(
            _backward_whole, (groups,), qkv, grad, state, dqkv, scale, N, C, batch, row, grad_batch, grad_row,
            **options, PRECISION=narrow, WIDE=wide, KEPT=state.shape[2] > 0,
        )  # fmt: skip
        return dqkv
    partial = torch.empty(B, C, count, shape["D"], dtype=torch.float32, device=qkv.device)
    launch(
        _part_sums, (groups * count,), qkv, grad, state, dqkv, partial, N, C, batch, row, grad_batch, grad_row, count,
        size, **options, PRECISION=narrow, BACKWARD=True,
    )  # fmt: skip
    slope = torch.empty_like(state)
    _finish(partial, state, slope, scale, backward=True)
    launch(
        _part_outputs, (groups * count,), qkv, slope, dqkv, N, C, batch, row, count, size,
        **options, PRECISION=wide, BACKWARD=True,
    )  # fmt: skip
    return dqkv


def _finish(partial: Tensor, state: Tensor | None, out: Tensor, scale: float, *, backward: bool) -> None:
    B, C, count, D = partial.shape
    width = power_of_2(D)
    launch(
        _finish_sums, (B * C,), partial, state, out, scale, count,
        warps=max(1, width // 32), D=D, BD=width, BP=min(32, power_of_2(count, least=1)), BACKWARD=backward,
    )  # fmt: skip
