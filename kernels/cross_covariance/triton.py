"""Triton kernels of `kernels.cross_covariance`: forward and the gradients of the projection and the temperatures.

As in channel attention, whose tiles these are, a program holds the D×D matrices of a few neighbouring heads as the
diagonal blocks of one matrix. It goes over all tokens of an image: first for qᵀ k and the squares of the channels, then
for the output; backward likewise, from the cosines and lengths that forward keeps. With C the cosines, S = A ∘ (doᵀ v -
rows) the gradient of the logits, and G = τ S / (‖q‖ ‖k‖),
    dv = do A,  dq = k Gᵀ - q τ Σ_j (S ∘ C) / ‖q‖²,  dk = q G - k τ Σ_i (S ∘ C) / ‖k‖²,  dτ = Σ_ij S ∘ C.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.channel_attention.triton import _attend, _block, _cells, _options, _softmax, _sum_and_dq, tiles
from kernels.cross_covariance.register import EPSILON
from kernels.device.launch import launch, precision, rows
from kernels.device.memory import load_tile, store_tile


@triton.jit
def _sums(q, k, row, N, c, live, BC: tl.constexpr, BT: tl.constexpr, PRECISION: tl.constexpr):
    """qᵀ k and the squares of both, over all tokens."""
    total = tl.zeros([BC, BC], tl.float32)
    of_q, of_k = tl.zeros([BC], tl.float32), tl.zeros([BC], tl.float32)
    for start in range(0, N, BT):
        token = start + tl.arange(0, BT)
        q_tile = load_tile(q, token, row, c, token < N, live)
        k_tile = load_tile(k, token, row, c, token < N, live)
        total = tl.dot(tl.trans(q_tile), k_tile, total, input_precision=PRECISION)
        q_wide, k_wide = q_tile.to(tl.float32), k_tile.to(tl.float32)
        of_q += tl.sum(q_wide * q_wide, 0)
        of_k += tl.sum(k_wide * k_wide, 0)
    return total, of_q, of_k


@triton.jit
def _less(x, matrix, y, factor, out, row, out_row, N, c, live, BT: tl.constexpr, PRECISION: tl.constexpr):
    """x times a matrix, less y times a number for each channel."""
    for start in range(0, N, BT):
        token = start + tl.arange(0, BT)
        x_tile = load_tile(x, token, row, c, token < N, live).to(tl.float32)
        y_tile = load_tile(y, token, row, c, token < N, live).to(tl.float32)
        value = tl.dot(x_tile, matrix, input_precision=PRECISION) - y_tile * factor[None, :]
        store_tile(out, token, out_row, c, token < N, live, value)


@triton.jit
def _forward(
    qkv, temperature, o, cosines, lengths, N, C, batch, row, EPS: tl.constexpr,
    D: tl.constexpr, HEADS: tl.constexpr, BC: tl.constexpr, BT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    groups = tl.cdiv(C, HEADS * D)
    image = (tl.program_id(0) // groups).to(tl.int64)
    c, live, pairs = _block(tl.program_id(0) % groups, C, D, HEADS, BC)
    qkv += image * batch
    total, of_q, of_k = _sums(qkv, qkv + C, row, N, c, live, BC, BT, PRECISION)
    of_q, of_k = tl.maximum(tl.sqrt(of_q), EPS), tl.maximum(tl.sqrt(of_k), EPS)
    cosine = total / of_q[:, None] / of_k[None, :]
    tl.store(cosines + image * C * D + _cells(c, C, D, BC), cosine, mask=pairs)
    tl.store(lengths + image * 2 * C + c, of_q, mask=live)
    tl.store(lengths + image * 2 * C + C + c, of_k, mask=live)
    heat = tl.load(temperature + c // D, mask=live, other=0.0).to(tl.float32)
    weights = _softmax(cosine * heat[:, None], pairs, 1.0)
    _attend(qkv + 2 * C, o + image * N * C, weights, row, C, 0, N, c, live, BT, PRECISION)


@triton.jit
def _backward(
    qkv, temperature, grad, cosines, lengths, dqkv, dheat, N, C, batch, row, grad_batch, grad_row, EPS: tl.constexpr,
    D: tl.constexpr, HEADS: tl.constexpr, BC: tl.constexpr, BT: tl.constexpr, PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    groups = tl.cdiv(C, HEADS * D)
    image = (tl.program_id(0) // groups).to(tl.int64)
    c, live, pairs = _block(tl.program_id(0) % groups, C, D, HEADS, BC)
    qkv += image * batch
    dqkv += image * N * 3 * C
    cosine = tl.load(cosines + image * C * D + _cells(c, C, D, BC), mask=pairs, other=0.0)
    of_q = tl.load(lengths + image * 2 * C + c, mask=live, other=1.0)
    of_k = tl.load(lengths + image * 2 * C + C + c, mask=live, other=1.0)
    heat = tl.load(temperature + c // D, mask=live, other=0.0).to(tl.float32)
    weights = _softmax(cosine * heat[:, None], pairs, 1.0)
    slope = _sum_and_dq(
        qkv + 2 * C, grad + image * grad_batch, dqkv + 2 * C, weights, row, grad_row, 3 * C, 0, N, c, live, BC, BT,
        PRECISION,
    )  # fmt: skip
    slope = weights * (slope - tl.sum(slope * weights, 1)[:, None])
    turned = slope * cosine
    tl.store(dheat + image * C + c, tl.sum(turned, 1), mask=live)
    turned *= heat[:, None]
    # a channel that counts as longer than it is has no direction to grow in
    less_q = tl.where(of_q > EPS, tl.sum(turned, 1) / (of_q * of_q), 0.0)
    less_k = tl.where(of_k > EPS, tl.sum(turned, 0) / (of_k * of_k), 0.0)
    slope *= heat[:, None] / of_q[:, None] / of_k[None, :]
    _less(qkv + C, tl.trans(slope), qkv, less_q, dqkv, row, 3 * C, N, c, live, BT, WIDE)
    _less(qkv, slope, qkv + C, less_k, dqkv + C, row, 3 * C, N, c, live, BT, WIDE)


def forward(qkv: Tensor, temperature: Tensor, o: Tensor, cosines: Tensor, lengths: Tensor, num_heads: int) -> None:
    """Writes o, and the cosines (B, C, D) and lengths (B, 2, C)."""
    qkv = rows(qkv)
    (B, N, C), (batch, row, _) = o.shape, qkv.stride()
    shape = tiles(N, num_heads, C // num_heads, qkv.element_size())
    programs = B * triton.cdiv(num_heads, shape["HEADS"])
    launch(
        _forward, (programs,), qkv, temperature.contiguous(), o, cosines, lengths, N, C, batch, row,
        **shape, **_options(qkv, shape["BC"]), EPS=EPSILON, PRECISION=precision(qkv.dtype),
    )  # fmt: skip


def backward(
    grad: Tensor, qkv: Tensor, temperature: Tensor, cosines: Tensor, lengths: Tensor, num_heads: int
) -> tuple[Tensor, Tensor]:
    """The gradients of the projection, packed, and of the temperatures."""
    qkv, grad = rows(qkv), rows(grad)
    (B, N, C), (batch, row, _), (grad_batch, grad_row, _) = grad.shape, qkv.stride(), grad.stride()
    shape = tiles(N, num_heads, C // num_heads, qkv.element_size())
    programs = B * triton.cdiv(num_heads, shape["HEADS"])
    dqkv = torch.empty(B, N, 3 * C, dtype=qkv.dtype, device=qkv.device)
    dheat = torch.empty(B, C, dtype=torch.float32, device=qkv.device)
    narrow = precision(qkv.dtype)
    launch(
        _backward, (programs,), qkv, temperature.contiguous(), grad, cosines, lengths, dqkv, dheat, N, C, batch, row,
        grad_batch, grad_row, **shape, **_options(qkv, shape["BC"]), EPS=EPSILON, PRECISION=narrow,
        WIDE="ieee" if narrow == "ieee" else "tf32",
    )  # fmt: skip
    return dqkv, dheat.view(B, num_heads, C // num_heads).sum((0, 2)).to(temperature.dtype)
