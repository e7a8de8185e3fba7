"""Triton functions that a verify step calls: exact products, tiles of vectors, vectors and parts of tiles."""

from __future__ import annotations

FUNCTIONS = '''@triton.jit
def high(x):
    """float32 numbers rounded to as many bits as tensor cores take. What is left of x has as few but for 2^-24; cut off
    instead of rounded it had two bits more, and products erred 3.5 times as much, more than float32's own may."""
    return ((x.to(tl.int32, bitcast=True) + 4096) & -8192).to(tl.float32, bitcast=True)


@triton.jit
def short(x):
    """The upper bits of float32 numbers that bfloat16 has, exactly."""
    return (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def product(x, s, total, PRECISION: tl.constexpr):
    """total + x s, as exact as float32: numbers are cut into parts that tensor cores take exactly. Numbers of 16 bits
    need no cut; inf becomes NaN."""
    if PRECISION == "ieee":
        total = tl.dot(x.to(tl.float32), s.to(tl.float32), total, input_precision=PRECISION)
    elif x.dtype == tl.float32 and s.dtype == tl.float32:
        total = tl.dot(high(x), high(s), total, input_precision="tf32")
        total = tl.dot(x - high(x), high(s), total, input_precision="tf32")
        total = tl.dot(high(x), s - high(s), total, input_precision="tf32")
    elif s.dtype == tl.float32:
        total = tl.dot(x.to(tl.float32), high(s), total, input_precision="tf32")
        total = tl.dot(x.to(tl.float32), s - high(s), total, input_precision="tf32")
    elif x.dtype == s.dtype:
        total = tl.dot(x, s, total)
    elif x.dtype == tl.float32 and s.dtype == tl.bfloat16:
        rest = x - short(x)
        total = tl.dot(short(x).to(tl.bfloat16), s, total)
        total = tl.dot(short(rest).to(tl.bfloat16), s, total)
        total = tl.dot((rest - short(rest)).to(tl.bfloat16), s, total)
    elif x.dtype == tl.float32:
        total = tl.dot(high(x), s.to(tl.float32), total, input_precision="tf32")
        total = tl.dot(x - high(x), s.to(tl.float32), total, input_precision="tf32")
    else:
        total = tl.dot(x.to(tl.float32), s.to(tl.float32), total, input_precision="tf32")
    return total


@triton.jit
def stack(xs, N: tl.constexpr, LOG: tl.constexpr):
    """N = 2 ** LOG vectors as the columns of a tile; all of a row lies in one thread."""
    for n in tl.static_range(LOG):
        joined = ()
        for j in tl.static_range(N >> (n + 1)):
            pair = tl.join(xs[j], xs[j + (N >> (n + 1))])
            joined = joined + (tl.reshape(pair, (xs[0].shape[0], 2 << n)),)
        xs = joined
    return xs[0]


@triton.jit
def pieces(x, PART: tl.constexpr, LOG: tl.constexpr):
    """2 ** LOG tiles of PART rows each, one after the other in each thread."""
    found = (tl.permute(tl.reshape(x, (1 << LOG, PART, x.shape[1])), (1, 2, 0)),)
    for n in tl.static_range(LOG):
        cut = ()
        for j in tl.static_range(1 << n):
            pair = tl.reshape(found[j], (PART, x.shape[1], 2, (1 << LOG) >> (n + 1)))
            cut = cut + tl.split(tl.permute(pair, (0, 1, 3, 2)))
        found = cut
    tiles = ()
    for j in tl.static_range(1 << LOG):
        tiles = tiles + (tl.reshape(found[j], (PART, x.shape[1])),)
    return tiles


@triton.jit
def some(x, rows):
    """The given rows of a tile."""
    return tl.gather(x, tl.broadcast_to(rows[:, None], (rows.shape[0], x.shape[1])), 0)


@triton.jit
def halves(x, N: tl.constexpr):
    """The first and the last N of 2 N columns."""
    return tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, N)), (0, 2, 1)))


@triton.jit
def fours(x):
    """Four columns."""
    low, high = halves(x, 2)
    a, b = tl.split(low)
    c, d = tl.split(high)
    return a, b, c, d


@triton.jit
def columns(x):
    """The 16 columns of x, each a vector."""
    low, high = halves(x, 8)
    a, b = halves(low, 4)
    c, d = halves(high, 4)
    return fours(a) + fours(b) + fours(c) + fours(d)


@triton.jit
def add_four(a0, a1, a2, a3, b0, b1, b2, b3):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3


@triton.jit
def add_eight(a0, a1, a2, a3, a4, a5, a6, a7, b0, b1, b2, b3, b4, b5, b6, b7):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3, a4 + b4, a5 + b5, a6 + b6, a7 + b7


@triton.jit
def totals(xs, N: tl.constexpr):
    """The sum of each of N vectors."""
    found = ()
    for n in tl.static_range(0, N // 8 * 8, 8):
        found = found + tl.reduce(
            (xs[n], xs[n + 1], xs[n + 2], xs[n + 3], xs[n + 4], xs[n + 5], xs[n + 6], xs[n + 7]), 0, add_eight
        )
    for n in tl.static_range(N // 8 * 8, N // 4 * 4, 4):
        found = found + tl.reduce((xs[n], xs[n + 1], xs[n + 2], xs[n + 3]), 0, add_four)
    for n in tl.static_range(N // 4 * 4, N):
        found = found + (tl.sum(xs[n], 0),)
    return found'''
