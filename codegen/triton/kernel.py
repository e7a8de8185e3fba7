"""The Triton kernel of a plan: one program computes one lane of a step, or one tile of it.

recurrent   s is the tile of the state; read it, fold the token in, write it
buffered    s and the owed rows stand for the state (rows.py); on a flush they are written back as one. Where it can
            be, the state is streamed (stream.py)
verify      the same for T tokens, of which each sees those before it (verify.py), above it in a tree (tree.py), or none

What does not depend on the cursor is loaded before it, and all of the cursor at once: a program that waits for memory
three times in a row cannot stream.
"""

from __future__ import annotations

from contextlib import nullcontext

from kvbuffer_compile.codegen.schedule import Schedule, steps_for
from kvbuffer_compile.codegen.triton.arguments import arguments
from kvbuffer_compile.codegen.triton.drafts import Drafts
from kvbuffer_compile.codegen.triton.fold import Fold, fold_token, read_state
from kvbuffer_compile.codegen.triton.stream import Stream
from kvbuffer_compile.codegen.triton.tickets import Group, Pool, Tickets
from kvbuffer_compile.codegen.triton.tiles.rows import Rows
from kvbuffer_compile.codegen.triton.tiles.values import Python, Values
from kvbuffer_compile.codegen.triton.tree import Branches
from kvbuffer_compile.codegen.triton.verify import Fresh
from kvbuffer_compile.ir.plan import Plan
from kvbuffer_compile.ir.program import Var


class Kernel:
    """Prints the kernel `step`. part: elements of the contracted axis at a time where the state is streamed, else 0."""

    def __init__(self, out: Python, plan: Plan, schedule: Schedule, values: Values, part: int) -> None:
        self.out, self.plan, self.schedule, self.values = out, plan, schedule, values
        self.rows = Rows(out, plan, values)
        self.tickets = Tickets(plan, values)
        self.pool = Pool(out, plan, self.tickets)
        self.fold = Fold(out, plan, values, self.rows)
        self.shadow = self.fold.shadow
        self.verify = plan.several
        self.part = part
        self.stream = Stream(out, plan, schedule, values, self.rows, part) if part and not self.verify else None

    def emit(self) -> None:
        if self.plan.variant != "recurrent" and not self.part:
            self.fold.define()
            self.out.line()
            self.out.line()
        self.out.line("@triton.jit")
        self.out.line("def step(")
        for a in arguments(self.plan, self.values.split, self.part > 0):
            self.out.line(f"    {a.name}{': tl.constexpr' if a.constant else ''},")
        with self.out.block(")"):
            self.pool.place()
            self.values.axes()
            if self.plan.variant == "recurrent":
                self._recurrent()
            elif self.stream:
                self._streamed(self.stream)
            elif self.part:
                self._drafted(Drafts(self.out, self.plan, self.schedule, self.values, self.rows, self.part))
            else:
                self._logged()

    # ---------------------------------------------------------------------------------------------- parts

    def _state_address(self) -> None:
        if self.plan.program.lanes:
            self.out.line(f"state += {self.values.offset('state')}")

    def _operands(self) -> list[Var]:
        """The inputs that the outputs, the logged values or the fold of a token need."""
        roots = {*self.plan.program.outputs, *(self.schedule.fold.needs if self.schedule.fold else ())}
        roots.update(self.plan.program.logged if self.plan.variant != "recurrent" else ())
        nodes = [n for stage in self.schedule.stages for n in (*stage.steps, *stage.reads)]
        return self.values.operands(nodes, roots)

    def _outputs(self, zero: bool) -> None:
        """Store the outputs. What does not run along the tiles is stored by the first one."""
        row = "(lane * T + t)" if self.verify else "lane"
        split = self.values.split
        for n, v in enumerate(self.plan.program.outputs):
            vector = v.kind != "scalar"
            first = "(tl.full([1], tile, tl.int32) == 0)" if vector else "tile == 0"
            guard = [] if split in (None, v.kind) else [first]
            at = f"out_{n} + {row}" + (f" * {self.values.size(v.kind)} + {v.kind}" if vector else "")
            mask = self.values.mask(*guard, *([v.kind] if vector else []))
            value = self.values.full(v.kind, "0.0") if zero else self.values.name(v)
            self.out.line(f"tl.store({at}, {value}{mask})")

    # ------------------------------------------------------------------------------------------ recurrent

    def _recurrent(self) -> None:
        assert self.schedule.fold is not None
        self._state_address()
        self.out.line(f"s = {self.values.load_state()}")
        self.values.load(self._operands())
        self.pool.compare()
        for stage in self.schedule.stages:
            self.values.steps(stage.steps)
            for read in stage.reads:
                read_state(self.out, self.values, read)
        self._outputs(zero=False)
        with self.pool.storing():
            fold_token(self.out, self.values, self.schedule.fold)
            self.pool.wait(reset=True)
            self.values.store_state()
        self.pool.leave()

    # -------------------------------------------------------------------------------------------- streamed

    def _streamed(self, stream: Stream) -> None:
        self.values.load(self._operands())
        self._cursor()
        self.pool.wait("flush")
        stream.read()
        self._arrive()
        for stage in self.schedule.stages[1:]:
            self.values.steps(stage.steps)
        self._outputs(zero=False)
        self._store_owned("kept")
        self._finish_all()

    def _drafted(self, drafts: Drafts) -> None:
        drafts.give(self._operands())
        self._cursor()
        drafts.read()
        self._arrive()
        with self.out.block("if DRAFTS"):
            drafts.tokens(self._store_token)
        with self.out.block("else"):
            self._tokens(drafts.fresh)
        self._finish_all()

    # ------------------------------------------------------------------------------- buffered and verify

    def _logged(self) -> None:
        """Rows first, then the state: the one's registers are free when the other comes."""
        kind = Branches if self.plan.variant == "tree" else Fresh
        fresh = kind(self.out, self.plan, self.schedule, self.values, self.rows) if self.verify else None
        fresh.ask() if fresh else self.values.load(self._operands())
        self._cursor()
        self._flush()
        fresh.read_ahead() if fresh else self._before_state()
        with fresh.unless_matrix() if fresh else nullcontext():
            if (tile := self.shadow.load("s")) != "s":
                self.out.line(f"s = {tile}")
        self._arrive()
        self.out.line()
        self._tokens(fresh) if fresh else self._token()
        self._finish_all()

    def _before_state(self) -> None:
        """What the owed rows add to the reads whose queries are known."""
        first = self.schedule.stages[0]
        self.values.steps(first.steps)
        for read in first.reads:
            self.out.line(f"{self.values.name(read.out)} = {self.values.full(read.out.kind, '0.0')}")

        def add() -> None:
            for read in first.reads:
                self.rows.add_rows(self.values.name(read.out), read, self.values.name(read.x))

        self.rows.through(add)

    def _cursor(self) -> None:
        if not self.pool.there:
            first = f"at_{self.plan.program.lanes[0]}" if self.plan.layout.sequence else "0"
            self.out.line(f"sequence = {first}")
        self.out.line("cursor += sequence * cursor_sequence")
        self.out.line("owed = tl.load(cursor)")
        self.out.line("limit = tl.load(cursor + cursor_row)")
        self.out.line("live = tl.full([1, 1], tl.load(cursor + 3 * cursor_row), tl.int32) == 0  # else s is zero")
        self.pool.compare()
        with self.out.block("if owed < 0"):
            self._padding()
            self.out.line("return")
        tokens = "T" if self.verify else "1"
        full = f"(owed >= limit) | (owed + {tokens} > {self.plan.capacity})"
        self.out.line(f"flush = {self.pool.writers(full)}")
        self._state_address()
        self.out.line("kept = owed")

    def _padding(self) -> None:
        """A padding sequence: outputs are zero, nothing else is touched but the count of steps."""
        first = " & ".join(f"({x} == 0)" for x in [*(f"at_{lane}" for lane in self.tickets.lanes), "tile"])
        with self.out.block(f"if {self.pool.writers(first)}"):
            self._count_step()
        if self.verify and self.plan.program.outputs:
            with self.out.block("for t in range(T)"):
                self._outputs(zero=True)
        else:
            self._outputs(zero=True)

    def _count_step(self) -> None:
        self.out.line("tl.store(cursor + 2 * cursor_row, tl.load(cursor + 2 * cursor_row) + 1)")

    def _flush(self) -> None:
        if self.shadow.there:
            self.shadow.find()
        self.pool.wait("flush | lacks" if self.shadow.there else "flush")
        with self.out.block("if flush | lacks" if self.shadow.there else "if flush"):
            if self.shadow.there:
                self.out.line("folded = tl.where(flush, owed, 0)")
            self.fold.call()
            self.out.line("tl.debug_barrier()")
            self.out.line("kept = owed - folded" if self.shadow.there else "kept = 0")
            self.out.line("live = tl.full([1, 1], 1, tl.int1)")

    def _token(self) -> None:
        first, *rest = self.schedule.stages
        for read in first.reads:
            self.rows.add_base(read, self.values.name(read.x))
        for stage in rest:
            self.values.steps(stage.steps)
            for read in stage.reads:
                self.rows.read(read, self.values.name(read.x))
        self._outputs(zero=False)
        self._store_owned("kept")

    def _tokens(self, fresh: Fresh) -> None:
        fresh.start()
        used = self._operands()
        self.values.load_first(used)
        with self.out.block("for t in range(T)"):
            self.values.load_next(used)
            fresh.meet()
            for stage in self.schedule.stages:
                self.values.steps(stage.steps)
                for read in stage.reads:
                    fresh.read(read)
            self._store_token()
            fresh.append()

    def _store_token(self) -> None:
        self._outputs(zero=False)
        self._store_owned("(kept + t)")

    # ------------------------------------------------------------------------------------------------ end

    def _store_owned(self, slot: str) -> None:
        """Rows that no other program reads. All threads of this one have: they have met in `arrive`."""
        owned = [v for v in self.plan.program.logged if self.tickets.owned(v)]
        with self.pool.storing() if owned else nullcontext():
            for v in owned:
                self.rows.store(v, slot)

    def _arrive(self) -> None:
        """All that others may overwrite has been read."""
        for group in self.tickets.fed_by(None):
            ticket = f"{self.tickets.ticket(group)}, {self.tickets.expected(group)}"
            if self.pool.there:
                self.out.line(f"last{_suffix(group)} = earlier < 0")
            with self.pool.storing():
                self.out.line(f"last{_suffix(group)} = arrive({ticket})")

    def _finish_all(self) -> None:
        self.out.line()
        for group in self.tickets.fed_by(None):
            with self.out.block(f"if last{_suffix(group)}"):
                self._finish(group)
        self.pool.leave()

    def _finish(self, group: Group) -> None:
        """What the last program of a group writes, and the ticket it takes of the next larger one."""
        self._store_shared(group)
        for larger in self.tickets.fed_by(group):
            with self.out.block(f"if arrive({self.tickets.ticket(larger)}, {self.tickets.expected(larger)})"):
                self._finish(larger)
        if not group.lanes:
            self._advance()

    def _store_shared(self, group: Group) -> None:
        if not self.verify or not group.shared:
            for v in group.shared:
                self.rows.store(v, "kept")
            return
        with self.out.block("for t in range(T)"):
            steps = steps_for(self.plan.program, group.shared)
            self.values.load(self.values.operands(steps, group.shared))
            self.values.steps(steps)
            for v in group.shared:
                self.rows.store(v, "(kept + t)")

    def _advance(self) -> None:
        self.pool.wait(reset=True)
        added = {"buffered": " + 1", "tree": ""}.get(self.plan.variant, " + T")
        self.out.line(f"tl.store(cursor, kept{added})")
        self._count_step()
        with self.out.block("if flush"):
            self.out.line(f"tl.store(cursor + cursor_row, {self.plan.flush})")
            self.out.line("tl.store(cursor + 3 * cursor_row, 0)")


def _suffix(group: Group) -> str:
    return "".join(f"_{lane}" for lane in group.lanes)
