"""The Triton kernel of a plan: one program computes one lane of a step, or one tile of it.

recurrent   s is the tile of the state; read it, fold the token in, write it
buffered    s and the owed rows stand for the state (triton_rows); on a flush the rows go into s first
verify      the same for T tokens in a loop; the rows that these tokens add are held in registers
"""

from __future__ import annotations

from collections.abc import Iterable

from kvbuffer_compile.codegen.schedule import Fold, Old, Schedule, Step, steps_for, uses
from kvbuffer_compile.codegen.triton_arguments import arguments
from kvbuffer_compile.codegen.triton_rows import Rows
from kvbuffer_compile.codegen.triton_tickets import Group, Tickets
from kvbuffer_compile.codegen.triton_values import DTYPES, Python, Values
from kvbuffer_compile.ir import Kind, Var
from kvbuffer_compile.plan import Plan


class Kernel:
    """Prints the kernel `step`."""

    def __init__(self, out: Python, plan: Plan, schedule: Schedule, values: Values) -> None:
        self.out, self.plan, self.schedule, self.values = out, plan, schedule, values
        self.rows = Rows(out, plan, values)
        self.tickets = Tickets(plan, values)
        self.logs = plan.variant != "recurrent"
        self.verify = plan.variant == "verify"
        self.reads = any(stage.reads for stage in schedule.stages)

    def emit(self) -> None:
        self.out.line("@triton.jit")
        self.out.line("def step(")
        for a in arguments(self.plan, self.values.split):
            self.out.line(f"    {a.name}{': tl.constexpr' if a.constant else ''},")
        with self.out.block(")"):
            self._place()
            self.values.axes()
            if self.logs:
                self._cursor()
            self._load_state()
            if self.logs:
                self._flush()
                self._owe()
            self._tokens() if self.verify else self._token()
            if self.logs:
                self.out.line()
                self.out.comment("Whoever has come last writes what others may still have been reading.")
                self._arrive(None)

    # -------------------------------------------------------------------------------------------- start

    def _place(self) -> None:
        """at_<lane>, lane (all lanes as one number) and tile: what this program is about."""
        self.out.line("program = tl.program_id(0)")
        self.out.line("tile = program % TILES")
        self.out.line("lane = (program // TILES).to(tl.int64)")
        rest = "lane"
        for name in reversed(self.plan.program.lanes[1:]):
            self.out.line(f"at_{name} = {rest} % size_{name}")
            rest = f"{rest} // size_{name}"
        if self.plan.program.lanes:
            self.out.line(f"at_{self.plan.program.lanes[0]} = {rest}")

    def _cursor(self) -> None:
        first = f"at_{self.plan.program.lanes[0]}" if self.plan.layout.sequence else "0"
        self.out.line(f"sequence = {first}")
        self.out.line("cursor += sequence * cursor_sequence")
        self.out.line("owed = tl.load(cursor)")
        with self.out.block("if owed < 0"):
            self._padding()
            self.out.line("return")
        tokens = "T" if self.verify else "1"
        self.out.line(f"flush = (owed >= tl.load(cursor + cursor_row)) | (owed + {tokens} > {self.plan.capacity})")

    def _padding(self) -> None:
        """A padding sequence: outputs are zero, nothing else is touched but the count of steps."""
        first = " & ".join(f"({x} == 0)" for x in [*(f"at_{lane}" for lane in self.tickets.lanes), "tile"])
        with self.out.block(f"if {first}"):
            self.out.line("tl.store(cursor + 2 * cursor_row, tl.load(cursor + 2 * cursor_row) + 1)")
        if self.verify and self.plan.program.outputs:
            with self.out.block("for t in range(T)"):
                self._outputs(zero=True)
        else:
            self._outputs(zero=True)

    def _load_state(self) -> None:
        at = [f"at_{lane} * state_{lane}" for lane in self.plan.program.lanes]
        at += ["key[:, None] * STATE_KEY", "value[None, :] * STATE_VALUE"]
        self.out.line(f"state += {' + '.join(at)}")
        live = None
        if self.logs:
            self.out.line("live = tl.full([1, 1], tl.load(cursor + 3 * cursor_row), tl.int32) == 0  # else s is zero")
            live = "live"
        if not self.reads and self.logs:
            live = "live & tl.full([1, 1], flush, tl.int1)"
        mask = self.values.tile_mask(live=live)
        self.out.line(f"s = tl.load(state{mask}{', other=0.0' if mask else ''}).to({self.values.real})")

    def _store_state(self) -> None:
        self.out.line(f"tl.store(state, s.to({DTYPES[self.plan.state_dtype]}){self.values.tile_mask()})")

    def _flush(self) -> None:
        self.out.line("kept = owed")
        with self.out.block("if flush"):
            self.rows.fold()
            self._store_state()
            if self.plan.state_dtype != self.plan.compute:
                self.out.line(f"s = s.to({DTYPES[self.plan.state_dtype]}).to({self.values.real})")
            self.out.line("kept = 0")
            self.out.line("tl.debug_barrier()  # rows of this program's own are read before they are overwritten")

    def _owe(self) -> None:
        self.out.line("to = kept  # the first new slot")
        if self.reads:
            self.rows.condense()

    # -------------------------------------------------------------------------------------------- tokens

    def _token(self) -> None:
        """One token: read, then log it or fold it in."""
        self.out.line()
        self._loads()
        for stage in self.schedule.stages:
            self.values.steps(stage.steps)
            for read in stage.reads:
                self._read(read)
        self._outputs(zero=False)
        if self.logs:
            self._store_owned("to")
        elif self.schedule.fold:
            self._fold_in_place(self.schedule.fold)

    def _read(self, read: Old) -> None:
        if self.logs:
            self.rows.read(read, self.values.name(read.x))
            return
        x = read.x
        text = f"s * {self.values.name(x)}{self.values.across(x.kind)}"
        total = self.values.total(text, x.kind, 0 if x.kind == "key" else 1, 2)
        self.out.line(f"{self.values.name(read.out)} = {total}")

    def _fold_in_place(self, fold: Fold) -> None:
        for kind, v in (("scalar", fold.scalar), ("key", fold.key), ("value", fold.value)):
            if v:
                self.out.line(f"s = s * {self.values.name(v)}{'' if kind == 'scalar' else self.values.across(v.kind)}")
        for left, right in fold.rows:
            self.out.line(f"s += {self.values.name(left)}[:, None] * {self.values.name(right)}[None, :]")
        self._store_state()

    def _tokens(self) -> None:
        """T tokens. Each reads the state as it was at the start of the step, through what is left of it (new_<kind>),
        and the rows of the tokens before it (fresh_left_n, fresh_right_n, decayed as they go)."""
        fold = self.schedule.fold
        assert fold is not None
        self._fresh(fold)
        with self.out.block("for t in range(T)"):
            self._loads()
            for stage in self.schedule.stages:
                self.values.steps(stage.steps)
                for read in stage.reads:
                    self._read_ahead(read, fold)
            self._outputs(zero=False)
            self._store_owned("(to + t)")
            self._append(fold)

    def _fresh(self, fold: Fold) -> None:
        self.out.line()
        self.out.line("token = tl.arange(0, TOKENS)")
        for kind, v in _factors(fold):
            if v:
                self.out.line(f"new_{kind} = {self.values.full(kind, '1.0')}")
        for n, _ in enumerate(fold.rows):
            self.out.line(f"fresh_left_{n} = tl.zeros([TOKENS, {self.values.length('key')}], {self.values.real})")
            self.out.line(f"fresh_right_{n} = tl.zeros([TOKENS, {self.values.length('value')}], {self.values.real})")

    def _read_ahead(self, read: Old, fold: Fold) -> None:
        factors = dict(_factors(fold))
        query = self.values.name(read.x)
        if factors[read.x.kind]:
            query = f"query_{read.out}"
            self.out.line(f"{query} = {self.values.name(read.x)} * new_{read.x.kind}")
        self.rows.read(read, query)
        gates: list[Kind] = ["scalar", read.out.kind]
        for kind in gates:
            if factors[kind]:
                self.out.line(f"{self.values.name(read.out)} *= new_{kind}")
        self.rows.read_fresh(read, self.values.name(read.x))

    def _append(self, fold: Fold) -> None:
        """What the token leaves of everything older, and its own rows beside the other new ones."""
        name = self.values.name
        for kind, v in _factors(fold):
            if v:
                self.out.line(f"new_{kind} = new_{kind} * {name(v)}")
        for n, (left, right) in enumerate(fold.rows):
            gates = [name(fold.scalar)] if fold.scalar else []
            gates += [f"{name(fold.key)}[None, :]"] if fold.key else []
            self._insert(f"fresh_left_{n}", gates, name(left))
            self._insert(f"fresh_right_{n}", [f"{name(fold.value)}[None, :]"] if fold.value else [], name(right))

    def _insert(self, tile: str, gates: list[str], row: str) -> None:
        self.out.line(f"{tile} = tl.where((token == t)[:, None], {row}[None, :], {' * '.join([tile, *gates])})")

    # ----------------------------------------------------------------------------------------------- end

    def _loads(self) -> None:
        roots = {*self.plan.program.outputs, *(self.schedule.fold.needs if self.schedule.fold else ())}
        roots.update(self.plan.program.logged if self.logs else ())
        nodes = [n for stage in self.schedule.stages for n in (*stage.steps, *stage.reads)]
        self._load_for(nodes, roots)

    def _load_for(self, nodes: Iterable[Step | Old], roots: set[Var]) -> None:
        used = roots | {v for node in nodes for v in uses(node)}
        for v in self.plan.program.inputs:
            if v in used:
                self.values.load(v)

    def _outputs(self, zero: bool) -> None:
        """Store the outputs. What does not run along the tiles is stored by the first one."""
        row = "(lane * T + t)" if self.verify else "lane"
        for n, v in enumerate(self.plan.program.outputs):
            split = self.values.split
            vector = v.kind != "scalar"
            first = "(tl.full([1], tile, tl.int32) == 0)" if vector else "tile == 0"
            guard = [] if split in (None, v.kind) else [first]
            at = f"out_{n} + {row}" + (f" * {self.values.size(v.kind)} + {v.kind}" if vector else "")
            mask = self.values.mask(*guard, *([v.kind] if vector else []))
            value = self.values.full(v.kind, "0.0") if zero else self.values.name(v)
            self.out.line(f"tl.store({at}, {value}{mask})")

    def _store_owned(self, slot: str) -> None:
        for v in self.plan.program.logged:
            if self.tickets.owned(v):
                self.rows.store(v, slot)

    def _arrive(self, after: Group | None) -> None:
        """Take the tickets of the groups that come next, and write what the last program of each has to."""
        for group in self.tickets.fed_by(after):
            with self.out.block(f"if arrive({self.tickets.ticket(group)}, {self.tickets.expected(group)})"):
                self._store_shared(group)
                self._arrive(group)
                if not group.lanes:
                    self._advance()

    def _store_shared(self, group: Group) -> None:
        if not self.verify or not group.shared:
            for v in group.shared:
                self.rows.store(v, "to")
            return
        with self.out.block("for t in range(T)"):
            steps = steps_for(self.plan.program, group.shared)
            self._load_for(steps, set(group.shared))
            self.values.steps(steps)
            for v in group.shared:
                self.rows.store(v, "(to + t)")

    def _advance(self) -> None:
        self.out.line(f"tl.store(cursor, to + {'T' if self.verify else '1'})")
        self.out.line("tl.store(cursor + 2 * cursor_row, tl.load(cursor + 2 * cursor_row) + 1)")
        with self.out.block("if flush"):
            self.out.line(f"tl.store(cursor + cursor_row, {self.plan.flush})")
            self.out.line("tl.store(cursor + 3 * cursor_row, 0)")


def _factors(fold: Fold) -> list[tuple[Kind, Var | None]]:
    return [("scalar", fold.scalar), ("key", fold.key), ("value", fold.value)]
