"""The tokens of a verify step: T tokens of each sequence in one kernel, with one pass over the state.

A read by token t is a read of the state as it was at the start of the step, faded by the tokens before t, plus what the
rows of those tokens add. The tile of the state stays in registers for all tokens.
What the owed rows add to reads whose queries do not depend on reads is computed beforehand, for all tokens.

<out>_rows                      what the owed rows add to a read, a tile over tokens
now_<kind>                      what the decays of the tokens so far leave
fresh_left_n, fresh_right_n     the rows of the tokens so far, decayed to now
"""

from __future__ import annotations

from collections.abc import Iterable

from kvbuffer_compile.codegen.schedule import Fold, Old, Schedule, Step, uses
from kvbuffer_compile.codegen.triton_rows import Rows
from kvbuffer_compile.codegen.triton_values import Python, Values
from kvbuffer_compile.ir import Kind, Var
from kvbuffer_compile.plan import Plan


class Fresh:
    """Prints the parts of the loop over tokens that deal with what the tokens before have left."""

    def __init__(self, out: Python, plan: Plan, schedule: Schedule, values: Values, rows: Rows) -> None:
        assert schedule.fold is not None
        self.out, self.plan, self.values, self.rows = out, plan, values, rows
        self.stages = schedule.stages
        self.first = schedule.stages[0].reads if self.rows.updates else ()
        self.fold: Fold = schedule.fold
        self.factors: dict[Kind, Var | None] = {
            "scalar": self.fold.scalar,
            "key": self.fold.key,
            "value": self.fold.value,
        }

    def read_ahead(self) -> None:
        """<out>_rows for the reads of the first pass."""
        self.out.line("token = tl.arange(0, TOKENS)")
        for read in self.first:
            length = self.values.length(read.out.kind)
            self.out.line(f"{read.out}_rows = tl.zeros([TOKENS, {length}], {self.values.real})")
        self.rows.through(self._add_ahead)

    def _add_ahead(self) -> None:
        """What a chunk of rows adds to them, token by token."""
        if not self.first:
            return
        roots = [*(v for v in self.factors.values() if v), *(r.x for r in self.first)]
        steps = needed([n for stage in self.stages for n in stage.steps], roots)
        used = self.values.operands(steps, roots)
        self._start_fading()
        self.values.load_first(used)
        with self.out.block("for t in range(T)"):
            self.values.load_next(used)
            self.values.steps(steps)
            for read in self.first:
                self.out.line(f"part = {self.values.full(read.out.kind, '0.0')}")
                self.rows.add_rows("part", read, self._query(read))
                self._fade("part", read)
                self.out.line(f"{read.out}_rows += tl.where((token == t)[:, None], part[None, :], 0.0)")
            self._fade_on()

    def start(self) -> None:
        """What the loop carries."""
        for n, _ in enumerate(self.fold.rows):
            self.out.line(f"fresh_left_{n} = tl.zeros([TOKENS, {self.values.length('key')}], {self.values.real})")
            self.out.line(f"fresh_right_{n} = tl.zeros([TOKENS, {self.values.length('value')}], {self.values.real})")
        self._start_fading()

    def read(self, read: Old) -> None:
        """One read of token t."""
        out, query = self.values.name(read.out), self._query(read)
        ahead = read in self.first
        if ahead:
            self.out.line(f"{out} = {self.values.full(read.out.kind, '0.0')}")
            self.rows.add_base(read, query)
        else:
            self.rows.read(read, query)
        self._fade(out, read)
        if ahead:
            self.out.line(f"{out} += tl.sum(tl.where((token == t)[:, None], {read.out}_rows, 0.0), 0)")
        for n in range(len(self.fold.rows)):
            self.rows.add(out, self.values.name(read.x), read.x.kind, f"fresh_left_{n}", f"fresh_right_{n}")

    def _query(self, read: Old) -> str:
        """What the tokens so far leave of a query."""
        if not self.factors[read.x.kind]:
            return self.values.name(read.x)
        self.out.line(f"query = {self.values.name(read.x)} * now_{read.x.kind}")
        return "query"

    def _fade(self, out: str, read: Old) -> None:
        gates: list[Kind] = ["scalar", read.out.kind]
        for kind in gates:
            if self.factors[kind]:
                self.out.line(f"{out} *= now_{kind}")

    def _start_fading(self) -> None:
        for kind, v in self.factors.items():
            if v:
                self.out.line(f"now_{kind} = {self.values.full(kind, '1.0')}")

    def _fade_on(self) -> None:
        for kind, v in self.factors.items():
            if v:
                self.out.line(f"now_{kind} = now_{kind} * {self.values.name(v)}")

    def append(self) -> None:
        """What the token leaves of the rows before it, and its own rows beside them."""
        name, fold = self.values.name, self.fold
        self._fade_on()
        for n, (left, right) in enumerate(fold.rows):
            gates = [name(fold.scalar)] if fold.scalar else []
            gates += [f"{name(fold.key)}[None, :]"] if fold.key else []
            self._insert(f"fresh_left_{n}", gates, name(left))
            self._insert(f"fresh_right_{n}", [f"{name(fold.value)}[None, :]"] if fold.value else [], name(right))

    def _insert(self, tile: str, gates: list[str], row: str) -> None:
        self.out.line(f"{tile} = tl.where((token == t)[:, None], {row}[None, :], {' * '.join([tile, *gates])})")


def needed(nodes: Iterable[Step], roots: Iterable[Var]) -> list[Step]:
    """The steps that `roots` depend on, in order."""
    wanted = set(roots)
    kept = []
    for node in reversed(list(nodes)):
        if node.out in wanted:
            wanted.update(uses(node))
            kept.append(node)
    return kept[::-1]
