"""Reads of all tokens of a verify step at once, as matrix products on tensor cores.

The queries of reads that depend on no other read are known for all tokens before the state comes. They are laid one
below the other, token by token, as the tile `query_<kind>`, faded by the tokens before them; what the owed rows and the
state make of them is `result_<kind>`, one row a query:

    result = (query left^T * weight) right + (query * fade) s

The loop over tokens picks its rows from it and adds what the rows of the tokens before add: the triangular solve of
delta rules. Where rows are known beforehand and no gate runs along the axis they are read over, all products of queries
and rows are one matrix too, gram_<kind>_<n>, and the loop sums over tokens only.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kvbuffer_compile import ir
from kvbuffer_compile.codegen import calls
from kvbuffer_compile.codegen.schedule import Dot, Old, Schedule, Step, Widen, uses
from kvbuffer_compile.codegen.triton_rows import Rows
from kvbuffer_compile.codegen.triton_values import AXES, Python, Values, power_of_two
from kvbuffer_compile.ir import REDUCTIONS, Kind, Map, Var


def queries(reads: Sequence[Old]) -> int:
    """Rows that one token has in a tile of queries."""
    return power_of_two(max((sum(r.x.kind == kind for r in reads) for kind in AXES), default=1))


class Matrix:
    """Prints the products for the reads of a schedule's first stage."""

    def __init__(self, out: Python, values: Values, rows: Rows, schedule: Schedule) -> None:
        assert schedule.fold is not None
        self.out, self.values, self.rows = out, values, rows
        self.reads, self.fold = schedule.stages[0].reads, schedule.fold
        self.all_reads = [read for stage in schedule.stages for read in stage.reads]
        self.steps = [step for stage in schedule.stages for step in stage.steps]
        self.factors: dict[Kind, Var | None] = {"key": self.fold.key, "value": self.fold.value}
        self.kinds = [kind for kind in AXES if any(r.x.kind == kind for r in self.reads)]
        self.width = queries(self.reads)
        known = _known(values.plan.program.inputs, self.steps)
        pairs = [(kind, n) for kind in self.kinds if not self.factors[kind] for n in range(len(self.fold.rows))]
        self.grams = [(kind, n) for kind, n in pairs if self.met(kind, n) in known]

    def met(self, kind: Kind, n: int) -> Var:
        """The side of the n-th row of a token that reads along `kind` meet."""
        return self.fold.rows[n][AXES.index(kind)]

    def needs(self, side: Kind, n: int) -> bool:
        """Whether the loop over tokens needs the n-th rows of the tokens before along this axis."""
        free = any(read.x.kind != side for read in self.all_reads)
        met = [read for read in self.all_reads if read.x.kind == side]
        return free or any(read not in self.reads or (side, n) not in self.grams for read in met)

    @property
    def weighs(self) -> bool:
        """Whether scalar gates are kept beside the rows: what is read through a gram has not met them."""
        return self.fold.scalar is not None and any(kind == "key" for kind, _ in self.grams)

    def of_kind(self, kind: Kind) -> list[Old]:
        return [r for r in self.reads if r.x.kind == kind]

    def lay(self) -> None:
        """query_<kind>, an empty result_<kind>, and the grams."""
        self.out.line("asked = tl.arange(0, QUERIES)")
        self.out.line(f"asked_token = asked // {self.width}")
        for kind in self.kinds:
            self._evaluate([r.x for r in self.of_kind(kind)], "asked_token", "QUERIES")
            text = self._name(self.of_kind(kind)[0].x)
            for n, read in enumerate(self.of_kind(kind)[1:], 1):
                text = f"tl.where((asked % {self.width} == {n})[:, None], {self._name(read.x)}, {text})"
            self.out.line(f"query_{kind} = {text}")
            self._fade(kind)
            if self.values.padded(kind):
                self.out.line(f"query_{kind} = tl.where({kind}_ok[None, :], query_{kind}, 0.0)")
            length = self.values.length(_other(kind))
            self.out.line(f"result_{kind} = tl.zeros([QUERIES, {length}], {self.values.real})")
        for kind, n in self.grams:
            v = self.met(kind, n)
            self._evaluate([v], "token", "TOKENS")
            padded = self.values.padded(kind)
            tile = f"tl.where({kind}_ok[None, :], {self._name(v)}, 0.0)" if padded else self._name(v)
            dot = f"tl.dot(query_{kind}, tl.trans({tile}), input_precision=PRECISION)"
            self.out.line(f"gram_{kind}_{n} = {dot}")

    def _fade(self, kind: Kind) -> None:
        """Running products of the decay: its rows stand one token later, and once a token."""
        factor = self.factors[kind]
        if factor is None:
            return
        self._evaluate([factor], "(asked_token - 1)", "QUERIES")
        first = f"((asked % {self.width} == 0) & (asked_token > 0))[:, None]"
        self.out.line(f"query_{kind} *= tl.cumprod(tl.where({first}, {self._name(factor)}, 1.0), 0)")

    def add_rows(self) -> None:
        """What a chunk of owed rows makes of the queries."""
        for kind in self.kinds:
            for n in range(len(self.rows.updates)):
                met, free = (f"left_{n}", f"right_{n}") if kind == "key" else (f"right_{n}", f"left_{n}")
                weight = f" * weight_{n}[None, :]" if "scalar" in self.rows.fades else ""
                dot = f"tl.dot(query_{kind}, tl.trans({met}), input_precision=PRECISION){weight}"
                self.out.line(f"result_{kind} = tl.dot({dot}, {free}, result_{kind}, input_precision=PRECISION)")

    def add_base(self) -> None:
        """What the state makes of them."""
        for kind in self.kinds:
            fades = self.rows.fades
            faded = f"query_{kind} * fade_{kind}[None, :]" if kind in fades else f"query_{kind}"
            tile = "s" if kind == "key" else "tl.trans(s)"
            text = f"tl.dot({faded}, {tile}, input_precision=PRECISION)"
            text += " * fade_scalar" if "scalar" in fades else ""
            text += f" * fade_{_other(kind)}[None, :]" if _other(kind) in fades else ""
            self.out.line(f"result_{kind} += {text}")

    def pick(self, read: Old) -> str:
        """The result of one read of token t, but for what fades it behind the state."""
        return self._row(read, f"result_{read.x.kind}")

    def _row(self, read: Old, tile: str) -> str:
        at = f"t * {self.width} + {self.of_kind(read.x.kind).index(read)}"
        return f"tl.sum(tl.where((asked == {at})[:, None], {tile}, 0.0), 0)"

    def add_fresh(self, out: str, read: Old, n: int) -> None:
        """out += what the n-th rows of the tokens before t add to a read, through their gram."""
        weight = " * fresh_weight" if read.x.kind == "key" and self.weighs else ""
        self.out.line(f"dot = tl.where(token < t, {self._row(read, f'gram_{read.x.kind}_{n}')}{weight}, 0.0)")
        free = f"fresh_{'right' if read.x.kind == 'key' else 'left'}_{n}"
        self.out.line(f"{out} += tl.sum(dot[:, None] * {free}, 0)")

    # ------------------------------------------------------------------------------- steps of all tokens

    def _name(self, v: Var) -> str:
        return f"all_{v}"

    def _evaluate(self, roots: Sequence[Var], token: str, count: str) -> None:
        """Compute values for `count` tokens at once: all_<name>, a row each; garbage where there is no such token."""
        steps = needed(self.steps, roots)
        for v in self.values.operands(steps, roots):
            self.out.line(f"{self._name(v)} = {self.values.operand_tile(v, token)}")
        for step in steps:
            self.out.line(f"{self._name(step.out)} = {self._expression(step, count)}")

    def _expression(self, step: Step, count: str) -> str:
        match step:
            case Dot(_, left, right):
                return self.values.total(f"{self._name(left)} * {self._name(right)}", left.kind, 1, 2)
            case Widen(out, x):
                return f"tl.broadcast_to({self._name(x)}[:, None], [{count}, {self.values.length(out.kind)}])"
            case Map(_, fn, _) if fn in REDUCTIONS:
                (x,) = ir.operands(step)
                return self.values.reduced(fn, self._name(x), x.kind, 1)
            case Map(out, fn, args):
                return calls.triton(fn, [self._argument(a, out.kind) if isinstance(a, Var) else a for a in args])

    def _argument(self, v: Var, kind: Kind) -> str:
        return self._name(v) + ("[:, None]" if v.kind == "scalar" and kind != "scalar" else "")


def _other(kind: Kind) -> Kind:
    return "value" if kind == "key" else "key"


def _known(inputs: Iterable[Var], steps: Iterable[Step]) -> set[Var]:
    """The values that depend on no read."""
    known = set(inputs)
    for step in steps:
        if known.issuperset(uses(step)):
            known.add(step.out)
    return known


def needed(nodes: Iterable[Step], roots: Iterable[Var]) -> list[Step]:
    """The steps that `roots` depend on, in order."""
    wanted = set(roots)
    kept = []
    for node in reversed(list(nodes)):
        if node.out in wanted:
            wanted.update(uses(node))
            kept.append(node)
    return kept[::-1]
