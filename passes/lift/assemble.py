"""Events to a Program over operand nodes, for one state and one choice of its axes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import sympy
from torch.fx import Node

from kvbuffer_compile.ir.program import (
    REDUCTIONS,
    Decay,
    Kind,
    Op,
    Program,
    Read,
    Update,
    Var,
    map_op,
    operands,
    result,
    verify,
)
from kvbuffer_compile.passes.algebra.coordinates import Coordinates, coordinates
from kvbuffer_compile.passes.algebra.factor import Axes, Factoring
from kvbuffer_compile.passes.algebra.operands import Inserter, Operands
from kvbuffer_compile.passes.algebra.refusals import prefill
from kvbuffer_compile.passes.algebra.terms import (
    Call,
    Expr,
    Fetch,
    Leaf,
    Number,
    Ones,
    Refusal,
    is_reduction,
    leaves,
    mul,
    settled,
)
from kvbuffer_compile.passes.lifted import Output
from kvbuffer_compile.passes.reading.arguments import shape
from kvbuffer_compile.passes.reading.labels import TokenAtom, resolved
from kvbuffer_compile.passes.reading.variation import Values
from kvbuffer_compile.passes.tokens.blocks import BlockOrdering, once, separate, sum_within
from kvbuffer_compile.passes.tokens.chained import chained
from kvbuffer_compile.passes.tokens.sequences import all_tokens, tokens_of
from kvbuffer_compile.passes.walk.maps import Opening
from kvbuffer_compile.passes.walk.order import DecayEvent, Event, Ordering, ReadEvent, UpdateEvent
from kvbuffer_compile.passes.walk.walk import Walk

Tainted = Callable[[Node], bool]


@dataclass
class Assembled:
    """A program with all its reads as outputs. operands: node of each input; outputs: read node -> where it goes;
    within: read node -> what the tokens of a block add to it."""

    walk: Walk
    place: Coordinates
    program: Program
    operands: dict[Var, Node]
    reads: dict[Node, Var]
    within: dict[Node, Node]

    def output(self, node: Node, inserter: Inserter, index: int, token: int | None) -> Output:
        """How the program's value of a read (its output `index`, of one token) is brought into the dims of its node."""
        kind = self.reads[node].kind
        labels = resolved(self.walk.reads[node].labels)
        parts = [*self.place.lanes, self.place.axis(kind)]
        within = self.within.get(node)
        if self.walk.sequence is not None:
            node = all_tokens(node)
        if (counting := _counting(self.walk)) is not None:
            labels = labels if self.walk.block else (*labels[:-1], (counting,), labels[-1])
            parts.insert(-1, (counting,))
        where = {atom: i for i, part in enumerate(parts) for atom in part}
        met = list(dict.fromkeys(where[a] for dim in labels for a in dim))
        empty = [i for i, part in enumerate(parts) if not part]
        sizes = tuple(inserter.size(n) for n in shape(node))
        return Output(node, tuple(empty + met), sizes, index, token, within)


def _counting(walk: Walk) -> TokenAtom | None:
    """The index of the tokens of a block or a sequence."""
    tokens = tokens_of(walk.sequence)
    return walk.block if tokens is None else TokenAtom(tokens)


def assemble(walk: Walk, axes: Axes, tainted: Tainted, inserter: Inserter) -> Assembled:
    """The program of a walk. Refusal with the reason when there is none for these axes."""
    values = Values(walk.reads)
    factoring = Factoring(values, axes, walk.block)
    opening = Opening(values, axes, walk.reads, tainted)
    _supported(walk)
    ordering = BlockOrdering(walk, factoring) if walk.block else Ordering(chained(walk, factoring), factoring)
    events = [opening.event(e) for e in ordering.events()]
    within = ordering.within if isinstance(ordering, BlockOrdering) else {}
    separate(events, within)
    exprs = [*(x for e in events for x in _exprs(e)), *(x for ws in within.values() for w in ws for x in w.exprs)]
    outside = [leaf for x in exprs for leaf in leaves(x) if leaf.node not in walk.reads]
    place = coordinates(walk.state, walk.home, axes, values, outside, walk.reads.values())
    _contiguous(walk, place)
    lowering = Lowering(walk, Operands(inserter, place, values, walk.state, _counting(walk)))
    for event in events:
        lowering.event(event)
    inputs = tuple(lowering.inputs)
    program = Program(place.names, inputs, tuple(lowering.ops), tuple(lowering.reads.values()))
    sums = {node: total for node, ws in within.items() if (total := sum_within(lowering.outside, ws)) is not None}
    return Assembled(walk, place, verify(program), lowering.inputs, lowering.reads, sums)


def _supported(walk: Walk) -> None:
    own = walk.own_atoms | {walk.block}
    for read in walk.reads.values():
        foreign = [a.size for dim in resolved(read.labels) for a in dim if a not in own]
        if foreign:
            count = sympy.Mul(*foreign)
            raise prefill(read.node, int(count) if count.is_Integer else count, "queries read each head")


def _contiguous(walk: Walk, place: Coordinates) -> None:
    """Reads keep the atoms of each part together and in order, else no permutation of whole dims restores them."""
    parts = [p for p in (*place.lanes, place.key, place.value) if len(p) > 1]
    for read in walk.reads.values():
        row = [a for dim in resolved(read.labels) for a in dim]
        for part in parts:
            at = row.index(part[0]) if part[0] in row else None
            if at is not None and tuple(row[at : at + len(part)]) != part:
                raise Refusal(read.node, "layout", "a read spreads an axis of the state over several of its dims")


def _exprs(event: Event) -> tuple[Expr, ...]:
    match event:
        case ReadEvent(_, value, _):
            return (value,)
        case UpdateEvent(left, right, _):
            return (left, right)
        case DecayEvent(factor):
            return (factor,)


@dataclass
class Lowering:
    """Emits the ops of events in their order. Names are the order of definition; equal values are emitted once."""

    walk: Walk
    outside: Operands
    ops: list[Op] = field(default_factory=list)
    inputs: dict[Var, Node] = field(default_factory=dict)
    reads: dict[Node, Var] = field(default_factory=dict)
    _known: dict[Expr, Var] = field(default_factory=dict)
    _nodes: dict[tuple[Node, Kind], Var] = field(default_factory=dict)

    def event(self, event: Event) -> None:
        """Emit one event. Refusal("read-order") when it needs a read that comes later."""
        match event:
            case ReadEvent(node, value, _):
                self.reads[node] = self._var(value)
            case DecayEvent(factor, node, once_at):
                if not self._is_outside(factor):
                    reason = (
                        "the decay depends on a read of the same state: rows that wait in a buffer could not be "
                        "decayed without it; compute the gate from the token"
                    )
                    raise Refusal(node, "decay-from-read", reason)
                self.ops.append(Decay(self._var(factor) if once_at is None else self._input(factor, once_at)))
            case UpdateEvent(left, right, _):
                self.ops.append(Update(self._var(left), self._var(right)))

    def _var(self, expr: Expr) -> Var:
        expr = settled(expr)
        if expr not in self._known:
            self._known[expr] = self._lowered(expr)
        return self._known[expr]

    def _lowered(self, expr: Expr) -> Var:
        if self._is_outside(expr):
            return self._input(expr)
        match expr:
            case Leaf(node, _):
                if node not in self.reads:
                    reason = (
                        "an old version of the state is read with a key that depends on a read of a newer one: read "
                        "the new one, or make the key without it"
                    )
                    raise Refusal(node, "read-order", reason)
                return self.reads[node]
            case Fetch(x, key, _):
                return self._fetch(x, key)
            case Call(fn, args):
                first = self._truth(args[0]) if fn.startswith("aten.where") else self._argument(args[0])
                return self._map(fn, (first, *(self._argument(a) for a in args[1:])))
        raise AssertionError(expr)

    def _is_outside(self, expr: Expr) -> bool:
        """Whether the graph computes a value, and not the program: no reads, and no dot products of corrections."""
        if is_reduction(expr):
            return False
        return not _has_fetch(expr) and all(leaf.node not in self.walk.reads for leaf in leaves(expr))

    def _argument(self, expr: Expr) -> Var | Number:
        return expr if isinstance(expr, int | float) else self._var(expr)

    def _truth(self, expr: Expr) -> Var | Number:
        """A condition from outside arrives as a number, and is compared with 0."""
        if isinstance(expr, int | float) or not self._is_outside(expr):
            return self._argument(expr)
        return self._map("aten.ne.Scalar", (self._var(expr), 0))

    def _input(self, expr: Expr, once_at: int | None = None) -> Var:
        kind = self.outside.kind(expr)
        node = self.outside.floating(self.outside.node(expr, kind))
        node = node if once_at is None else once(self.outside, node, once_at)
        if (node, kind) not in self._nodes:
            lanes = self.outside.place.along(self.outside.atoms(expr))
            var = self._nodes[node, kind] = Var(f"x{len(self.inputs)}", kind, lanes)
            self.inputs[var] = node
        return self._nodes[node, kind]

    def _fetch(self, x: Expr, key: bool) -> Var:
        if not isinstance(x, int | float) and self._var(x).kind != "scalar":
            var = self._var(x)
        else:
            var = self._var(mul(Ones(key), x))
        self._expect(var, "key" if key else "value")
        out = Var(f"t{len(self.ops)}", "value" if key else "key", self.outside.place.names)
        self.ops.append(Read(out, var))
        return out

    def _expect(self, var: Var, kind: Kind) -> None:
        if var.kind != kind:
            raise Refusal(self.walk.state, "opaque-map", "a read of the state is used along its other axis")

    def _map(self, fn: str, args: tuple[Var | Number, ...]) -> Var:
        kinds = {a.kind for a in args if isinstance(a, Var)} - {"scalar"}
        if len(kinds) > 1 or (fn in REDUCTIONS and not kinds):
            raise Refusal(self.walk.state, "opaque-map", "a read of the state is joined with a value of its other axis")
        op = map_op(f"t{len(self.ops)}", fn, args, self.outside.place.names)
        self.ops.append(op)
        return op.out


def _has_fetch(expr: Expr) -> bool:
    match expr:
        case Fetch():
            return True
        case Call(_, args):
            return any(map(_has_fetch, args))
    return False


def trimmed(program: Program, outputs: tuple[Var, ...]) -> Program:
    """The program with these outputs only, without ops and inputs that serve nothing, and with canonical names."""
    needed = {v.name for v in outputs}
    ops: list[Op] = []
    for op in reversed(program.ops):
        out = result(op)
        if out is None or out.name in needed:
            needed |= {v.name for v in operands(op)}
            ops.append(op)
    inputs = tuple(v for v in program.inputs if v.name in needed)
    return replace(program, inputs=inputs, ops=tuple(reversed(ops)), outputs=outputs)
