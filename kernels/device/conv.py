"""Depth-wise convolution of a token map: rows of it, columns by channels, pass through the registers of a program."""

import triton
import triton.language as tl


@triton.jit
def widened(x):
    """In float32. A bfloat16 is the upper half of one; said in these words, two neighbours take an instruction each."""
    if x.dtype == tl.bfloat16:
        x = (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        x = x.to(tl.float32)
    return x


@triton.jit
def repeated(x, N: tl.constexpr):
    """A tuple of N times x."""
    many = ()
    for _ in tl.static_range(N):
        many += (x,)
    return many


@triton.jit
def per_channel(table, c, C, BX: tl.constexpr):
    """Numbers of channels c for each of BX columns, loaded where they are needed: moving them takes shared memory."""
    c = c[None, :] + tl.zeros([BX, 1], tl.int32)
    return tl.load(table + c, mask=c < C, other=0.0).to(tl.float32)


@triton.jit
def taps_of(weight, c, C, K: tl.constexpr, BX: tl.constexpr, FLIP: tl.constexpr):
    """The K·K weights (K·K, C) of channels c, turned by 180 degrees with FLIP."""
    taps = ()
    for t in tl.static_range(K * K):
        taps += (per_channel(weight + (K * K - 1 - t if FLIP else t) * C, c, C, BX),)
    return taps


@triton.jit
def columns_seen(col, live, W, K: tl.constexpr):
    """For every shift by -K // 2 to K // 2, which of the columns are in the map."""
    inside = ()
    for j in tl.static_range(K):
        seen = col + (j - K // 2)
        inside += (((seen >= 0) & (seen < W))[:, None] & live,)
    return inside


@triton.jit
def load_shifted(x, row, W, at, seen, there, K: tl.constexpr, ROW: tl.constexpr, EDGE: tl.constexpr):
    """A row of the map K times, shifted by one column each; zeros beyond the map, with EDGE all if it is not there."""
    shifted = ()
    line = x + row * W * ROW
    for j in tl.static_range(K):
        mask = seen[j] & there if EDGE else seen[j]
        shifted += (tl.load(line + at + j * ROW, mask=mask, other=0.0),)
    return shifted


@triton.jit
def within(row, top, count):
    """Whether it is one of `count` rows from `top` on: one comparison."""
    return (row - top).to(tl.uint32) < count


@triton.jit
def tile_of_map(H, W, C, BX: tl.constexpr, BC: tl.constexpr):
    """Image, first of four rows, columns and channels of this program."""
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
    K: tl.constexpr, BX: tl.constexpr, BC: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """The convolution of one image in the rows y to y + 3, each (BX, BC) in float32: for what needs them at once."""
    start = tl.zeros([BX, BC], tl.float32)
    if BIAS:
        start += per_channel(bias, c, C, BX)
    acc0, acc1, acc2, acc3 = start, start, start, start
    for dx in range(K):
        shifted = col + (dx - K // 2)
        columns = ((shifted >= 0) & (shifted < W))[:, None] & live[None, :]
        read, taps = (), ()
        for i in tl.static_range(4 + K - 1):
            row = y + (i - K // 2)
            mask = columns & (row >= 0) & (row < H)
            read += (tl.load(x + row * W * x_row + shifted[:, None] * x_row + c[None, :], mask=mask, other=0.0),)
        for i in tl.static_range(K):
            taps += (per_channel(weight + (i * K + dx) * C, c, C, BX),)
        for i in tl.static_range(K):
            acc0 += widened(read[i]) * taps[i]
            acc1 += widened(read[i + 1]) * taps[i]
            acc2 += widened(read[i + 2]) * taps[i]
            acc3 += widened(read[i + 3]) * taps[i]
    return acc0, acc1, acc2, acc3


@triton.jit
def convolve(
    x, row, taps, n, there, c, channels, W, H, prefix, C,
    K: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, FLIP: tl.constexpr,
):  # fmt: skip
    """The convolution of tokens n of one image, or with FLIP the transposed one: (BT, BC), zero for prefix tokens.

    x and taps (K·K, C) begin at channel c = 0 of `channels` ones. The sum is one of its own: that of a matrix product
    is spread over the threads in a way to which every tap would have to be brought.
    """
    acc = tl.zeros([BT, BC], tl.float32)
    y = (n - prefix) // W - K // 2
    col = (n - prefix) % W - K // 2
    there = there & (n >= prefix)
    live = c < channels
    for dy in range(0, K):  # a loop of the machine: unrolled, its loads would take all registers
        line = there & (y + dy >= 0) & (y + dy < H)
        for dx in tl.static_range(K):
            seen = line & (col + dx >= 0) & (col + dx < W)
            place = (n + (dy - K // 2) * W + (dx - K // 2))[:, None] * row + c[None, :]
            value = tl.load(x + place, mask=seen[:, None] & live[None, :], other=0.0)
            tap = dy * K + dx
            if FLIP:
                tap = K * K - 1 - tap
            acc += widened(value) * per_channel(taps + tap * C, c, channels, BT)
    return acc
