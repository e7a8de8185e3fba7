"""Decays along the contracted axis in a verify step that streams the state.

What they leave of the owed rows and of the queries is taken slot by slot and token by token, in vectors that have one
element a thread, and only then laid side by side as tiles: running products over the slots of a tile meet across warps.
"""

from __future__ import annotations

from kvbuffer_compile.codegen.triton.tiles.matrix import PART, Matrix, needed
from kvbuffer_compile.codegen.triton.tiles.rows import Rows
from kvbuffer_compile.codegen.triton.tiles.values import Python, Values, power_of_two
from kvbuffer_compile.ir.plan import Plan
from kvbuffer_compile.ir.program import Decay, Update, Var

LINES = 16  # queries that the rows of a thread are split into


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
