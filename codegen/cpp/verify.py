"""The item of a verify step: several tokens, one pass over the state for all queries that need no read.

The tokens are rows to those behind them. Three parts: the queries of all tokens, faded as the base sees them; one pass
over the state; then token after token, what rows add to its reads, its own steps, and itself as new rows. A query that
depends on a read costs a pass of its own for every token.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvbuffer_compile.codegen.cpp.item import HEAD, Item
from kvbuffer_compile.codegen.cpp.log import fade_name
from kvbuffer_compile.codegen.cpp.values import FULL
from kvbuffer_compile.codegen.cut import Piece
from kvbuffer_compile.codegen.schedule import Old, steps_for
from kvbuffer_compile.codegen.source import Source
from kvbuffer_compile.ir.plan import Plan
from kvbuffer_compile.ir.program import Decay, Kind, Update, Var

EACH = "for (int64_t t = 0; t < call.tokens; ++t)"


class VerifyItem(Item):
    """Prints `run_item` for T tokens, T known at run time."""

    def __init__(self, out: Source, plan: Plan, piece: Piece) -> None:
        super().__init__(out, plan, piece)
        first = self.schedule.stages[0].reads
        self.early: dict[Kind, list[Old]] = {k: [r for r in first if r.x.kind == k] for k in ("key", "value")}

    def emit(self) -> None:
        self.out.comment("One lane, or one tile of it, for all tokens.")
        with self.out.block(HEAD):
            self.out.line("int64_t at[AXES];")
            self.out.line("call.split_lane(lane, at);")
            self._sequence()
            self.rows.gather()
            self._block()
            self._fold_alone()
            if self.schedule.stages[0].reads:
                self._queries()
                self._one_pass()
                self._written(0)
            self.out.line("const int64_t to = flush ? 0 : count;")
            with self.out.block(EACH):
                self._token()

    def _no_outputs(self) -> None:
        with self.out.block(EACH):
            super()._no_outputs()

    # --------------------------------------------------------------------------------------- before the pass

    def _queries(self) -> None:
        """room.x: the queries of all tokens times all decays of their own axis before them."""
        self.out.comment("The queries of all tokens, faded as the base sees them.")
        faded: list[Kind] = [k for k in ("key", "value") if self.early[k] and k in self.rows.fades]
        self._later(faded)
        decays = [e.factor for e in self.plan.program.events if isinstance(e, Decay) and e.factor.kind in faded]
        queries = [r.x for r in self.schedule.stages[0].reads]
        with self.out.block(EACH):
            self._later_of_token(faded)
            steps = steps_for(self.plan.program, [*queries, *decays])
            self.values.load_for(self.plan.program.inputs, steps, [*queries, *decays])
            self.values.steps(steps)
            for kind, reads in self.early.items():
                for n, read in enumerate(reads):
                    fade = f" * later_{kind}[i]" if kind in faded else ""
                    to = f"room.x_{kind}[(t * {len(reads)} + {n}) * {FULL[kind]} + i]"
                    self.values.each(kind, f"{to} = {self.values.name(read.x)}[i]{fade};")
            self._later_of_next(decays, faded)

    def _later(self, faded: Sequence[Kind]) -> None:
        """later_key, later_value: the decays of an axis before the token at hand."""
        for kind in faded:
            self.values.array(f"later_{kind}", kind)
            self.values.each(kind, f"later_{kind}[i] = {fade_name(kind)}[i];")

    def _later_of_token(self, faded: Sequence[Kind]) -> None:
        """Tokens follow each other: what the one before has left."""

    def _later_of_next(self, decays: Sequence[Var], faded: Sequence[Kind]) -> None:
        for v in decays:
            self.values.each(v.kind, f"later_{v.kind}[i] *= {self.values.name(v)}[i];")

    def _one_pass(self) -> None:
        counts = {r.out.kind: len(reads) for reads in self.early.values() for r in reads}
        of: dict[Kind, Kind] = {"key": "value", "value": "key"}
        results = [(f"room.y_{of[out]}", f"call.tokens * {count}") for out, count in counts.items()]
        reads = f"{self._reads(self.outer)}, {self._reads(self.inner)}"
        self.shadow.read(results, lambda t, block: self.out.line(f"read_many<{t}>({block}, flush, fold, {reads});"))
        self.shadow.make()

    def _reads(self, kind: Kind) -> str:
        """The Reads of all queries along an axis."""
        count = len(self.early[kind])
        if not count:
            return "Reads{}"
        other = FULL["value" if kind == "key" else "key"]
        return f"Reads{{call.tokens * {count}, room.x_{kind}, {FULL[kind]}, room.y_{kind}, {other}}}"

    # ------------------------------------------------------------------------------------------ each token

    def _token(self) -> None:
        self._before_token()
        self._operands()
        for number, stage in enumerate(self.schedule.stages):
            self.values.steps(stage.steps)
            if number == 0:
                self._early_results()
            elif stage.reads:
                self._late_pass(stage.reads)
        for v in self.plan.program.outputs:
            self._output(v, self.values.name(v))
        self.rows.append_all()
        self._after_token()

    def _before_token(self) -> None:
        """The rows so far are those of all tokens before."""

    def _after_token(self) -> None:
        with self.out.block("if (t + 1 < call.tokens)"):
            for event in self.plan.program.events:
                self._push(event) if isinstance(event, Update) else self._fade(event.factor)

    def _early_results(self) -> None:
        for kind, reads in self.early.items():
            for n, read in enumerate(reads):
                place = f"room.y_{kind} + (t * {len(reads)} + {n}) * {FULL[read.out.kind]}"
                self.out.line(f"Real* const {self.values.name(read.out)} = {place};")
        if self.schedule.stages[0].reads:
            self.rows.add(self.schedule.stages[0].reads)

    def _late_pass(self, reads: Sequence[Old]) -> None:
        for r in reads:
            self.values.declare(r.out)
        self._read(reads, self.rows.faded_queries(reads))
        self.rows.add(reads)

    def _push(self, event: Update) -> None:
        """The update becomes a row for the tokens behind this one."""
        self.out.line("weight[rows] = 1;")
        sides: tuple[tuple[str, Var, Kind], ...] = (("left", event.left, "key"), ("right", event.right, "value"))
        for side, v, kind in sides:
            value = self.values.name(v) + ("" if v.kind == "scalar" else "[i]")
            self.values.each(kind, f"room.{side}_copy[rows * {FULL[kind]} + i] = {value};")
            self.out.line(f"{side}[rows] = room.{side}_copy + rows * {FULL[kind]};")
        self.out.line("++rows;")

    def _fade(self, v: Var) -> None:
        """A decay reaches the base and all rows so far; rows that an axis decays are copies."""
        name = self.values.name(v)
        if v.kind == "scalar":
            self.out.line(f"fade *= {name};")
            self.out.line(f"for (int64_t m = 0; m < rows; ++m) weight[m] *= {name};")
            return
        self.values.each(v.kind, f"{fade_name(v.kind)}[i] *= {name}[i];")
        side = "left" if v.kind == "key" else "right"
        with self.out.block("for (int64_t m = 0; m < rows; ++m)"):
            self.values.each(v.kind, f"room.{side}_copy[m * {FULL[v.kind]} + i] *= {name}[i];")
