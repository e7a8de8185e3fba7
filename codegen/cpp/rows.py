"""Owed rows in C++: gathering them from the log, folding them, adding them to reads, appending the token's own.

A log keeps each token's decays as they were; what is left of an old row is the product of all later decays. Walking
from the newest slot to the oldest keeps that product in `fade` (scalar decays), `fade_key` and `fade_value`, so
only products are formed and no slot that is not owed is ever loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum, auto

from kvbuffer_compile.codegen.cpp.log import axes, fade_name, owned, row_types, updates, uses_of
from kvbuffer_compile.codegen.cpp.values import FULL, Values
from kvbuffer_compile.codegen.schedule import Old, steps_for
from kvbuffer_compile.codegen.source import Source
from kvbuffer_compile.ir.plan import Plan
from kvbuffer_compile.ir.program import Decay, Kind, Update, Var

APPEND = "void append_shared(const Call& call, int64_t lane)"


class Place(Enum):
    """Where rows are gathered from: the log, the log for another time, what this item has kept of a tree's nodes."""

    log = auto()
    log_again = auto()
    room = auto()


class Rows:
    """Prints the parts of an item that deal with the log."""

    def __init__(self, out: Source, plan: Plan, values: Values) -> None:
        self.out, self.plan, self.values = out, plan, values
        self.fades: list[Kind] = sorted({op.factor.kind for op in plan.program.events if isinstance(op, Decay)})
        self.outer, self.inner = axes(plan)
        self.place = Place.log

    # ----------------------------------------------------------------------------------------- gathering

    def gather(self) -> None:
        """weight, left, right of every owed row, newest first; then, on a flush, the Fold of all of them."""
        self.out.line("static thread_local Room room;")
        self.out.line("Real* const weight = room.weight;")
        self.out.line("const Left** left = room.left;")
        self.out.line("const Right** right = room.right;")
        self.out.line("int64_t rows = 0;")
        self._fades(declare=True)
        with self.out.block("for (int64_t slot = count - 1; slot >= 0; --slot)"):
            self._slot()
        self._fold()

    def gather_path(self) -> None:
        """The same for the rows before node t of a tree: its ancestors in `room`, then the owed ones in the log."""
        self.out.line("rows = 0;")
        self._fades(declare=False)
        with self.out.block(
            "for (int64_t above = call.parent(sequence, t); above >= 0; above = call.parent(sequence, above))"
        ):
            self.place = Place.room
            self._slot()
        with self.out.block("for (int64_t slot = flush ? -1 : count - 1; slot >= 0; --slot)"):
            self.place = Place.log_again
            self._slot()
        self.place = Place.log

    def _slot(self) -> None:
        """The events of one token, newest first."""
        for event in reversed(self.plan.program.events):
            self.out.comment(f"{type(event).__name__.lower()} {', '.join(map(str, uses_of(event)))}")
            self._update(event) if isinstance(event, Update) else self._decay(event)

    def _fades(self, declare: bool) -> None:
        for kind in self.fades:
            name = fade_name(kind)
            if kind == "scalar":
                self.out.line(f"{'Real ' if declare else ''}fade = 1;")
            else:
                if declare:
                    self.values.array(name, kind)
                self.values.each(kind, f"{name}[i] = 1;")

    def _update(self, event: Update) -> None:
        self.out.line(f"weight[rows] = {'fade' if 'scalar' in self.fades else 'Real(1)'};")
        self._side("left", event.left, "key")
        self._side("right", event.right, "value")
        self.out.line("++rows;")

    def _side(self, side: str, v: Var, kind: Kind) -> None:
        """One side of a row: in place if it can be used as it is, else a copy in `room`."""
        copy = f"room.{side}_copy + rows * {FULL[kind]}"
        fade = f" * fade_{kind}[i]" if kind in self.fades else ""
        with self.out.block():
            if v.kind != "scalar" and not fade:
                if not self._in_place(kind, v):
                    self._ask_for_next(v)
                self.out.line(f"{side}[rows] = {self._stored(v, copy)};")
                return
            self.out.line(f"Real* const copy = {copy};")
            if v.kind == "scalar":
                self.out.line(f"const Real x = {self._stored_number(v)};")
                self.values.each(kind, f"copy[i] = x{fade};")
            else:
                self._ask_for_next(v)
                self.out.line(f"const Real* const x = {self._stored(v, 'copy')};")
                self.values.each(kind, f"copy[i] = x[i]{fade};")
            self.out.line(f"{side}[rows] = copy;")

    def _decay(self, event: Decay) -> None:
        v = event.factor
        if v.kind == "scalar":
            self.out.line(f"fade *= {self._stored_number(v)};")
            return
        with self.out.block():
            self._ask_for_next(v)
            self.values.array("copy", v.kind)
            self.out.line(f"const Real* const x = {self._stored(v, 'copy')};")
            self.values.each(v.kind, f"fade_{v.kind}[i] *= x[i];")

    def _ask_for_next(self, v: Var) -> None:
        """Rows that are copied: those of the next lane while this one's are. The others are asked for by add_rows."""
        if self.place is not Place.log:
            return
        row = f"call.row_{v}"
        self.out.line(f"ask_for({self._address(v)} + {row}.lane[AXES - 1], {row}.last, {self.values.length(v.kind)});")

    def _next(self, kind: Kind) -> str:
        """How far behind a row that is used in place lies that of the next lane; 0 where rows are copies, or none."""
        sides = [op.left if kind == "key" else op.right for op in updates(self.plan)]
        if not sides or not self._in_place(kind, sides[0]):
            return "0"
        return f"call.row_{sides[0]}.last == 1 ? call.row_{sides[0]}.lane[AXES - 1] : 0"

    def _in_place(self, kind: Kind, v: Var) -> bool:
        """Whether one side of a row is read where it is stored, and once."""
        types = dict(zip(("key", "value"), row_types(self.plan), strict=True))
        dtype = dict(zip(self.plan.program.logged, self.plan.row_dtypes, strict=True))[v]
        kept = types[kind] != "Real" or dtype == self.plan.compute
        return self.plan.variant == "buffered" and v.kind != "scalar" and kind not in self.fades and kept

    def _address(self, v: Var, slot: str = "slot") -> str:
        row = f"call.row_{v}"
        start = f" + first * {row}.last" if v.kind != "scalar" and v.kind == self.values.split else ""
        begin = f"call.row_begin_{v}[at[0]] + " if self.plan.slots else ""
        return f"static_cast<Row_{v}*>({row}.data) + {begin}{row}.at(at) + {slot} * {row}.slot{start}"

    def _stored(self, v: Var, room: str) -> str:
        if self.place is Place.room:
            return f"room.kept_{v} + above * {FULL[v.kind]}"
        return f"fetch({room}, {self._address(v)}, call.row_{v}.last, {self.values.length(v.kind)})"

    def _stored_number(self, v: Var) -> str:
        if self.place is Place.room:
            return f"room.kept_{v}[above]"
        return f"Real(widen(*({self._address(v)})))"

    # ------------------------------------------------------------------------------------------ folding

    def _fold(self) -> None:
        """On a flush all rows become one Fold, and from then on nothing is owed."""
        self.out.line("Fold fold;")
        if self.fades:
            self.values.array("keep_row", self.outer)
        if self.inner in self.fades:
            self.values.array("keep_column", self.inner)
        with self.out.block("if (flush)"):
            self._keep()
            self._pack()
            self.out.line("rows = 0;")
            self._fades(declare=False)

    def _keep(self) -> None:
        inner = self.inner
        parts = [fade_name(k) + ("" if k == "scalar" else "[i]") for k in self.fades if k != inner]
        if parts:
            self.values.each(self.outer, f"keep_row[i] = {' * '.join(parts)};")
            self.out.line("fold.keep_row = keep_row;")
        if inner in self.fades:
            self.values.each(inner, f"keep_column[i] = {fade_name(inner)}[i];")
            self.out.line("fold.keep_column = keep_column;")

    def _pack(self) -> None:
        outer, inner = FULL[self.outer], FULL[self.inner]
        with self.out.block("for (int64_t m = 0; m < rows; ++m)"):
            for kind, name in ((self.outer, "outer"), (self.inner, "inner")):
                side, length = "left" if kind == "key" else "right", self.values.length(kind)
                self.out.line(f"convert(room.{name} + m * {FULL[kind]}, {side}[m], 1, {length});")
            self.values.each(self.outer, f"room.outer[m * {outer} + i] *= weight[m];")
        self.out.line(f"fold.count = rows, fold.left = room.outer, fold.left_stride = {outer};")
        self.out.line(f"fold.right = room.inner, fold.right_stride = {inner};")

    # ------------------------------------------------------------------------------------------ reading

    def faded_queries(self, reads: Sequence[Old]) -> dict[Var, str]:
        """Queries times the owed decays of their own axis, for reads of the base."""
        names: dict[Var, str] = {}
        for x in dict.fromkeys(r.x for r in reads):
            if x.kind in self.fades:
                names[x] = f"{self.values.name(x)}_on_base"
                self.values.array(names[x], x.kind)
                self.values.each(x.kind, f"{names[x]}[i] = {self.values.name(x)}[i] * fade_{x.kind}[i];")
        return names

    def add(self, reads: Sequence[Old]) -> None:
        """What owed decays leave of the base's part, plus the owed rows' part."""
        orders: tuple[tuple[Kind, str, str], ...] = (("key", "left", "right"), ("value", "right", "left"))
        for kind, met, free in orders:
            group = [r for r in reads if r.x.kind == kind]
            if not group:
                continue
            out: Kind = group[0].out.kind
            parts = ["fade"] if "scalar" in self.fades else []
            parts += [f"fade_{out}[i]"] if out in self.fades else []
            if parts:
                self._scale([self.values.name(r.out) for r in group], out, " * ".join(parts))
            xs = ", ".join(self.values.name(r.x) for r in group)
            ys = ", ".join(self.values.name(r.out) for r in group)
            met_size, free_size = self.values.length(kind), self.values.length(out)
            self.out.line(
                f"read_rows<{len(group)}>(rows, weight, {met}, {met_size}, {free}, {free_size}, {{{xs}}}, {{{ys}}}, "
                f"{{{self._next(kind)}, {self._next(out)}}});"
            )

    def _scale(self, names: Sequence[str], kind: Kind, factor: str) -> None:
        with self.out.block(f"for (int64_t i = 0; i < {self.values.length(kind)}; ++i)"):
            for name in names:
                self.out.line(f"{name}[i] *= {factor};")

    # ---------------------------------------------------------------------------------------- appending

    def append_all(self) -> None:
        """Store the token's logged values in its slot. Rows that other items read wait until after a flush."""
        slot = "(to + t)" if self.values.token else "to"
        for v in self.plan.program.logged:
            tests = [] if owned(self.plan, v, self.values.split) else ["!flush", *self._first(v)]
            self._append(v, tests, slot)

    def _first(self, v: Var) -> list[str]:
        """Tests whether this item stands for all those that share the row."""
        lanes = enumerate(self.plan.program.lanes)
        tests = [f"at[{n}] == 0" for n, lane in lanes if lane not in v.lanes and not self._cursor_lane(n)]
        return tests + (["first == 0"] if self.values.split not in (None, v.kind) else [])

    def _cursor_lane(self, n: int) -> bool:
        return n == 0 and self.plan.layout.sequence

    def _append(self, v: Var, tests: list[str], slot: str) -> None:
        guard = f"if ({' && '.join(tests)}) " if tests else ""
        if v.kind == "scalar":
            self.out.line(f"{guard}*({self._address(v, slot)}) = narrow<Row_{v}>({self.values.name(v)});")
        else:
            self.out.line(
                f"{guard}store({self._address(v, slot)}, {self.values.name(v)}, call.row_{v}.last, "
                f"{self.values.length(v.kind)});"
            )

    def emit_append_shared(self) -> None:
        """`append_shared`: after a flush, once no item reads the old rows any more, the rows that items share."""
        shared = [v for v in self.plan.program.logged if not owned(self.plan, v, self.values.split)]
        self.out.comment("After a flush: the new rows that several items read the old ones of.")
        values = Values(self.out, None, self.values.token)
        rows = Rows(self.out, self.plan, values)
        with self.out.block(APPEND):
            self.out.line("int64_t at[AXES];")
            self.out.line("call.split_lane(lane, at);")
            sequence = "at[0]" if self.plan.layout.sequence else "0"
            self.out.line(f"if (!call.flushes({sequence})) return;")
            with self.out.block("for (int64_t t = 0; t < call.tokens; ++t)" if values.token else ""):
                steps = steps_for(self.plan.program, shared)
                values.load_for(self.plan.program.inputs, steps, shared)
                values.steps(steps)
                for v in shared:
                    rows._append(v, rows._first(v), "t" if values.token else "0")
