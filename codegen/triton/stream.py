"""A buffered step that streams the state: all reads of a token in one pass, part by part along the axis they
contract.

A program takes a whole head, or a wide tile of the axis that reads leave free. Triton's pipeline keeps the next parts
on their way through shared memory whatever the program waits for, so the state costs no registers, and what is done
with rows is done once a head. A step that flushes takes a branch of its own:

    steady   base = sum over parts of s query; met_n = query with the owed rows of update n
             out  = base faded + sum over slots of met_n free_n
    flush    s = s faded + met_n^T free_n, one product of matrices a part, stored; out = sum over parts of s query

met_n is the side of the rows that runs along the contracted axis, free_n the other one. Sums are kept as tiles and
reduced once. Rows are asked for before the state and used behind it, but for gates along the contracted axis, which
fade the queries: those are spread over the parts from registers (tl.gather). A part's rows beside each part of the
state instead took twice the instructions, as a tile of 16 by 16 has work for only one of four warps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from kvbuffer_compile.codegen.schedule import Old, Schedule
from kvbuffer_compile.codegen.triton.tiles.matrix import needed, read_axis
from kvbuffer_compile.codegen.triton.tiles.rows import SLOT, Rows
from kvbuffer_compile.codegen.triton.tiles.values import DTYPES, Python, Values
from kvbuffer_compile.ir.plan import Plan
from kvbuffer_compile.ir.program import Kind

SLOTS = 64  # owed rows that a program can hold


def streams(plan: Plan, schedule: Schedule) -> bool:
    """Whether a step can be streamed: buffered, no shadow to make, and all reads contract one axis at once."""
    fits = plan.compute.itemsize == 4 and plan.capacity <= SLOTS
    return plan.variant == "buffered" and fits and not plan.shadowed and read_axis(schedule) is not None


class Stream:
    """Prints the reads of a schedule for which `streams` holds. part: elements of the contracted axis at a time."""

    def __init__(self, out: Python, plan: Plan, schedule: Schedule, values: Values, rows: Rows, part: int) -> None:
        kind = read_axis(schedule)
        assert kind
        self.out, self.plan, self.values, self.rows, self.part = out, plan, values, rows, part
        self.kind: Kind = kind
        self.other: Kind = "value" if kind == "key" else "key"
        self.met, self.free = ("left", "right") if kind == "key" else ("right", "left")
        self.axis = 0 if kind == "key" else 1
        first = schedule.stages[0]
        self.reads = first.reads
        self.queries = needed(first.steps, [r.x for r in first.reads])
        self.before = needed(first.steps, [s.out for s in self.queries if s.out.kind == "scalar"])
        self.after = [s for s in first.steps if s not in self.before]
        self.updates = range(len(rows.updates))
        self.gated = kind in rows.fades
        # Whether a part of the state and a tile of rows have one shape: then they are summed as one.
        self.alike = kind == "key" and part == rows.all_slots and len(self.updates) > 0

    def read(self) -> None:
        """All reads of the token, and the steps before the next stage. `kept` rows are owed afterwards."""
        self.values.steps(self.before)
        with self.out.block("if flush"):
            self._flush()
            self.out.line("kept = 0")
        with self.out.block("else"):
            self._steady()
        self.values.steps(self.after)

    # ------------------------------------------------------------------------------------------- the branches

    def _steady(self) -> None:
        queries = [s for s in self.queries if s not in self.before]
        if self.gated:
            self._rows("scalar", self.kind)
            self.values.steps(queries)
            for read in self.reads:
                self.out.line(f"asked_{read.out} = {self._query(read)} * fade_{self.kind}")
            late = self._rows(self.other, ahead=True)
        else:
            late = self._rows("scalar", "key", "value", ahead=True)
        with self._parts("STAGES", loaded=not self.gated):
            self.out.line(f"s = {self.values.load_state('live', 'EVICT')}")
            index = f"{self.values.index[self.kind]}.to(tl.int32)"
            self._add("s", f"tl.gather(asked_{{}}, {index}, 0)" if self.gated else "")
        self.out.lines("\n".join(late))
        if not self.gated:
            self.values.steps(queries)
        for name, tile in self._products():
            self.out.line(f"{name} = {tile}")
        self._sum([name for name, _ in self._products()], 1)
        gates: list[Kind] = ["scalar", self.other]
        fades = "".join(f" * fade_{k}" for k in gates if k in self.rows.fades)
        if not self.alike:
            self._sum(self._bases(), self.axis)
            self._add_rows()
        for read, base in zip(self.reads, self._bases(), strict=True):
            across = self.values.across(self.other)
            faded = fades.replace(f"fade_{self.other}", f"fade_{self.other}{across}") if self.alike else fades
            rows = f" + {self._rows_tile(read)}" if self.alike else f" + sum_{read.out}" if self.updates else ""
            self.out.line(f"{base} = {base}{faded}{rows}")
        if self.alike:
            self._sum(self._bases(), self.axis)
        self._name_results()

    def _rows_tile(self, read: Old) -> str:
        """What each owed row adds to a read, a tile [slots, free axis] to be summed."""
        return " + ".join(f"({met}{self._weight(n)})[:, None] * {self.free}_{n}" for n, met in self._met(read))

    def _add_rows(self) -> None:
        """sum_<out>: what the owed rows add to each read."""
        if self.updates:
            for read in self.reads:
                self.out.line(f"sum_{read.out} = {self._rows_tile(read)}")
            self._sum([f"sum_{r.out}" for r in self.reads], 0)

    def _name_results(self) -> None:
        for read, base in zip(self.reads, self._bases(), strict=True):
            self.out.line(f"{self.values.name(read.out)} = {base}")

    def _flush(self) -> None:
        self._rows("scalar", self.other)
        for n in self.updates:
            if weight := self._weight(n):
                self.out.line(f"{self.free}_{n} = {self.free}_{n} * ({weight.removeprefix(' * ')})[:, None]")
        dtype, real = DTYPES[self.plan.state_dtype], self.values.real
        with self._parts("1", loaded=True):
            self._rows(self.kind)
            fades = [f" * fade_{k}{'' if k == 'scalar' else self.values.across(k)}" for k in self.rows.fades]
            self.out.line(f"s = {self.values.load_state('live', 'EVICT')}{''.join(fades)}")
            for n in self.updates:
                self.out.line(f"s = tl.dot(tl.trans(left_{n}), right_{n}, s, input_precision=PRECISION)")
            self.values.store_state()
            self._add("s" if dtype == real else f"s.to({dtype}).to({real})")
        self._sum(self._bases(), self.axis)
        self._name_results()

    # ------------------------------------------------------------------------------------------------- parts

    @contextmanager
    def _parts(self, stages: str, loaded: bool) -> Iterator[None]:
        """The loop over parts of the contracted axis, behind the sums that it fills. loaded: queries are loaded."""
        size = self.values.size(self.kind)
        with self.values.part(self.kind, self.part):
            tile = f"[{self.values.length('key')}, {self.values.length('value')}]"
            for base in self._bases():
                self.out.line(f"{base} = tl.zeros({tile}, {self.values.real})")
            with self.out.block(f"for start in tl.range(0, {size}, {self.part}, num_stages={stages})"):
                index = self.values.index[self.kind]
                self.out.line(f"{index} = (start + tl.arange(0, {self.part})).to(tl.int64)")
                if self.values.padded(self.kind):
                    self.out.line(f"{index}_ok = {index} < {size}")
                if loaded:
                    self._load_queries()
                yield

    def _load_queries(self) -> None:
        """The part of each query, from operands."""
        steps = [s for s in self.queries if s.out.kind == self.kind]
        used = self.values.operands(steps, [r.x for r in self.reads])
        self.values.load(v for v in used if v.kind == self.kind)
        self.values.steps(steps)

    def _query(self, read: Old) -> str:
        """A query, or its part, with zeros beyond the axis."""
        name = self.values.name(read.x)
        return f"tl.where({self.values.ok(self.kind)}, {name}, 0.0)" if self.values.padded(self.kind) else name

    def _add(self, tile: str, query: str = "") -> None:
        """Add what a part of the state gives to every read. query: another text for it, with a place for the read."""
        across = self.values.across(self.kind)
        for read, base in zip(self.reads, self._bases(), strict=True):
            self.out.line(f"{base} += {tile} * {query.format(read.out) or self._query(read)}{across}")

    def _bases(self) -> list[str]:
        return [f"base_{r.out}" for r in self.reads]

    # -------------------------------------------------------------------------------------------------- rows

    def _rows(self, *kinds: Kind, ahead: bool = False) -> list[str]:
        return self.rows.at_once(kinds, SLOT, ahead)

    def _met(self, read: Old) -> list[tuple[int, str]]:
        return [(n, f"met_{n}_{read.out}") for n in self.updates]

    def _products(self) -> list[tuple[str, str]]:
        """met_<n>_<out> and the tile [slots, axis] that it sums up."""
        return [
            (met, f"{self.met}_{n} * {self._query(read)}[None, :]") for read in self.reads for n, met in self._met(read)
        ]

    def _weight(self, n: int) -> str:
        """What scalar gates leave of rows, as a factor of a number for each slot."""
        return f" * weight_{n}" if "scalar" in self.rows.fades else ""

    def _sum(self, names: Sequence[str], axis: int) -> None:
        """Replace tiles by their sums over an axis, two in one reduction: warps wait for each other once."""
        for pair in (names[n : n + 2] for n in range(0, len(names), 2)):
            if len(pair) == 1:
                self.out.line(f"{pair[0]} = tl.sum({pair[0]}, {axis})")
            else:
                self.out.line(f"{pair[0]}, {pair[1]} = tl.split(tl.sum(tl.join({pair[0]}, {pair[1]}), {axis}))")
