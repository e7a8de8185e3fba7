"""The function that computes one lane of a piece of a step, or one tile of it: printed from the Schedule."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kvbuffer_compile.codegen.cpp.log import axes
from kvbuffer_compile.codegen.cpp.rows import Rows
from kvbuffer_compile.codegen.cpp.shadow import Shadow
from kvbuffer_compile.codegen.cpp.values import FULL, Values
from kvbuffer_compile.codegen.cut import Piece
from kvbuffer_compile.codegen.schedule import Fold, Old
from kvbuffer_compile.codegen.source import Source
from kvbuffer_compile.ir.plan import Plan
from kvbuffer_compile.ir.program import Kind, Var

HEAD = "void run_item(const Call& call, int64_t lane, int64_t first, int64_t size)"


class Item:
    """Prints `run_item`. out: where to; the plan; which piece of its step."""

    def __init__(self, out: Source, plan: Plan, piece: Piece) -> None:
        self.out, self.plan, self.piece = out, plan, piece
        self.schedule = piece.schedule
        self.values = Values(out, self.schedule.split, token=plan.several)
        self.outer, self.inner = axes(plan)
        self.buffered = plan.variant != "recurrent"
        self.rows = Rows(out, plan, self.values)
        self.shadow = Shadow(out, plan, self.values)

    def emit(self) -> None:
        tile = f", {self.schedule.split}s [first, first + size)" if self.schedule.split else ""
        self.out.comment(f"One lane{tile}.")
        with self.out.block(HEAD):
            self.out.line("int64_t at[AXES];")
            self.out.line("call.split_lane(lane, at);")
            if self.buffered:
                self._sequence()
            self._operands()
            if self.piece.first or self._reads_anything():
                if self.buffered:
                    self.rows.gather()
                self._block()
                self._fold_alone()
            elif self.schedule.fold:
                self._block()
            for number, stage in enumerate(self.schedule.stages):
                self.values.steps(stage.steps)
                if stage.reads:
                    self._pass(number, stage.reads)
                    self._written(number)
            self._finish()

    def _sequence(self) -> None:
        sequence = "at[0]" if self.plan.layout.sequence else "0"
        self.out.line(f"const int64_t sequence = {sequence}, count = call.owed(sequence);")
        with self.out.block("if (count < 0)"):
            self._no_outputs()
            self.out.line("return;")
        self.out.line(f"const bool flush = {'call.flushes(sequence)' if self.piece.first else 'false'};")

    def _no_outputs(self) -> None:
        for v in self.piece.outputs:
            self._output(v, None)

    def _operands(self) -> None:
        nodes = (node for stage in self.schedule.stages for node in (*stage.steps, *stage.reads))
        self.values.load_for(self.piece.inputs, nodes, self._roots())

    def _roots(self) -> Iterable[Var]:
        fold = self.schedule.fold
        kept = fold.needs if fold else self.plan.program.logged if self.piece.last else ()
        return (*self.piece.outputs, *kept)

    def _reads_anything(self) -> bool:
        return any(stage.reads for stage in self.schedule.stages)

    def _block(self) -> None:
        offset = f" + first * call.state_{self.schedule.split}" if self.schedule.split else ""
        sizes = f"{self.values.length(self.outer)}, {self.values.length(self.inner)}"
        bare = "call.mark(3, sequence) != 0" if self.buffered else "false"
        self.out.line(
            f"Block<State> block{{call.state + call.state_at(at){offset}, call.state_{self.outer}, "
            f"call.state_{self.inner}, {sizes}, {bare}}};"
        )
        self.shadow.declare(self.piece.first)

    def _fold_alone(self) -> None:
        """A program without reads still has to flush."""
        if not self._reads_anything() and self.buffered:
            with self.out.block("if (flush)"):
                self._run("fold_then_read", (), "fold")
                self.shadow.make()

    # ------------------------------------------------------------------------------------------ passes

    def _pass(self, number: int, reads: Sequence[Old]) -> None:
        """All reads of a stage in one pass, then what the owed rows add to them."""
        self.out.comment("read " + ", ".join(f"{r.out} by {r.x}" for r in reads))
        for r in reads:
            self.values.declare(r.out)
        if not self.buffered:
            last = number == len(self.schedule.stages) - 2
            if last and self.schedule.fold and self.schedule.fold_stage <= number:
                self._fold_in_place(reads)
            else:
                self._run("read", reads, None, rest="first_half" if number == 0 else "ahead")
            return
        queries = self.rows.faded_queries(reads)
        if number == 0:
            with self.out.block("if (flush)"):
                self._run("fold_then_read", reads, "fold")
            with self.out.block("else"):
                self._read(reads, queries)
            self.shadow.make()
        else:
            self._read(reads, queries)
        self.rows.add(reads)

    def _read(self, reads: Sequence[Old], queries: dict[Var, str]) -> None:
        """One Pass that only reads, over what stands for the base."""
        results = [(self.values.name(r.out), "") for r in reads]
        self.shadow.read(results, lambda t, block: self._run("read", reads, None, queries, at=(t, block)))

    def _written(self, number: int) -> None:
        """After the first pass a flush has made the base, if there was none."""
        if self.buffered and number == 0 and len(self.schedule.stages) > 2:
            self.out.line("block.bare = block.bare && !flush;")

    def _run(
        self,
        mode: str,
        reads: Sequence[Old],
        fold: str | None,
        queries: dict[Var, str] | None = None,
        rest: str = "ahead",
        at: tuple[str, str] = ("State", "block"),
    ) -> None:
        """One Pass over a block, `at` its elements' type and its name. rest: the last arguments of the template, from
        Ask on."""

        def names(vs: Iterable[Var]) -> str:
            return ", ".join((queries or {}).get(v, self.values.name(v)) for v in vs)

        across = [r for r in reads if r.x.kind == self.outer]
        along = [r for r in reads if r.x.kind == self.inner]
        self.out.line(
            f"Pass<{at[0]}, Mode::{mode}, {len(across)}, {len(along)}, Ask::{rest}>{{{at[1]}, {fold or '{}'}, "
            f"{{{names(r.x for r in across)}}}, {{{names(r.out for r in across)}}}, "
            f"{{{names(r.x for r in along)}}}, {{{names(r.out for r in along)}}}}}.run();"
        )

    def _fold_in_place(self, reads: Sequence[Old]) -> None:
        """The state is read as it was, and written as the token leaves it."""
        fold = self.schedule.fold
        assert fold is not None
        self.out.comment("write the state")
        self.out.line("Fold fold;")
        self._keeps(fold)
        self._fold_rows(fold)
        again = bool(self.schedule.stages[0].reads) and not (reads and reads == self.schedule.stages[0].reads)
        self._run("read_then_fold", reads, "fold", rest=f"{'second_half' if again else 'ahead'}, {len(fold.rows)}")

    def _keeps(self, fold: Fold) -> None:
        factors: dict[Kind, Var | None] = {"key": fold.key, "value": fold.value}
        outer, inner = factors[self.outer], factors[self.inner]
        if fold.scalar or outer:
            parts = [self.values.name(fold.scalar)] if fold.scalar else []
            parts += [f"{self.values.name(outer)}[i]"] if outer else []
            self.values.array("keep_row", self.outer)
            self.values.each(self.outer, f"keep_row[i] = {' * '.join(parts)};")
            self.out.line("fold.keep_row = keep_row;")
        if inner:
            self.out.line(f"fold.keep_column = {self.values.name(inner)};")

    def _fold_rows(self, fold: Fold) -> None:
        if not fold.rows:
            return
        sides = [row if self.outer == "key" else row[::-1] for row in fold.rows]
        self.out.line(f"fold.count = {len(sides)};")
        for n, (side, kind) in enumerate((("left", self.outer), ("right", self.inner))):
            names = [self.values.name(pair[n]) for pair in sides]
            if len(names) == 1:
                self.out.line(f"fold.{side} = {names[0]};")
                continue
            full = FULL[kind]
            self.out.line(f"alignas(64) Real {side}[{len(names)} * {full}];")
            for m, name in enumerate(names):
                self.values.each(kind, f"{side}[{m} * {full} + i] = {name}[i];")
            self.out.line(f"fold.{side} = {side}, fold.{side}_stride = {full};")

    # --------------------------------------------------------------------------------------------- end

    def _finish(self) -> None:
        stages = self.schedule.stages
        if self.schedule.fold and self.schedule.fold_stage >= len(stages) - 1:
            self._fold_in_place(())
        for v in self.piece.outputs:
            self._output(v, self.values.name(v))
        if self.buffered and self.piece.last:
            self.out.line("const int64_t to = flush ? 0 : count;")
            self.rows.append_all()

    def _output(self, v: Var, name: str | None) -> None:
        """Store an output, or zeros. What does not run along the split axis is stored by the first tile."""
        guard = "if (first == 0) " if self.schedule.split and v.kind != self.schedule.split else ""
        place = "(lane * call.tokens + t)" if self.values.token else "lane"
        if v.kind == "scalar":
            self.out.line(f"{guard}call.out_{v}[{place}] = {name or 'Real(0)'};")
            return
        length, full = self.values.length(v.kind), FULL[v.kind]
        to = f"call.out_{v} + {place} * {full} + {self.values.start(v.kind)}"
        self.out.line(
            f"{guard}std::memcpy({to}, {name}, {length} * sizeof(Real));"
            if name
            else f"{guard}std::memset({to}, 0, {length} * sizeof(Real));"
        )
