"""The reads of all tokens of a verify step at once, as matrix products on tensor cores.

Where no query depends on a read, the queries of all tokens are known before the state comes. They are laid one below
the other, token by token, as the rows of the tile `queries`, and one loop over parts of the axis that they run along
takes all products of them: with the state, with the owed rows and with the rows of the step's own tokens.

    result = queries' s        queries' faded by the decays of the owed rows and of the tokens before
    met_n = queries left_n^T   left_n of the owed rows; then result += (met_n * weight_n) right_n
    gram_n = queries left_n^T  left_n of the step's tokens, where no gate runs along this axis

The loop over tokens then picks its rows of `result` and adds what the tokens before it add: the triangular solve of
delta rules, which with a gram is a sum over tokens only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from kvbuffer_compile.codegen import calls
from kvbuffer_compile.codegen.schedule import Dot, Old, Schedule, Step, Widen, uses
from kvbuffer_compile.codegen.triton.tiles.rows import Rows
from kvbuffer_compile.codegen.triton.tiles.shadow import Shadow
from kvbuffer_compile.codegen.triton.tiles.values import AXES, Python, Values, power_of_two
from kvbuffer_compile.ir.plan import Plan
from kvbuffer_compile.ir.program import REDUCTIONS, Kind, Map, Var

PART = 32  # elements of the axis that are taken at once
SLOTS = 64  # owed rows that can be


def applies(plan: Plan, schedule: Schedule) -> bool:
    """Whether a step of several tokens can read by matrix products.

    All reads run along one axis, and no query or decay along it needs another read or a sum over the axis. A tree has
    no such decay: for KDA's products with what each path leaves were predicted at three times the time of vectors.
    """
    kind, reads = read_axis(schedule), schedule.stages[0].reads
    if not plan.several or plan.compute.itemsize != 4 or schedule.fold is None or kind is None:
        return False
    factor = schedule.fold.key if kind == "key" else schedule.fold.value
    if factor and plan.variant == "tree":
        return False
    steps = [step for stage in schedule.stages for step in stage.steps]
    asked = needed(steps, [*(r.x for r in reads), *([factor] if factor else [])])
    whole = any(isinstance(s, Dot) or (isinstance(s, Map) and s.fn in REDUCTIONS) for s in asked)
    return not whole and power_of_two(plan.capacity) <= SLOTS


def read_axis(schedule: Schedule) -> Kind | None:
    """The axis that all reads contract, where there are reads and none of them waits for another one."""
    kinds = {r.x.kind for r in schedule.stages[0].reads}
    waits = any(stage.reads for stage in schedule.stages[1:])
    return None if waits or len(kinds) != 1 else kinds.pop()


def queries(plan: Plan, schedule: Schedule) -> int:
    """Rows that one token has among the queries; 0 where matrix products do not apply."""
    return power_of_two(len(schedule.stages[0].reads)) if applies(plan, schedule) else 0


class Matrix:
    """Prints the products for the reads of a schedule to which they apply."""

    def __init__(self, out: Python, plan: Plan, values: Values, rows: Rows, schedule: Schedule) -> None:
        assert schedule.fold is not None
        self.out, self.values, self.rows, self.fold = out, values, rows, schedule.fold
        self.shadow = Shadow(out, plan, values)
        self.reads = schedule.stages[0].reads
        self.kind: Kind = self.reads[0].x.kind
        self.other: Kind = "value" if self.kind == "key" else "key"
        self.steps = [step for stage in schedule.stages for step in stage.steps]
        alone = plan.variant == "block"  # no token sees another
        self.factor = None if alone else {"key": self.fold.key, "value": self.fold.value}[self.kind]
        self.width = queries(plan, schedule)
        self.slots = rows.all_slots
        self.grams = [] if self.factor or alone else [n for n in range(len(self.fold.rows)) if self._laid(n)]

    def _laid(self, n: int) -> bool:
        """Whether the n-th rows of all tokens can be computed part by part, before any read."""
        met = self.met(n)
        steps = needed(self.steps, [met])
        whole = any(isinstance(s, Dot) or (isinstance(s, Map) and s.fn in REDUCTIONS) for s in steps)
        return not whole and met in known(self.values.plan.program.inputs, self.steps)

    def met(self, n: int) -> Var:
        """The side of the n-th row of a token that the reads meet."""
        return self.fold.rows[n][AXES.index(self.kind)]

    def needs(self, side: Kind, n: int) -> bool:
        """Whether the loop over tokens needs this side of the n-th rows of the tokens before."""
        return side == self.other or n not in self.grams

    @property
    def weighs(self) -> bool:
        """Whether scalar gates are kept beside the rows: sides that are read through a gram do not meet them."""
        return self.fold.scalar is not None and self.kind == "key" and bool(self.grams)

    # ---------------------------------------------------------------------------------- before the tokens

    def start(self) -> None:
        """The numbers of the queries, and which token asks."""
        self.out.line("asked = tl.arange(0, QUERIES)")
        self.out.line(f"asked_token = asked // {self.width}")

    def read(self) -> None:
        """`result`, a row for each query, and the grams."""
        self.start()
        self.empty("result", "QUERIES", self.values.length(self.other))
        for n in range(len(self.rows.updates)):
            self.empty(f"met_{n}", "QUERIES", str(self.slots))
        self._empty_grams()
        self.rows.at_once(("scalar", self.other))
        with self._parts():
            self.lay()
            self.rows.at_once((self.kind,))
            for n in range(len(self.rows.updates)):
                self._product(f"met_{n}", "queries", f"{'left' if self.kind == 'key' else 'right'}_{n}")
            self._multiply_fresh()
            faded = f"queries * fade_{self.kind}[None, :]" if self.kind in self.rows.fades else "queries"
            tile = self.shadow.load("tile_read")
            self._product("result", faded, tile if self.kind == "value" else f"tl.trans({tile})")
        self._add_rows()

    def multiply_fresh(self) -> None:
        """The grams alone."""
        self._empty_grams()
        with self._parts():
            self.lay()
            self._multiply_fresh()

    def _empty_grams(self) -> None:
        for n in self.grams:
            self.empty(f"gram_{n}", "QUERIES", "TOKENS")

    def _multiply_fresh(self) -> None:
        """A part of the grams."""
        for n in self.grams:
            self._evaluate([self.met(n)], "token", "TOKENS")
            self._product(f"gram_{n}", "queries", self._inside(self._name(self.met(n))))

    def empty(self, name: str, *sizes: str) -> None:
        self.out.line(f"{name} = tl.zeros([{', '.join(sizes)}], {self.values.real})")

    @contextmanager
    def _parts(self) -> Iterator[None]:
        """The loop; within it <axis>_part are the elements of the part."""
        size = power_of_two(self.values.size(self.kind))
        part = min(size, PART)
        with self.out.block(f"for part in range({size // part})"), self.values.part(self.kind, part):
            name = self.values.index[self.kind]
            self.out.line(f"{name} = (part * {part} + tl.arange(0, {part})).to(tl.int64)")
            if self.values.padded(self.kind):
                self.out.line(f"{name}_ok = {name} < {self.values.size(self.kind)}")
            yield

    @property
    def bare(self) -> bool:
        """Whether all queries are operands as they are."""
        return self.factor is None and all(r.x in self.values.plan.program.inputs for r in self.reads)

    def lay(self, stored: bool = False) -> None:
        """The part of all queries, faded by the tokens before: the decay's rows stand one token later, once a token.

        stored: as they are stored, where they are bare and of one dtype.
        """
        if stored and self.bare:
            names = [f"in_{r.x}" for r in self.reads]
            same = " and ".join(f"{name}.dtype == {names[0]}.dtype" for name in names[1:])
            rest = f" if {same} else {self.values.real}" if same else ""
            self.out.line(f"stored: tl.constexpr = {names[0]}.dtype.element_ty{rest}")
            for read in self.reads:
                tile = self.values.operand_tile(read.x, "asked_token", "stored")
                self.out.line(f"{self._name(read.x)} = {tile}")
        else:
            self._evaluate([r.x for r in self.reads], "asked_token", "QUERIES")
        text = self._name(self.reads[0].x)
        for n, read in enumerate(self.reads[1:], 1):
            text = f"tl.where((asked % {self.width} == {n})[:, None], {self._name(read.x)}, {text})"
        self.out.line(f"queries = {self._inside(text)}")
        if self.factor:
            self._evaluate([self.factor], "(asked_token - 1)", "QUERIES")
            first = f"((asked % {self.width} == 0) & (asked_token > 0))[:, None]"
            self.out.line(f"queries *= tl.cumprod(tl.where({first}, {self._name(self.factor)}, 1.0), 0)")

    def _inside(self, tile: str) -> str:
        """A tile with zeros beyond the axis."""
        return f"tl.where({self.values.ok(self.kind)}[None, :], {tile}, 0.0)" if self.values.padded(self.kind) else tile

    def _product(self, total: str, left: str, right: str) -> None:
        """total += left right^T"""
        self.out.line(f"{total} = tl.dot({left}, tl.trans({right}), {total}, input_precision=PRECISION)")

    def _add_rows(self) -> None:
        """What the owed rows leave of the product with the state, and what they add."""
        self.fade_result()
        weight = " * weight_{}[None, :]" if "scalar" in self.rows.fades else ""
        for n in range(len(self.rows.updates)):
            free = f"{'right' if self.kind == 'key' else 'left'}_{n}"
            left = f"met_{n}{weight.format(n)}"
            self.out.line(f"result = tl.dot({left}, {free}, result, input_precision=PRECISION)")

    def fade_result(self) -> None:
        """What decays along no contracted axis leave of the product with the state."""
        fades = [("scalar", ""), (self.other, "[None, :]")]
        factors = "".join(f" * fade_{kind}{across}" for kind, across in fades if kind in self.rows.fades)
        if factors:
            self.out.line(f"result = result{factors}")

    # ------------------------------------------------------------------------------- in the loop over tokens

    def pick(self, read: Old) -> str:
        """The result of one read of token t, but for what fades it behind the state."""
        return self._row(read, "result")

    def _row(self, read: Old, tile: str) -> str:
        at = f"t * {self.width} + {self.reads.index(read)}"
        return f"tl.sum(tl.where((asked == {at})[:, None], {tile}, 0.0), 0)"

    def add_fresh(self, out: str, read: Old, n: int) -> None:
        """out += what the n-th rows of the tokens before t add to a read, through their gram."""
        weight = " * fresh_weight" if self.weighs else ""
        self.out.line(f"dot = tl.where(token < t, {self.gram(read, n)}{weight}, 0.0)")
        free = f"fresh_{'right' if self.kind == 'key' else 'left'}_{n}"
        self.out.line(f"{out} += tl.sum(dot[:, None] * {free}, 0)")

    def gram(self, read: Old, n: int) -> str:
        """The products of a query of token t with the n-th rows of all tokens."""
        return self._row(read, f"gram_{n}")

    # --------------------------------------------------------------------------------- steps of all tokens

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
            case Widen(out, x):
                return f"tl.broadcast_to({self._name(x)}[:, None], [{count}, {self.values.length(out.kind)}])"
            case Map(out, fn, args):
                return calls.triton(fn, [self._argument(a, out.kind) if isinstance(a, Var) else a for a in args])
            case Dot():
                raise AssertionError(f"{step.out} is a sum over an axis: matrix products do not apply")

    def _argument(self, v: Var, kind: Kind) -> str:
        return self._name(v) + ("[:, None]" if v.kind == "scalar" and kind != "scalar" else "")


def known(inputs: Iterable[Var], steps: Iterable[Step]) -> set[Var]:
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
