"""The tokens of a verify step: T tokens of each sequence in one kernel, with one pass over the state.

A read by token t is a read of the state as it was at the start of the step, faded by the tokens before t, plus what the
rows of those tokens add. The tile of the state stays in registers for all tokens.
What the owed rows add to reads whose queries do not depend on reads is computed beforehand, for all tokens.

<out>_rows                      what the owed rows add to a read, a tile over tokens
now_<kind>                      what the decays of the tokens so far leave
fresh_left_n, fresh_right_n     the rows of the tokens so far, decayed to now
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from kvbuffer_compile.codegen.schedule import Fold, Old, Schedule
from kvbuffer_compile.codegen.triton.tiles.matrix import Matrix, applies, needed
from kvbuffer_compile.codegen.triton.tiles.rows import Rows
from kvbuffer_compile.codegen.triton.tiles.values import AXES, Python, Values
from kvbuffer_compile.ir.plan import Plan
from kvbuffer_compile.ir.program import Kind, Var

SIDES: dict[Kind, str] = {"key": "left", "value": "right"}


class Fresh:
    """Prints the parts of the loop over tokens that deal with what the tokens before have left."""

    def __init__(self, out: Python, plan: Plan, schedule: Schedule, values: Values, rows: Rows) -> None:
        assert schedule.fold is not None
        self.out, self.plan, self.values, self.rows = out, plan, values, rows
        self.stages = schedule.stages
        self.first = schedule.stages[0].reads
        self.fold: Fold = schedule.fold
        fold, self.alone = self.fold, plan.variant == "block"  # no token sees another
        factors: dict[Kind, Var | None] = {"scalar": fold.scalar, "key": fold.key, "value": fold.value}
        self.factors = {} if self.alone else factors
        self.seen = () if self.alone else fold.rows
        self.matrix = Matrix(out, plan, values, rows, schedule) if applies(plan, schedule) else None

    def ask(self) -> None:
        """Before anything else: what depends on no cursor and is not an operand."""

    def number(self) -> None:
        """`token`, the numbers of the tokens, and what is known of their order."""
        self.out.line("token = tl.arange(0, TOKENS)")

    def read_ahead(self) -> None:
        """What is known of the reads of the first pass: all by matrix products, or <out>_rows of the owed rows."""
        self.number()
        if self.matrix:
            with self.out.block("if MATRIX"):
                self.matrix.read()
        with self.unless_matrix("else"):
            for read in self.first:
                length = self.values.length(read.out.kind)
                self.out.line(f"{read.out}_rows = tl.zeros([TOKENS, {length}], {self.values.real})")
            self.rows.through(self._add_by_token)

    def unless_matrix(self, head: str = "if not MATRIX") -> AbstractContextManager[None]:
        """A block for what matrix products do without."""
        return self.out.block(head) if self.matrix else nullcontext()

    def _add_by_token(self) -> None:
        """What a chunk of rows adds to the reads, token by token."""
        if not self.first or not self.rows.updates:
            return
        roots = [*(v for v in self.factors.values() if v), *(r.x for r in self.first)]
        steps = needed([n for stage in self.stages for n in stage.steps], roots)
        used = self.values.operands(steps, roots)
        self.start_fading()
        self.values.load_first(used)
        with self.out.block("for t in range(T)"):
            self.values.load_next(used)
            self.follow()
            self.values.steps(steps)
            for read in self.first:
                self.out.line(f"part = {self.values.full(read.out.kind, '0.0')}")
                self.rows.add_rows("part", read, self._query(read))
                self.fade("part", read)
                self.out.line(f"{read.out}_rows += tl.where((token == t)[:, None], part[None, :], 0.0)")
            self.fade_on()

    def start(self) -> None:
        """What the loop over tokens carries."""
        if self.matrix and self.matrix.weighs:
            self.out.line(f"fresh_weight = tl.zeros([TOKENS], {self.values.real})")
        self._start_rows()
        self.start_fading()

    def _start_rows(self) -> None:
        for n, _ in enumerate(self.seen):
            for kind in AXES:
                zeros = f"tl.zeros([TOKENS, {self.values.length(kind)}], {self.values.real})"
                with self._where_needed(kind, n):
                    self.out.line(f"fresh_{SIDES[kind]}_{n} = {zeros}")

    def meet(self) -> None:
        """What token t finds of those before it."""

    def read(self, read: Old) -> None:
        """One read of token t."""
        out = self.values.name(read.out)
        if self.matrix:
            with self.out.block("if MATRIX"):
                self.out.line(f"{out} = {self.matrix.pick(read)}")
                self.fade(out, read)
        with self.unless_matrix("else"):
            self._read_vector(out, read)
        for n in range(len(self.seen)):
            self._add_fresh(out, read, n)

    def _read_vector(self, out: str, read: Old) -> None:
        if read not in self.first:
            self.rows.read(read, self._query(read))
            self.fade(out, read)
            return
        self.out.line(f"{out} = {self.values.full(read.out.kind, '0.0')}")
        self.rows.add_base(read, self._query(read))
        self.fade(out, read)
        self.out.line(f"{out} += tl.sum(tl.where((token == t)[:, None], {read.out}_rows, 0.0), 0)")

    def _add_fresh(self, out: str, read: Old, n: int) -> None:
        """out += what the n-th rows of the tokens before add."""
        if self.matrix and n in self.matrix.grams:
            with self.out.block("if MATRIX"):
                self.matrix.add_fresh(out, read, n)
        with self.unless_matrix("else") if self.matrix and n in self.matrix.grams else nullcontext():
            self.rows.add(out, self.values.name(read.x), read.x.kind, f"fresh_left_{n}", f"fresh_right_{n}")

    def _query(self, read: Old) -> str:
        """What the tokens so far leave of a query."""
        if not self.factors.get(read.x.kind):
            return self.values.name(read.x)
        self.out.line(f"query = {self.values.name(read.x)} * now_{read.x.kind}")
        return "query"

    def fade(self, out: str, read: Old) -> None:
        gates: list[Kind] = ["scalar", read.out.kind]
        for kind in gates:
            if self.factors.get(kind):
                self.out.line(f"{out} *= now_{kind}")

    def start_fading(self) -> None:
        for kind, v in self.factors.items():
            if v:
                self.out.line(f"now_{kind} = {self.values.full(kind, '1.0')}")

    def follow(self) -> None:
        """now_<kind> of token t: it is there already where tokens follow one another."""

    def fade_on(self) -> None:
        for kind, v in self.factors.items():
            if v:
                self.out.line(f"now_{kind} = now_{kind} * {self.values.name(v)}")

    def append(self) -> None:
        """What the token leaves of the rows before it, and its own rows beside them."""
        name, fold = self.values.name, self.fold
        self.fade_on()
        for n, (left, right) in enumerate(self.seen):
            gates = [name(fold.scalar)] if fold.scalar else []
            gates += [f"{name(fold.key)}[None, :]"] if fold.key else []
            self._insert("key", n, gates, name(left))
            self._insert("value", n, [f"{name(fold.value)}[None, :]"] if fold.value else [], name(right))
        if self.matrix and self.matrix.weighs:
            assert fold.scalar
            self.out.line(f"fresh_weight = tl.where(token == t, 1.0, fresh_weight * {name(fold.scalar)})")

    def _insert(self, kind: Kind, n: int, gates: list[str], row: str) -> None:
        tile = f"fresh_{SIDES[kind]}_{n}"
        with self._where_needed(kind, n):
            self.out.line(f"{tile} = tl.where((token == t)[:, None], {row}[None, :], {' * '.join([tile, *gates])})")

    def _where_needed(self, kind: Kind, n: int) -> AbstractContextManager[None]:
        """A block for what makes the fresh rows of one side, which matrix products may do without."""
        if self.matrix and not self.matrix.needs(kind, n):
            return self.unless_matrix()
        return nullcontext()
