"""Decays along the contracted axis in a verify step that streams the state.

What they leave of the owed rows and of the queries is taken slot by slot and token by token, in vectors that have one
element a thread, and only then laid side by side as tiles: running products over the slots of a tile meet across warps.
"""

from __future__ import annotations

from kvbuffer_compile.codegen.triton.matrix import PART, Matrix, needed
from kvbuffer_compile.codegen.triton.rows import Rows
from kvbuffer_compile.codegen.triton.values import Python, Values, power_of_two
from kvbuffer_compile.ir.plan import Plan
from kvbuffer_compile.ir.program import Decay, Update, Var

LINES = 16  # queries that the rows of a thread are split into

# Functions of the kernel: exact products, tiles of vectors, vectors and parts of tiles.
HELPERS = '''@triton.jit
def high(x):
    """The upper bits of float32 numbers, as many as tensor cores take; what is left of x has as few but for 2^-22."""
    return (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)


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


class Vectors:
    """Prints `queries` and left_n (or right_n) of the owed rows, as columns [contracted axis, ...], and fade_<axis>."""

    def __init__(self, out: Python, plan: Plan, values: Values, rows: Rows, matrix: Matrix) -> None:
        self.out, self.plan, self.values, self.rows, self.matrix = out, plan, values, rows, matrix
        self.kind, self.width, self.factor, self.reads = matrix.kind, matrix.width, matrix.factor, matrix.reads
        self.met = "left" if self.kind == "key" else "right"
        self.updates = range(len(rows.updates))

    def meet(self) -> None:
        """met_n, piece by piece: products over the whole axis at once take too many registers."""
        size = power_of_two(self.values.size(self.kind))
        count = max(1, size // PART)
        for tile in ("queries", *(f"{self.met}_{n}" for n in self.updates)):
            self.out.line(f"cut_{tile} = pieces({tile}, {min(size, PART)}, {count.bit_length() - 1})")
        with self.out.block(f"for n in tl.static_range({count})"):
            for n in self.updates:
                self.out.line(f"met_{n} = product(tl.trans(cut_queries[n]), cut_{self.met}_{n}[n], met_{n}, PRECISION)")

    def stack_queries(self) -> None:
        """`queries`, as columns, with what the decays of the tokens before leave of them."""
        roots = [r.x for r in self.reads] + ([self.factor] if self.factor else [])
        steps = needed(self.matrix.steps, roots)
        with self.out.block("if DRAFTS"):
            self.out.line("each_query = ()")
            self.out.line(f"now = {self.values.full(self.kind, '1.0')}")
            with self.out.block("for t in tl.static_range(DRAFTS)"):
                self.values.take(self.values.operands(steps, roots))
                self.values.steps(steps)
                for read in self.reads:
                    self.out.line(
                        f"each_query = each_query + ({self.values.inside(self.values.name(read.x), self.kind)} * now,)"
                    )
                for _ in range(self.width - len(self.reads)):
                    self.out.line(f"each_query = each_query + ({self.values.full(self.kind, '0.0')},)")
                if self.factor:
                    self.out.line(f"now = now * {self.values.name(self.factor)}")
            with self.out.block(f"for t in tl.static_range(DRAFTS * {self.width}, {LINES})"):
                self.out.line(f"each_query = each_query + ({self.values.full(self.kind, '0.0')},)")
            self.out.line(f"queries = stack(each_query, {LINES}, {LINES.bit_length() - 1})")
        with self.out.block("else"):
            self.matrix.lay()
            self.out.line("queries = tl.trans(queries)")

    def stack_rows(self) -> None:
        """The side of the owed rows that reads meet, as columns, and fade_<axis>: slot by slot, the newest first."""
        slots, name, most = self.rows.all_slots, f"fade_{self.kind}", self.plan.capacity
        self.out.line(f"{name} = {self.values.full(self.kind, '1.0')}")
        for n in self.updates:
            self.out.line(f"each_{self.met}_{n} = ({self.values.full(self.kind, '0.0')},) * {slots - most}")
        with self.out.block(f"for n in tl.static_range({most})"):
            self.out.line(f"there = tl.full([1], {most - 1} - n, tl.int32) < kept")
            for event in reversed(self.rows.events):
                if isinstance(event, Decay) and event.factor.kind == self.kind:
                    self.out.line(f"{name} = {name} * {self._slot(event.factor, 1)}")
                elif isinstance(event, Update):
                    n = self.rows.events.index(event)
                    n = self.rows.updates.index(n)
                    side = self._slot(self.rows.side(n, self.met), 0)
                    held = f"each_{self.met}_{n}"
                    self.out.line(f"{held} = ({side} * {name},) + {held}")
        for n in self.updates:
            self.out.line(f"{self.met}_{n} = stack(each_{self.met}_{n}, {slots}, {slots.bit_length() - 1})")

    def _slot(self, v: Var, other: int) -> str:
        """A logged value of slot n from the last, `other` where nothing is owed."""
        mask = self.values.mask("there", *([v.kind] if v.kind != "scalar" else []))
        address = self.rows.address(v, f"({self.plan.capacity - 1} - n)", False)
        return f"tl.load({address}{mask}, other={other}.0).to({self.values.real})"
