"""Triton kernels of `kernels.moh_attention.route_heads`: the gates of heads, their load balance loss, and gradients."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.device.launch import launch, power_of_2, rows

PROGRAMS = 512  # at most, so that their sums are few


@triton.jit
def _softmax(base, row, stride, keep, WIDTH: tl.constexpr, PAD: tl.constexpr):
    """Of WIDTH logits in every row, 0 in the columns after them."""
    c = tl.arange(0, PAD)
    x = tl.load(base + row[:, None] * stride + c[None, :], mask=keep[:, None] & (c < WIDTH)[None, :], other=0.0)
    x = tl.where((c < WIDTH)[None, :], x, float("-inf"))
    e = tl.exp(x - tl.max(x, 1)[:, None])
    return e / tl.sum(e, 1)[:, None]


@triton.jit
def _largest(scores, E: tl.constexpr, K: tl.constexpr, PAD: tl.constexpr):
    """1 at the K largest scores of a row; among equal ones, at the lowest index."""
    c = tl.arange(0, PAD)[None, :]
    ahead = tl.zeros(scores.shape, tl.int32)
    for j in range(E):
        other = tl.sum(tl.where(c == j, scores, 0.0), 1)[:, None]
        ahead += ((other > scores) | ((other == scores) & (j < c))).to(tl.int32)
    return tl.where((ahead < K) & (c < E), 1.0, 0.0)


@triton.jit
def _alphas(base, row, stride, keep):
    """2 softmax of two logits."""
    x = tl.load(base + row * stride, mask=keep, other=0.0) - tl.load(base + row * stride + 1, mask=keep, other=0.0)
    return (2 * tl.sigmoid(x))[:, None], (2 * tl.sigmoid(-x))[:, None]


@triton.jit(do_not_specialize=["T"])
def _route(
    logits, gates, partial, T, stride,
    S: tl.constexpr, E: tl.constexpr, K: tl.constexpr, PS: tl.constexpr, PE: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Gates of a share of the tokens, and of that share the sums of scores and choices."""
    s_c = tl.arange(0, PS)[None, :]
    e_c = tl.arange(0, PE)[None, :]
    score_sum = tl.zeros([BT, PE], tl.float32)
    choice_sum = tl.zeros([BT, PE], tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(T, BT), tl.num_programs(0)):
        row = (tile * BT + tl.arange(0, BT)).to(tl.int64)
        keep = row < T
        out = gates + row[:, None] * (S + E)
        if S > 0:
            shared = tl.full([BT, PS], 1.0, tl.float32)
            if S > 1:
                shared = S * _softmax(logits + E + (2 if K else 0), row, stride, keep, S, PS)
        if K > 0:
            r = _softmax(logits, row, stride, keep, E, PE)
            mask = _largest(r, E, K, PE)
            chosen = r * mask
            routed = K * chosen / tl.sum(chosen, 1)[:, None]
            score_sum += tl.where(keep[:, None], r, 0.0)
            choice_sum += tl.where(keep[:, None], mask, 0.0)
            if S > 0:
                a1, a2 = _alphas(logits + E, row, stride, keep)
                shared = a1 * shared
                routed = a2 * routed
            tl.store(out + S + e_c, routed, mask=keep[:, None] & (e_c < E))
        if S > 0:
            tl.store(out + s_c, shared, mask=keep[:, None] & (s_c < S))
    if K > 0:
        partial += tl.program_id(0) * (2 * PE) + tl.arange(0, PE)
        tl.store(partial, tl.sum(score_sum, 0))
        tl.store(partial + PE, tl.sum(choice_sum, 0))


@triton.jit(do_not_specialize=["programs", "T"])
def _balance(partial, balance, load, programs, T, E: tl.constexpr, PE: tl.constexpr, BP: tl.constexpr):
    """E Σ P f, and f."""
    c = tl.arange(0, PE)
    scores = tl.zeros([BP, PE], tl.float32)
    choices = tl.zeros([BP, PE], tl.float32)
    for start in range(0, programs, BP):
        row = start + tl.arange(0, BP)
        place = partial + row[:, None] * (2 * PE) + c[None, :]
        scores += tl.load(place, mask=row[:, None] < programs, other=0.0)
        choices += tl.load(place + PE, mask=row[:, None] < programs, other=0.0)
    mean = tl.sum(choices, 0) / T
    tl.store(balance, E * tl.sum(tl.sum(scores, 0) / T * mean, 0))
    tl.store(load + c, mean, mask=c < E)


@triton.jit(do_not_specialize=["T"])
def _route_backward(
    grad, balance, logits, load, dlogits, T, stride,
    S: tl.constexpr, E: tl.constexpr, K: tl.constexpr, PS: tl.constexpr, PE: tl.constexpr, BT: tl.constexpr,
    BALANCE: tl.constexpr,
):  # fmt: skip
    s_c = tl.arange(0, PS)[None, :]
    e_c = tl.arange(0, PE)[None, :]
    row = (tl.program_id(0) * BT + tl.arange(0, BT)).to(tl.int64)
    keep = row < T
    own = grad + row[:, None] * (S + E)
    BOTH: tl.constexpr = 2 if K * S > 0 else 0
    out = dlogits + row[:, None] * (E + BOTH + (S if S > 1 else 0))
    if S > 0:
        ds = tl.load(own + s_c, mask=keep[:, None] & (s_c < S), other=0.0)
        shared = tl.full([BT, PS], 1.0, tl.float32)
        if S > 1:
            shared = S * _softmax(logits + E + BOTH, row, stride, keep, S, PS)
        along = tl.sum(ds * shared, 1)[:, None]
    if K > 0:
        dg = tl.load(own + S + e_c, mask=keep[:, None] & (e_c < E), other=0.0)
        r = _softmax(logits, row, stride, keep, E, PE)
        mask = _largest(r, E, K, PE)
        chosen = r * mask
        total = tl.sum(chosen, 1)[:, None]
        routed = K * chosen / total
        across = tl.sum(dg * routed, 1)[:, None]
        if S > 0:
            a1, a2 = _alphas(logits + E, row, stride, keep)
            slope = 0.5 * a1 * a2 * (along - across)
            tl.store(out + E + tl.arange(0, 2)[None, :], tl.where(tl.arange(0, 2)[None, :] == 0, slope, -slope),
                     mask=keep[:, None])  # fmt: skip
            ds = a1 * ds
            along = a1 * along
            dg = a2 * dg
            across = a2 * across
        # r = softmax, so d(wg) = r (dr - Σ r dr); of the gates' part Σ r dr is 0
        dwg = mask * (routed * dg - chosen / total * across)
        if BALANCE:
            share = tl.load(balance) * E / T * tl.load(load + e_c, mask=e_c < E, other=0.0)
            dwg += r * (share - tl.sum(r * share, 1)[:, None])
        tl.store(out + e_c, dwg, mask=keep[:, None] & (e_c < E))
    if S > 1:
        tl.store(out + E + BOTH + s_c, shared * ds - shared / S * along, mask=keep[:, None] & (s_c < S))


def route(logits: Tensor, shared: int, routed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Gates, load balance loss (0 without routed heads), and f (E)."""
    B, N, L = logits.shape
    T, constants = B * N, _router(L, shared, routed)
    E, PE, BT = constants["E"], constants["PE"], constants["BT"]
    flat = rows(logits).reshape(T, L)
    gates = torch.empty(B, N, shared + E, dtype=torch.float32, device=logits.device)
    programs = min(triton.cdiv(T, BT), PROGRAMS)
    partial = torch.empty(programs, 2, PE, dtype=torch.float32, device=logits.device)
    launch(_route, (programs,), flat, gates, partial, T, flat.stride(0), **constants)
    if not routed:
        return gates, torch.zeros((), device=logits.device), torch.empty(0, device=logits.device)
    balance = torch.empty((), dtype=torch.float32, device=logits.device)
    load = torch.empty(E, dtype=torch.float32, device=logits.device)
    launch(_balance, (1,), partial, balance, load, programs, T, E=E, PE=PE, BP=BT)
    return gates, balance, load


def route_backward(
    grad: Tensor, balance: Tensor | None, logits: Tensor, load: Tensor, shared: int, routed: int
) -> Tensor:
    """Gradient of the logits from those of the gates and of the loss, None for one that was not used."""
    B, N, L = logits.shape
    constants = _router(L, shared, routed)
    flat = rows(logits).reshape(B * N, L)
    dlogits = torch.empty(B, N, L, dtype=torch.float32, device=logits.device)
    launch(
        _route_backward, (triton.cdiv(B * N, constants["BT"]),), grad.contiguous(), balance, flat, load, dlogits, B * N,
        flat.stride(0), BALANCE=balance is not None, **constants,
    )  # fmt: skip
    return dlogits


def _router(logits: int, shared: int, routed: int) -> dict:
    E = logits - (shared if shared > 1 else 0) - (2 if shared else 0) if routed else 0
    PS, PE = power_of_2(shared, least=2), power_of_2(E, least=2)
    return {"S": shared, "E": E, "K": routed, "PS": PS, "PE": PE, "BT": max(16, min(128, 1024 // max(PS, PE)))}
