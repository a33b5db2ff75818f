"""Patches of a token map, and the products of their tokens with those around them.

A patch is 4×4 tokens, which are the 16 rows of a matrix product; its halo, the patch and all tokens within reach of a
window around it, is the other side. Of a row's products with the halo only those with the neighbours of its token are
wanted. Tokens of a halo whose coordinates have the same remainders by the window's side make a class: a window has one
token of each. So the product with a matrix of zeros and ones gathers a row's neighbours into T columns, one per class,
and another spreads T columns over a halo: on the tensor cores, and exactly.
"""

import triton
import triton.language as tl

from kernels.device.conv import within

SIDE = tl.constexpr(4)  # of a patch
CELLS = tl.constexpr(16)  # tokens of a patch: the fewest rows of a product


@triton.jit
def corners_of_patches(block, W, GY: tl.constexpr, GX: tl.constexpr):
    """First row and column of the GY × GX patches of a block, which may be beyond the map."""
    across = tl.cdiv(W, SIDE * GX)
    g = tl.arange(0, GY * GX)
    return (block // across * GY + g // GX) * SIDE, (block % across * GX + g % GX) * SIDE


@triton.jit
def blocks_of_patches(H, W, GY: tl.constexpr, GX: tl.constexpr):
    """Blocks that cover a map."""
    return tl.cdiv(H, SIDE * GY) * tl.cdiv(W, SIDE * GX)


@triton.jit
def tokens_of_patches(top, left, H, W):
    """Row and column of the G · 16 tokens, and whether they are in the map."""
    G: tl.constexpr = top.shape[0]
    t = tl.arange(0, CELLS)
    y = tl.reshape(top[:, None] + (t // SIDE)[None, :], (G * CELLS,))
    x = tl.reshape(left[:, None] + (t % SIDE)[None, :], (G * CELLS,))
    return y, x, (y < H) & (x < W)


@triton.jit
def tokens_of_halos(top, left, H, W, WINDOW: tl.constexpr, HALO: tl.constexpr, BH: tl.constexpr):
    """The tokens of a patch and all around it, HALO to a row of BH, and whether they are in the map: (G, BH)."""
    R: tl.constexpr = WINDOW // 2
    n = tl.arange(0, BH)
    y = top[:, None] + (n // HALO - R)[None, :]
    x = left[:, None] + (n % HALO - R)[None, :]
    kept = (n // HALO < SIDE + 2 * R) & (n % HALO < SIDE + 2 * R)
    return y * W + x, kept[None, :] & within(y, 0, H) & within(x, 0, W)


@triton.jit
def load_halos(base, token, row, keep, D: tl.constexpr, BD: tl.constexpr):
    """The D channels of a head, of the tokens (G, BH): (G, BH, BD)."""
    d = tl.arange(0, BD)
    at = base + token[:, :, None] * row + d[None, None, :]
    return tl.load(at, mask=keep[:, :, None] & (d < D)[None, None, :], other=0.0)


@triton.jit
def halves(x, dtype: tl.constexpr):
    """x in float32 as a sum of two tensors of `dtype`, for products with what is in memory; x and 0 for float32."""
    high = x.to(dtype)
    return high, (x - high.to(tl.float32)).to(dtype)


@triton.jit
def product_of_halves(high, low, y, IP: tl.constexpr):
    """x·y of the halves of x, matrices or batches of them."""
    if y.dtype == tl.float32:
        return tl.dot(high, y, input_precision=IP)
    return tl.dot(high, y, tl.dot(low, y))


@triton.jit
def offset_of_class(WINDOW: tl.constexpr, BM: tl.constexpr, BT: tl.constexpr):
    """Row and column, in the window of every token, of the neighbour in each class: (BM, BT)."""
    r = tl.arange(0, BM) % CELLS
    c = tl.arange(0, BT)
    dy = (c // WINDOW % WINDOW)[None, :] - (r // SIDE % WINDOW)[:, None]
    dx = (c % WINDOW)[None, :] - (r % SIDE % WINDOW)[:, None]
    return tl.where(dy < 0, dy + WINDOW, dy), tl.where(dx < 0, dx + WINDOW, dx)


@triton.jit
def neighbours_in_map(y, x, inside, dy, dx, H, W, WINDOW: tl.constexpr, BT: tl.constexpr):
    """Whether the neighbours of `offset_of_class` are in the map: (BM, BT)."""
    y = y[:, None] + dy - WINDOW // 2
    x = x[:, None] + dx - WINDOW // 2
    real = tl.arange(0, BT) < WINDOW * WINDOW
    return inside[:, None] & real[None, :] & within(y, 0, H) & within(x, 0, W)


@triton.jit
def classes(WINDOW: tl.constexpr, HALO: tl.constexpr, BH: tl.constexpr, BT: tl.constexpr):
    """Which class each token of a halo is in: (BH, BT)."""
    n = tl.arange(0, BH)
    c = n // HALO % WINDOW * WINDOW + n % HALO % WINDOW
    return c[:, None] == tl.arange(0, BT)[None, :]


@triton.jit
def in_window(WINDOW: tl.constexpr, HALO: tl.constexpr, BM: tl.constexpr, BH: tl.constexpr):
    """Which tokens of its patch's halo are in the window of a token: (BM, BH)."""
    r = tl.arange(0, BM) % CELLS
    n = tl.arange(0, BH)
    dy = (n // HALO)[None, :] - (r // SIDE)[:, None]
    dx = (n % HALO)[None, :] - (r % SIDE)[:, None]
    return within(dy, 0, WINDOW) & within(dx, 0, WINDOW)


@triton.jit
def gathered(s, WINDOW: tl.constexpr, HALO: tl.constexpr, BT: tl.constexpr, IP: tl.constexpr):
    """Of (G, 16, BH), tokens of patches and of their halos, the neighbours of each token by class: (G · 16, BT)."""
    G: tl.constexpr = s.shape[0]
    BM: tl.constexpr = G * CELLS
    BH: tl.constexpr = s.shape[2]
    s = tl.where(in_window(WINDOW, HALO, BM, BH), tl.reshape(s, (BM, BH)), 0.0)
    chosen = classes(WINDOW, HALO, BH, BT)
    if IP == "ieee":
        return tl.dot(s, chosen.to(tl.float32), input_precision=IP)
    high, low = halves(s, tl.bfloat16)
    return product_of_halves(high, low, chosen.to(tl.bfloat16), IP)


@triton.jit
def spread(a, dtype: tl.constexpr, WINDOW: tl.constexpr, HALO: tl.constexpr, BH: tl.constexpr, IP: tl.constexpr):
    """The inverse of `gathered`, rounded to `dtype` but in float32: (G, 16, BH), 0 for no neighbour."""
    BM: tl.constexpr = a.shape[0]
    chosen = tl.trans(classes(WINDOW, HALO, BH, a.shape[1]).to(dtype))
    a = tl.dot(a.to(dtype), chosen, input_precision=IP)
    a = tl.where(in_window(WINDOW, HALO, BM, BH), a, 0.0)
    return tl.reshape(a, (BM // CELLS, CELLS, BH))


@triton.jit
def along(a, x, acc, WINDOW: tl.constexpr, HALO: tl.constexpr, IP: tl.constexpr):
    """acc + Σ a x over the neighbours of each token: a (G · 16, BT) by class, x (G, BH, BD) tokens of the halos."""
    a = spread(a, x.dtype, WINDOW, HALO, x.shape[1], IP)
    return tl.dot(a.to(x.dtype), x, acc, input_precision=IP)


@triton.jit
def along_directions(a, x, inverse, acc, WINDOW: tl.constexpr, HALO: tl.constexpr, IP: tl.constexpr):
    """`along` the directions of x, whose norms are 1/inverse: factors of a, but where float16 has no room for them."""
    if x.dtype == tl.float16:
        return along(a, (x.to(tl.float32) * inverse[:, :, None]).to(x.dtype), acc, WINDOW, HALO, IP)
    a = spread(a, x.dtype, WINDOW, HALO, x.shape[1], IP) * inverse[:, None, :]
    return tl.dot(a.to(x.dtype), x, acc, input_precision=IP)


@triton.jit
def class_of_offset(WINDOW: tl.constexpr, BM: tl.constexpr, BT: tl.constexpr):
    """The class that neighbour j of every token is in: the inverse of `offset_of_class`, (BM, BT)."""
    r = tl.arange(0, BM) % CELLS
    t = tl.arange(0, BT)
    y = ((r // SIDE)[:, None] + (t // WINDOW)[None, :]) % WINDOW
    x = ((r % SIDE)[:, None] + (t % WINDOW)[None, :]) % WINDOW
    return y * WINDOW + x
