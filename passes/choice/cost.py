"""What a step costs, found by running its program on memories that count instead of computing.

Every result is a sympy expression over all lanes, in these symbols (bytes are bytes of one element):

    <lanes>  sizes of the program's lanes by their names, e.g. B, H and r (heads that share a key)
    K, V     key rows and value columns of the state
    s        bytes of the state                b   bytes of buffered keys and values
    h        bytes of its shadow, which is read in its place
    w        bytes of buffered gates           a   bytes of operands and outputs
    n        tokens owed when the step begins
    L        flush length: tokens between two writes of the state
    T        tokens of one step: 1, or the drafts that are verified together

Traffic is that of a kernel that keeps what it has loaded for the rest of the step, so a state is read once for all
reads whose keys are known, and once more for each level of keys that depend on reads (KVBuffer, arXiv 2605.19049).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields

import sympy
from sympy import Expr, Integer

from kvbuffer_compile.ir.program import Program, run
from kvbuffer_compile.passes.choice.counting import (
    ONE,
    ZERO,
    Buffered,
    K,
    Recurrent,
    Size,
    V,
    axis,
    lanes_product,
)

s, h, b, w, a, n, L, T = sympy.symbols("s h b w a n L T", positive=True)


@dataclass(frozen=True)
class Cost:
    """Bytes moved and operations done by one step, over all lanes.

    operations: on elements of the state and on vectors. rows: owed ones, each once a lane. row_operations: of reads on
    them; they are short vectors with a weight each, so that an operation takes longer. gathered: elements of them that
    are copied before they are read, because decays of their own axis lie on them or a fold needs them side by side.
    fold_operations: of a flush, which is a matrix product. passes: over the state, or over its shadow. launches:
    kernels started.
    """

    state_read: Expr = ZERO
    state_written: Expr = ZERO
    rows_read: Expr = ZERO
    rows_written: Expr = ZERO
    operands: Expr = ZERO
    operations: Expr = ZERO
    rows: Expr = ZERO
    row_operations: Expr = ZERO
    gathered: Expr = ZERO
    fold_operations: Expr = ZERO
    passes: Expr = ZERO
    launches: Expr = ONE

    @property
    def bytes(self) -> Expr:
        """All bytes moved."""
        return self.state_read + self.state_written + self.rows_read + self.rows_written + self.operands

    def map(self, change: Callable[[Expr], Expr]) -> Cost:
        """The same change made to every count."""
        return Cost(**{f.name: change(getattr(self, f.name)) for f in fields(self)})

    def plus(self, **more: Expr) -> Cost:
        """This cost with some counts increased."""
        return Cost(**{f.name: getattr(self, f.name) + more.get(f.name, 0) for f in fields(self)})


def _inputs(program: Program) -> dict[str, Size]:
    return {v.name: Size(v.kind, frozenset(v.lanes)) for v in program.inputs}


def _operands(program: Program) -> Expr:
    return a * sum(lanes_product(v.lanes) * axis(v.kind) for v in (*program.inputs, *program.outputs))


# ----------------------------------------------------------------------------------------------- costs


@dataclass(frozen=True)
class Slot:
    """One slot of the log. size: bytes over all lanes. gates: for each of program.logged, whether it is one.
    rows: how many rows it has, over all lanes. walk: operations one read spends on it; fold: those that a flush does.
    gathered: elements that are copied at every step; packed: those that a flush copies."""

    size: Expr
    gates: tuple[bool, ...]
    rows: Expr
    walk: Expr
    fold: Expr
    gathered: Expr
    packed: Expr


Widths = tuple[int, ...]


@functools.cache
def slot(program: Program, sequence: bool = True, widths: Widths | None = None) -> Slot:
    """What one run of the program adds to the log.

    sequence: lane 0 is the sequences of a batch; rows then vary along it even where the value does not
    (Plan.row_shape).
    widths: bytes of an element of each of program.logged, in its order; None: the symbols b, and w for gates.
    """
    memory = Buffered(program.lanes)
    run(program, memory, _inputs(program))
    always = frozenset(program.lanes[:1]) if sequence else frozenset()
    gates = tuple(memory.logged.values())
    per_element = widths or tuple(w if gate else b for gate in gates)
    size = sum(
        (lanes_product(v.lanes | always) * axis(v.kind) * e for v, e in zip(memory.logged, per_element, strict=True)),
        start=ZERO,
    )
    rows = lanes_product(program.lanes) * (len(memory.sides) // 2)
    return Slot(size, gates, rows, memory.slot_walk, memory.fold, memory.gathered, memory.packed)


@functools.cache
def _run_recurrent(program: Program) -> Recurrent:
    memory = Recurrent(program.lanes)
    run(program, memory, _inputs(program))
    return memory


@functools.cache
def recurrent(program: Program) -> Cost:
    """One step that reads and writes the state, all T tokens at once."""
    memory = _run_recurrent(program)
    cells = memory.cells * s
    reads = max(memory.passes, 1)
    operations = T * memory.operations
    return Cost(reads * cells, cells, operands=T * _operands(program), operations=operations, passes=Integer(reads))


def meetings(program: Program) -> int:
    """How many times a recurrent step goes over a lane of the state: what an update needs is read before."""
    memory = _run_recurrent(program)
    return max(memory.passes, memory.updated)


@functools.cache
def step(program: Program, sequence: bool = True, widths: Widths | None = None, *, shadow: bool = False) -> Cost:
    """One buffered step that does not flush, n tokens owed. Token j of T also walks the j rows before it.

    shadow: it is read in the state's place.
    """
    row = slot(program, sequence, widths)
    memory = Buffered(program.lanes, owed=n + (T - 1) / 2, walk=row.walk)
    run(program, memory, _inputs(program))
    return Cost(
        state_read=memory.passes * memory.cells * (h if shadow else s),
        rows_read=n * row.size if memory.passes else ZERO,
        rows_written=T * row.size,
        operands=T * _operands(program),
        operations=T * memory.operations,
        rows=n * row.rows,
        row_operations=T * memory.row_operations,
        gathered=n * row.gathered,
        passes=Integer(memory.passes),
    )


@functools.cache
def flushing(
    program: Program,
    sequence: bool = True,
    widths: Widths | None = None,
    *,
    separate: bool = False,
    shadow: bool = False,
) -> Cost:
    """The step that finds L tokens owed and folds their rows into the state first: in the same kernel, while it has the
    state at hand, or (separate) by a launch of its own that reads and writes the state. With a shadow it writes both.
    """
    row, begin = slot(program, sequence, widths), step(program, sequence, widths).map(lambda e: e.subs(n, 0))
    cells = lanes_product(program.lanes) * K * V
    read_again = separate or begin.state_read == 0
    return begin.plus(
        state_read=cells * s if read_again else ZERO,
        state_written=cells * (s + h if shadow else s),
        rows_read=L * row.size,
        rows=L * row.rows,
        gathered=L * (row.gathered + row.packed),
        fold_operations=L * row.fold + cells,
        launches=ONE if separate else ZERO,
    )


@functools.cache
def reading(program: Program, sequence: bool = True, widths: Widths | None = None, *, shadow: bool = False) -> Cost:
    """The mean of the L/T - 1 steps between two flushes, which owe T, 2T, ... L - T tokens when they begin."""
    return step(program, sequence, widths, shadow=shadow).map(lambda e: sympy.expand(e.subs(n, L / 2)))


@functools.cache
def buffered(
    program: Program,
    sequence: bool = True,
    widths: Widths | None = None,
    *,
    separate: bool = False,
    shadow: bool = False,
) -> Cost:
    """The mean step over a full flush period of L/T steps, of which one flushes."""
    ordinary = reading(program, sequence, widths, shadow=shadow)
    last = flushing(program, sequence, widths, separate=separate, shadow=shadow)
    steps = L / T
    means = {f.name: ((steps - 1) * getattr(ordinary, f.name) + getattr(last, f.name)) / steps for f in fields(Cost)}
    return Cost(**{name: sympy.expand(mean) for name, mean in means.items()})


@functools.cache
def buffer_only(program: Program, sequence: bool = True) -> Cost:
    """One step of a sequence that has no base yet: n rows, no state."""
    cost = step(program, sequence)
    return cost.plus(state_read=-cost.state_read)


# --------------------------------------------------------------------------------------------- formulas


def best_flush(cost: Cost) -> Expr:
    """L* that moves the fewest bytes: of p/L + q L + const it is sqrt(p/q). The one formula for every program."""
    bytes_moved = sympy.expand(cost.bytes)
    return sympy.sqrt(sympy.simplify(bytes_moved.coeff(L, -1) / bytes_moved.coeff(L, 1)))


def speedup(program: Program, sequence: bool = True) -> Expr:
    """State traffic of the recurrent step over that of the buffered one and its rows, as far as they grow with L."""
    plain, cost = recurrent(program), buffered(program, sequence)
    rows = sympy.expand(cost.rows_read).coeff(L, 1) * L
    return sympy.simplify((plain.state_read + plain.state_written) / (cost.state_read + cost.state_written + rows))


def break_even(program: Program, sequence: bool = True) -> Expr:
    """The number of owed rows that takes as many bytes as one pass over the state: below it buffer-only wins."""
    return sympy.simplify(lanes_product(program.lanes) * K * V * s / slot(program, sequence).size)


def numbers(program: Program, lanes: tuple[int, ...], sizes: tuple[int, int], **widths: float) -> Mapping[Expr, float]:
    """Substitutions for Expr.subs: lane sizes, (K, V), and widths by symbol name (s, h, b, w, a, n, L, T)."""
    known: dict[Expr, float] = {sympy.Symbol(x, positive=True): v for x, v in zip(program.lanes, lanes, strict=True)}
    known |= {K: sizes[0], V: sizes[1]}
    return known | {sympy.Symbol(x, positive=True): v for x, v in widths.items()}
