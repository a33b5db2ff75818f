"""Depth-wise convolution of a token map, four rows at a time: each row that is read is added to all that see it."""

import triton
import triton.language as tl


@triton.jit
def tile_of_map(H, W, C, BX: tl.constexpr, BC: tl.constexpr):
    """Image, first row, columns and channels of this program."""
    across = tl.cdiv(W, BX)
    down = tl.cdiv(H, 4)
    tile = tl.program_id(0)
    image = (tile // (across * down)).to(tl.int64)
    y = (tile // across) % down * 4
    x = tile % across * BX + tl.arange(0, BX)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    return image, y, x, c


@triton.jit
def four_rows(
    x, weight, bias, y, col, c, live, H, W, C, x_row,
    K: tl.constexpr, BX: tl.constexpr, BC: tl.constexpr, BIAS: tl.constexpr, FLIP: tl.constexpr,
):  # fmt: skip
    """The convolution of one image in the rows y to y + 3, each (BX, BC) in float32."""
    acc0 = tl.zeros([BX, BC], tl.float32)
    if BIAS:
        acc0 += tl.load(bias + c, mask=live, other=0.0).to(tl.float32)[None, :]
    acc1 = acc0
    acc2 = acc0
    acc3 = acc0
    for dx in range(K):
        seen = col + (dx - K // 2)
        columns = ((seen >= 0) & (seen < W))[:, None] & live[None, :]
        for i in tl.static_range(4 + K - 1):
            row = y + (i - K // 2)
            inside = columns & (row >= 0) & (row < H)
            value = tl.load(x + (row * W + seen[:, None]) * x_row + c[None, :], mask=inside, other=0.0).to(tl.float32)
            for r in tl.static_range(4):
                if (i >= r) & (i < r + K):
                    tap = (K * K - 1 - ((i - r) * K + dx)) if FLIP else ((i - r) * K + dx)
                    w = tl.load(weight + tap * C + c, mask=live, other=0.0).to(tl.float32)[None, :]
                    if r == 0:
                        acc0 += value * w
                    elif r == 1:
                        acc1 += value * w
                    elif r == 2:
                        acc2 += value * w
                    else:
                        acc3 += value * w
    return acc0, acc1, acc2, acc3
