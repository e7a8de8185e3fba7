"""A buffered step that streams the state: all reads of a token in one pass, part by part along the axis they contract.

A program takes a whole head, or a wide tile of the axis that reads leave free. Triton's pipeline keeps the next parts on
their way through shared memory whatever the program waits for, so the state costs no registers, and what is done with
rows is done once a head. A step that flushes takes a branch of its own:

    steady   base = sum over parts of s query; met_n = query with the owed rows of update n
             out  = base faded + sum over slots of met_n free_n
    flush    s = s faded + met_n^T free_n, one product of matrices a part, stored; out = sum over parts of s query

met_n is the side of the rows that runs along the contracted axis, free_n the other one. Sums are kept as tiles and
reduced once. Only where a gate runs along the contracted axis are rows taken part by part as well, each beside the part
of the state that it fades; else once, asked for before the state and used behind it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from kvbuffer_compile.codegen.schedule import Old, Schedule
from kvbuffer_compile.codegen.triton.matrix import needed, read_axis
from kvbuffer_compile.codegen.triton.rows import Rows
from kvbuffer_compile.codegen.triton.values import DTYPES, Python, Values
from kvbuffer_compile.ir.plan import Plan
from kvbuffer_compile.ir.program import Kind

SLOTS = 64  # owed rows that a program can hold


def streams(plan: Plan, schedule: Schedule) -> bool:
    """Whether a step can be streamed: buffered, no shadow to make, and all reads contract one axis at once."""
    fits = plan.compute.itemsize == 4 and plan.capacity <= SLOTS
    return plan.variant == "buffered" and fits and not plan.shadowed and read_axis(schedule) is not None


class Stream:
    """Prints the reads of a schedule for which `streams` holds. part: elements of the contracted axis at a time."""

    def __init__(
        self, out: Python, plan: Plan, schedule: Schedule, values: Values, rows: Rows, part: int
    ) -> None:
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

    def define(self) -> None:
        """The functions by which several tiles are summed at once."""
        counts = {len(self.reads), len(self.reads) * len(self.updates)} - {0, 1}
        for count in sorted(counts):
            left, right = ([f"{x}{n}" for n in range(count)] for x in "ab")
            self.out.line("@triton.jit")
            with self.out.block(f"def add_{count}({', '.join([*left, *right])})"):
                sums = (f"{a} + {b}" for a, b in zip(left, right, strict=True))
                self.out.line(f"return {', '.join(sums)}")
            self.out.line()
            self.out.line()

    def read(self) -> None:
        """All reads of the token, and the steps before the next stage. `kept` rows are owed afterwards."""
        self.values.steps(self.before)
        late = self.rows.at_once(("scalar", self.other), ahead=True)
        with self.out.block("if flush"):
            self.out.lines("\n".join(late))
            self._flush()
            self.out.line("kept = 0")
        with self.out.block("else"):
            self._steady(late)
        self.values.steps(self.after)

    # ------------------------------------------------------------------------------------------- the branches

    def _steady(self, late: list[str]) -> None:
        if not self.gated:
            late = late + self.rows.at_once((self.kind,), ahead=True)
        with self._parts("STAGES"):
            if self.gated:
                self.rows.at_once((self.kind,))
            self.out.line(f"s = {self.values.load_state('live', 'EVICT')}")
            self._add("s", f" * fade_{self.kind}" if self.gated else "")
            if self.gated:
                for name, tile in self._products():
                    self.out.line(f"{name} += {tile}")
        self.out.lines("\n".join(late))
        if not self.gated:
            self.values.steps(s for s in self.queries if s not in self.before)
            for name, tile in self._products():
                self.out.line(f"{name} = {tile}")
        self._sum([name for name, _ in self._products()], 1)
        self._sum(self._bases(), self.axis)
        self._add_rows()
        gates: list[Kind] = ["scalar", self.other]
        for read, base in zip(self.reads, self._bases(), strict=True):
            faded = " * ".join([base, *(f"fade_{k}" for k in gates if k in self.rows.fades)])
            rows = f" + sum_{read.out}" if self.updates else ""
            self.out.line(f"{self.values.name(read.out)} = {faded}{rows}")

    def _add_rows(self) -> None:
        """sum_<out>: what the owed rows add to each read."""
        for read in self.reads if self.updates else ():
            tiles = (f"({met}{self._weight(n)})[:, None] * {self.free}_{n}" for n, met in self._met(read))
            self.out.line(f"sum_{read.out} = {' + '.join(tiles)}")
        self._sum([f"sum_{r.out}" for r in self.reads] if self.updates else [], 0)

    def _flush(self) -> None:
        for n in self.updates:
            if weight := self._weight(n):
                self.out.line(f"{self.free}_{n} = {self.free}_{n} * ({weight.removeprefix(' * ')})[:, None]")
        dtype, real = DTYPES[self.plan.state_dtype], self.values.real
        with self._parts("1"):
            self.rows.at_once((self.kind,))
            fades = [f" * fade_{k}{'' if k == 'scalar' else self.values.across(k)}" for k in self.rows.fades]
            self.out.line(f"s = {self.values.load_state('live', 'EVICT')}{''.join(fades)}")
            for n in self.updates:
                self.out.line(f"s = tl.dot(tl.trans(left_{n}), right_{n}, s, input_precision=PRECISION)")
            self.values.store_state()
            self._add("s" if dtype == real else f"s.to({dtype}).to({real})")
        self._sum(self._bases(), self.axis)
        for read, base in zip(self.reads, self._bases(), strict=True):
            self.out.line(f"{self.values.name(read.out)} = {base}")

    # ------------------------------------------------------------------------------------------------- parts

    @contextmanager
    def _parts(self, stages: str) -> Iterator[None]:
        """The loop over parts of the contracted axis, behind the sums that it fills."""
        size, name = self.values.size(self.kind), self.values.index[self.kind]
        with self.values.part(self.kind, self.part):
            tile = f"[{self.values.length('key')}, {self.values.length('value')}]"
            for base in self._bases():
                self.out.line(f"{base} = tl.zeros({tile}, {self.values.real})")
            for met, _ in self._products() if self.gated and stages != "1" else ():
                self.out.line(f"{met} = tl.zeros([{self.rows.all_slots}, {self.part}], {self.values.real})")
            with self.out.block(f"for start in tl.range(0, {size}, {self.part}, num_stages={stages})"):
                index = self.values.index[self.kind]
                self.out.line(f"{index} = (start + tl.arange(0, {self.part})).to(tl.int64)")
                if self.values.padded(self.kind):
                    self.out.line(f"{index}_ok = {index} < {size}")
                self._queries()
                yield
        assert self.values.index[self.kind] == name

    def _queries(self) -> None:
        """The part of each query, zero beyond the axis."""
        steps = [s for s in self.queries if s.out.kind == self.kind]
        used = self.values.operands(steps, [r.x for r in self.reads])
        self.values.load(v for v in used if v.kind == self.kind)
        self.values.steps(steps)

    def _query(self, read: Old) -> str:
        name = self.values.name(read.x)
        return f"tl.where({self.values.ok(self.kind)}, {name}, 0.0)" if self.values.padded(self.kind) else name

    def _add(self, tile: str, fade: str = "") -> None:
        """Add what a part of the state gives to every read."""
        across = self.values.across(self.kind)
        for read, base in zip(self.reads, self._bases(), strict=True):
            query = f"({self._query(read)}{fade})" if fade else self._query(read)
            self.out.line(f"{base} += {tile} * {query}{across}")

    def _bases(self) -> list[str]:
        return [f"base_{r.out}" for r in self.reads]

    # -------------------------------------------------------------------------------------------------- rows

    def _met(self, read: Old) -> list[tuple[int, str]]:
        return [(n, f"met_{n}_{read.out}") for n in self.updates]

    def _products(self) -> list[tuple[str, str]]:
        """met_<n>_<out> and the tile [slots, part or axis] that it sums up."""
        return [
            (met, f"{self.met}_{n} * {self._query(read)}[None, :]") for read in self.reads for n, met in self._met(read)
        ]

    def _weight(self, n: int) -> str:
        """What scalar gates leave of rows, as a factor of a number for each slot."""
        return f" * weight_{n}" if "scalar" in self.rows.fades else ""

    def _sum(self, names: Sequence[str], axis: int) -> None:
        """Replace tiles by their sums over an axis."""
        if len(names) == 1:
            self.out.line(f"{names[0]} = tl.sum({names[0]}, {axis})")
        elif names:
            every = ", ".join(names)
            self.out.line(f"{every} = tl.reduce(({every}), {axis}, add_{len(names)})")
