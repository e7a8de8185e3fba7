"""One token of a program in the order a kernel computes it: what is read from the state, in how many passes over it.

A read in the middle of a token equals a read of the state as it was when the token began, of a query that the
decays in between have shrunk, plus the rows that the token itself has added (memory.Buffered.read, with the token's own
ops as the log). All reads of the state at token start whose queries are known share ONE pass; a read whose query
depends on an earlier read waits for the next one. So Gated DeltaNet reads k and q together.

Nothing here knows C++ or Triton.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from kvbuffer_compile.ir import program as ir
from kvbuffer_compile.ir.program import REDUCTIONS, Decay, Kind, Map, Program, Read, Update, Var


@dataclass(frozen=True)
class Dot:
    """out = sum_i left_i right_i, along the axis both run along."""

    out: Var
    left: Var
    right: Var


@dataclass(frozen=True)
class Widen:
    """out_i = x for every i of out's axis: a scalar side of an update at full width."""

    out: Var
    x: Var


@dataclass(frozen=True)
class Old:
    """out = S^T x (x along key) or S x (x along value), S being the state at the start of the token."""

    out: Var
    x: Var


Step = Map | Dot | Widen


@dataclass(frozen=True)
class Stage:
    """`steps` in order, then one pass over the state for all of `reads`."""

    steps: tuple[Step, ...]
    reads: tuple[Old, ...]


@dataclass(frozen=True)
class Fold:
    """What the token does to S: S <- scalar * key[:, None] * value[None, :] * S + the sum of left right^T over rows.

    A factor is None where the program has no such decay; rows have both sides at full width.
    """

    scalar: Var | None
    key: Var | None
    value: Var | None
    rows: tuple[tuple[Var, Var], ...]

    @property
    def needs(self) -> tuple[Var, ...]:
        factors = (self.scalar, self.key, self.value)
        return (*(v for v in factors if v is not None), *(v for row in self.rows for v in row))


@dataclass(frozen=True)
class Schedule:
    """stages: only the last one has no reads. split: the axis along which S may be cut into independent tiles.

    fold: what a kernel that works in place does to S, None for a buffered one. fold_stage: the stage in whose steps all
    that it needs is computed.
    """

    stages: tuple[Stage, ...]
    split: Kind | None
    fold: Fold | None = None
    fold_stage: int = 0


def schedule(program: Program, in_place: bool) -> Schedule:
    """The stages of one token: up to its outputs and, in place, the fold, or else the values it logs."""
    return arrange(*token_nodes(program, in_place))


def token_nodes(program: Program, in_place: bool) -> tuple[list[Step | Old], Fold | None]:
    """All that one token computes, in order, and, in place, its fold."""
    token = _Token(program)
    ir.run(program, token, {v.name: v for v in program.inputs})
    fold = token.fold() if in_place else None
    return live(token.nodes, (*program.outputs, *(fold.needs if fold else program.logged))), fold


def arrange(nodes: list[Step | Old], fold: Fold | None) -> Schedule:
    """Nodes in stages. What none of them computes is known from the start."""
    levels = _levels(nodes)
    return Schedule(
        _stages(nodes, levels),
        _split(nodes),
        fold,
        max((levels.get(v.name, 0) for v in fold.needs), default=0) if fold else 0,
    )


def steps_for(program: Program, roots: Iterable[Var]) -> tuple[Step, ...]:
    """The steps that compute `roots`, values that depend on no read."""
    token = _Token(program)
    ir.run(program, token, {v.name: v for v in program.inputs})
    nodes = live(token.nodes, roots)
    return tuple(n for n in nodes if not isinstance(n, Old))


class _Token:
    """A printing memory: runs a program on names, and notes the calls that compute its values."""

    def __init__(self, program: Program) -> None:
        self.lanes = program.lanes
        self.nodes: list[Step | Old] = []
        self._log: list[Decay | Update] = []
        self._reads = iter([op.out for op in program.ops if isinstance(op, Read)])
        self._names = {v.name for v in program.inputs} | {o.name for op in program.ops if (o := ir.result(op))}
        self._made: dict[tuple[Any, ...], Var] = {}

    def decay(self, factor: Var, kind: Kind) -> None:
        self._log.append(Decay(factor))

    def update(self, left: Var, right: Var, kinds: tuple[Kind, Kind]) -> None:
        self._log.append(Update(left, right))

    def map(self, op: Map, args: list[Any]) -> Var:
        self.nodes.append(op)
        return op.out

    def read(self, x: Var, kind: Kind) -> Var:
        """memory.Buffered.read on names; a scalar decay shrinks the result instead of the query (one number)."""
        out = next(self._reads)
        older: Var | None = None
        terms: list[tuple[Var, Var]] = []
        for entry in reversed(self._log):
            if isinstance(entry, Update):
                met, free = (entry.left, entry.right) if kind == "key" else (entry.right, entry.left)
                terms.append(self._term(self._dot(self._widen(met, kind), x), free, older))
            elif entry.factor.kind == kind:
                x = self._mul(x, entry.factor)
            else:
                older = self._mul(older, entry.factor)
        return self._sum(out, x, older, terms)

    def fold(self) -> Fold:
        """The token's events as one fold."""
        left: dict[Kind, Var | None] = {"scalar": None, "key": None, "value": None}
        rows: list[tuple[Var, Var]] = []
        for entry in reversed(self._log):
            if isinstance(entry, Decay):
                left[entry.factor.kind] = self._mul(left[entry.factor.kind], entry.factor)
                continue
            key = self._mul(left["scalar"], self._mul(left["key"], self._widen(entry.left, "key")))
            rows.append((key, self._mul(left["value"], self._widen(entry.right, "value"))))
        return Fold(left["scalar"], left["key"], left["value"], tuple(rows))

    def _term(self, dot: Var, free: Var, older: Var | None) -> tuple[Var, Var]:
        """(coefficient, vector) of one row's part of a read."""
        if older is not None and older.kind == "scalar":
            return self._mul(dot, older), free
        return dot, self._mul(older, free)

    def _sum(self, out: Var, x: Var, older: Var | None, terms: list[tuple[Var, Var]]) -> Var:
        """out = older * (the state at token start, read with x) + the terms, oldest last."""
        if older is None and not terms:
            self.nodes.append(Old(out, x))
            return out
        total = Var(self._name(f"{out}_old"), out.kind, out.lanes)
        self.nodes.append(Old(total, x))
        if older is not None:
            total = self._map("aten.mul.Tensor", (total, older), None if terms else out)
        for n, (coefficient, vector) in enumerate(terms):
            part = self._mul(coefficient, vector)
            total = self._map("aten.add.Tensor", (total, part), out if n == len(terms) - 1 else None)
        return total

    def _mul(self, a: Var | None, b: Var) -> Var:
        return b if a is None else self._once("aten.mul.Tensor", a, b)

    def _once(self, fn: str, a: Var, b: Var) -> Var:
        key = (fn, a, b)
        if key not in self._made:
            self._made[key] = self._map(fn, (a, b), None)
        return self._made[key]

    def _map(self, fn: str, args: tuple[Var, ...], out: Var | None) -> Var:
        name = out.name if out else self._name("_".join(a.name for a in args))
        result = Var(name, _common_kind(args), self._union(args))
        self.nodes.append(Map(result, fn, args))
        return result

    def _dot(self, left: Var, right: Var) -> Var:
        key = ("dot", left, right)
        if key not in self._made:
            lanes = self._union((left, right))
            self._made[key] = Var(self._name(f"{left}_dot_{right}"), "scalar", lanes)
            self.nodes.append(Dot(self._made[key], left, right))
        return self._made[key]

    def _widen(self, x: Var, kind: Kind) -> Var:
        if x.kind != "scalar":
            return x
        key = ("widen", x, kind)
        if key not in self._made:
            self._made[key] = Var(self._name(f"{x}_wide"), kind, x.lanes)
            self.nodes.append(Widen(self._made[key], x))
        return self._made[key]

    def _union(self, args: tuple[Var, ...]) -> tuple[str, ...]:
        return tuple(lane for lane in self.lanes if any(lane in v.lanes for v in args))

    def _name(self, wish: str) -> str:
        wish = wish if len(wish) <= 40 else f"t{len(self._names)}"
        name, n = wish, 1
        while name in self._names:
            name, n = f"{wish}_{n}", n + 1
        self._names.add(name)
        return name


def _common_kind(args: tuple[Var, ...]) -> Kind:
    return next((v.kind for v in args if v.kind != "scalar"), "scalar")


def uses(node: Step | Old) -> tuple[Var, ...]:
    """The variables a node needs."""
    match node:
        case Map():
            return ir.operands(node)
        case Dot(_, left, right):
            return (left, right)
        case Widen(_, x) | Old(_, x):
            return (x,)


def live(nodes: list[Step | Old], roots: Iterable[Var]) -> list[Step | Old]:
    """The nodes that `roots` need, in order."""
    needed = set(roots)
    kept = []
    for node in reversed(nodes):
        if node.out in needed:
            needed.update(uses(node))
            kept.append(node)
    return kept[::-1]


def _levels(nodes: list[Step | Old]) -> dict[str, int]:
    """For each value, how many passes over the state must come before it."""
    levels: dict[str, int] = {}
    for node in nodes:
        levels[node.out.name] = max((levels.get(v.name, 0) for v in uses(node)), default=0) + isinstance(node, Old)
    return levels


def _stages(nodes: list[Step | Old], levels: dict[str, int]) -> tuple[Stage, ...]:
    count = max((levels[n.out.name] for n in nodes if isinstance(n, Old)), default=0)
    stages = []
    for level in range(count + 1):
        steps = tuple(n for n in nodes if not isinstance(n, Old) and levels[n.out.name] == level)
        reads = tuple(n for n in nodes if isinstance(n, Old) and levels[n.out.name] == level + 1)
        stages.append(Stage(steps, reads))
    return tuple(stages)


def _split(nodes: list[Step | Old]) -> Kind | None:
    """An axis along which nothing is summed."""
    summed = {kind for node in nodes for kind in [_summed(node)] if kind}
    for kind in ("value", "key"):
        if kind not in summed:
            return kind
    return None


def _summed(node: Step | Old) -> Kind | None:
    match node:
        case Dot(_, left, _):
            return left.kind
        case Old(_, x):
            return x.kind
        case Map(_, fn, _) if fn in REDUCTIONS:
            return next(v.kind for v in ir.operands(node) if v.kind != "scalar")
    return None
