"""The tokens of a verify step: T tokens of each sequence in one kernel, with one pass over the state.

A read by token t is a read of the state as it was at the start of the step, faded by the tokens before t, plus what the
rows of those tokens add. The tile of the state and the owed rows stay in registers for all tokens.

now_<kind>                      what the decays of the tokens so far leave
fresh_left_n, fresh_right_n     the rows of the tokens so far, decayed to now
"""

from __future__ import annotations

from kvbuffer_compile.codegen.schedule import Fold, Old, Schedule
from kvbuffer_compile.codegen.triton_rows import Rows
from kvbuffer_compile.codegen.triton_values import Python, Values
from kvbuffer_compile.ir import Kind, Var


class Fresh:
    """Prints the parts of the loop over tokens that deal with what the tokens before have left."""

    def __init__(self, out: Python, schedule: Schedule, values: Values, rows: Rows) -> None:
        assert schedule.fold is not None
        self.out, self.values, self.rows = out, values, rows
        self.fold: Fold = schedule.fold
        self.factors: dict[Kind, Var | None] = {
            "scalar": self.fold.scalar,
            "key": self.fold.key,
            "value": self.fold.value,
        }

    def start(self) -> None:
        """What the loop carries."""
        self.out.line("token = tl.arange(0, TOKENS)")
        for n, _ in enumerate(self.fold.rows):
            self.out.line(f"fresh_left_{n} = tl.zeros([TOKENS, {self.values.length('key')}], {self.values.real})")
            self.out.line(f"fresh_right_{n} = tl.zeros([TOKENS, {self.values.length('value')}], {self.values.real})")
        for kind, v in self.factors.items():
            if v:
                self.out.line(f"now_{kind} = {self.values.full(kind, '1.0')}")

    def read(self, read: Old) -> None:
        """One read of token t."""
        out, x, query = self.values.name(read.out), read.x, self.values.name(read.x)
        faded = query
        if self.factors[x.kind]:
            faded = "query"
            self.out.line(f"query = {self.values.name(x)} * now_{x.kind}")
        self.rows.read(read, faded)
        gates: list[Kind] = ["scalar", read.out.kind]
        for kind in gates:
            if self.factors[kind]:
                self.out.line(f"{out} *= now_{kind}")
        for n in range(len(self.fold.rows)):
            self.rows.add(out, query, x.kind, f"fresh_left_{n}", f"fresh_right_{n}")

    def append(self) -> None:
        """What the token leaves of the rows before it, and its own rows beside them."""
        name, fold = self.values.name, self.fold
        for kind, v in self.factors.items():
            if v:
                self.out.line(f"now_{kind} = now_{kind} * {name(v)}")
        for n, (left, right) in enumerate(fold.rows):
            gates = [name(fold.scalar)] if fold.scalar else []
            gates += [f"{name(fold.key)}[None, :]"] if fold.key else []
            self._insert(f"fresh_left_{n}", gates, name(left))
            self._insert(f"fresh_right_{n}", [f"{name(fold.value)}[None, :]"] if fold.value else [], name(right))

    def _insert(self, tile: str, gates: list[str], row: str) -> None:
        self.out.line(f"{tile} = tl.where((token == t)[:, None], {row}[None, :], {' * '.join([tile, *gates])})")
