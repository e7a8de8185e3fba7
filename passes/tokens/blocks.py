"""Blocks: several tokens that are read from one state by one product, and added to it by one product.

    o = Q S,  S <- g S + K^T V        Q, K [T, K], V [T, V]

The index of the T tokens stays a dim of the operands: a sum over as many positions is a sum over the block's tokens,
and a query of as many positions is one a token. What is lifted is the program of one token, whose reads come first:
each is of the state as it was before the call (plan.py, variant "block"). A read of the state behind the update,

    (x (g S + K^T V))[t] = g x[t] S + sum_s <x[t], k[s]> v[s]

is the read of the old state, and a sum that the graph computes from the operands (`Within`). A decay of the state
happens once, in the turn of the first token, or of the last if it stands behind the update.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from copy import copy
from dataclasses import dataclass, replace

import torch
from torch.fx import Node

from kvbuffer_compile.ir.program import Kind
from kvbuffer_compile.passes.algebra.factor import Factoring
from kvbuffer_compile.passes.algebra.operands import Operands
from kvbuffer_compile.passes.algebra.terms import Expr, Leaf, Refusal, Term, add, counted, leaves
from kvbuffer_compile.passes.algebra.versions import ReadOut, Version, chain, relative
from kvbuffer_compile.passes.reading.arguments import shape
from kvbuffer_compile.passes.reading.forms import WIDEST_BLOCK
from kvbuffer_compile.passes.reading.labels import Atom, TokenAtom, hint, renamed, resolved
from kvbuffer_compile.passes.walk.order import DecayEvent, Event, Ordering, ReadEvent, Step, UpdateEvent
from kvbuffer_compile.passes.walk.walk import Walk

aten = torch.ops.aten


def at_once(walks: list[Walk], trial: Callable[[], Callable[[int, Walk], object]]) -> set[Node]:
    """The states that all tokens of a call read at once. trial: gives what raises Refusal if the walk that is to stand
    in the place of the i-th makes no program."""
    blocks = [as_block(walk) for walk in walks]
    if not any(blocks):
        return set()
    attempt, found = trial(), set()
    for i, walk in enumerate(blocks):
        with suppress(Refusal):
            if walk is not None:
                attempt(i, walk)
                found.add(walk.state)
    return found


def as_block(walk: Walk) -> Walk | None:
    """The walk with its reads by the tokens of a block; None when they are not all by equally many queries."""
    foreign = {node: _foreign(walk, read) for node, read in walk.reads.items()}
    found = [atoms[0] for atoms in foreign.values() if len(atoms) == 1 and atoms[0].at is None]
    if walk.sequence is not None or walk.apart or walk.after is None or len(found) < len(foreign) or not found:
        return None
    size = found[0].size
    if any(a.size != size for a in found) or hint(size, next(iter(walk.reads)).meta["val"].shape) > WIDEST_BLOCK:
        return None
    block = copy(walk)
    block.block = token = TokenAtom(size)
    block.reads = {node: _by_tokens(read, foreign[node][0], token) for node, read in walk.reads.items()}
    return block


def _foreign(walk: Walk, read: ReadOut) -> list[Atom]:
    own = walk.own_atoms
    return [a for dim in resolved(read.labels) for a in dim if a not in own]


def _by_tokens(read: ReadOut, atom: Atom, token: Atom) -> ReadOut:
    factors = tuple(counted(f, atom, token) for f in read.factors)
    return replace(read, labels=renamed(read.labels, atom, token), factors=factors)


@dataclass(frozen=True)
class Within:
    """What the tokens of a block add to a read by each of them: sum_s <x[t], met[s]> free[s], times post[t]."""

    x: Expr
    met: Expr
    free: Expr
    post: Expr
    key: bool

    @property
    def exprs(self) -> tuple[Expr, ...]:
        return (self.x, self.met, self.free, self.post)


class BlockOrdering(Ordering):
    """The events of a block: its reads, of the old state, then decays and updates. within: by read, once they are
    made."""

    def __init__(self, walk: Walk, factoring: Factoring) -> None:
        super().__init__(walk, factoring)
        self.within: dict[Node, list[Within]] = {}

    def events(self) -> list[Event]:
        after = self.walk.after
        assert after is not None
        root = chain(after.version)[0]
        reads = [self._old(read, root) for read in self.walk.reads.values()]
        step = Step(*relative(after.version, root), after.version.node, [])
        behind = Step([after.factors], [], after.version.node, [])
        return [*reads, *self._once(step, 0), *self._updates(step), *self._once(behind, -1)]

    def _once(self, step: Step, at: int) -> list[Event]:
        return [replace(e, once=at) for e in self._decay(step) if isinstance(e, DecayEvent)]

    def _old(self, read: ReadOut, root: Version) -> Event:
        decays, addends = relative(read.version, root)
        self.within[read.node] = [w for a in addends for t in self.factoring.terms(a) for w in self._within(t, read)]
        fetched = self._fetched(read, [(*t, *read.factors) for t in decays], 0)
        if not fetched:
            raise Refusal(read.node, "block", "a read of a block is none of the state")
        return ReadEvent(read.node, add(*fetched), 0)

    def _within(self, term: Term, read: ReadOut) -> list[Within]:
        axis = self._axis(read)
        left, right = self._sides(term)
        met, free = (left, right) if axis == "key" else (right, left)
        return [
            Within(x, met, free, post, axis == "key")
            for x, post in (self._split(t, axis) for t in self.factoring.terms(read.factors))
        ]

    def _sides(self, term: Term) -> tuple[Expr, Expr]:
        if not any(_is_counted(leaf) for f in term for leaf in leaves(f)):
            reason = "beside a product over the tokens of a block something is added once: give it a token of its own"
            raise Refusal(self.walk.state, "block", reason)
        return super()._sides(term)


def separate(events: list[Event], within: dict[Node, list[Within]]) -> None:
    """Refusal when an update needs a read with what the block adds to it, which is known behind the step only."""
    for event in events:
        for expr in (event.left, event.right) if isinstance(event, UpdateEvent) else ():
            for leaf in leaves(expr):
                if within.get(leaf.node):
                    reason = (
                        "what a block adds to the state depends on a read of what it has added before: read the state "
                        "before the first product is added to it, or make two calls of it"
                    )
                    raise Refusal(leaf.node, "block", reason)


def _is_counted(leaf: Leaf) -> bool:
    return any(isinstance(a, TokenAtom) for dim in resolved(leaf.labels) for a in dim)


def sum_within(operands: Operands, parts: list[Within]) -> Node | None:
    """The node of all that a block adds to a read, [*lanes, T, V or K]; None for nothing."""
    total: Node | None = None
    for part in parts:
        one = _product(operands, part)
        total = one if total is None else operands.inserter.call(aten.add.Tensor, total, one)
    return total


def _product(operands: Operands, part: Within) -> Node:
    call, along, other = operands.inserter.call, _kind(part.key), _kind(not part.key)
    x, met, free = (_full(operands, e, k) for e, k in ((part.x, along), (part.met, along), (part.free, other)))
    scores = call(aten.bmm.default, _flat(operands, x), call(aten.permute.default, _flat(operands, met), [0, 2, 1]))
    out = call(aten.bmm.default, scores, _flat(operands, free))
    out = call(aten.reshape.default, out, [operands.inserter.size(n) for n in shape(free)])
    return out if part.post == 1 else call(aten.mul.Tensor, out, _full(operands, part.post, other))


def _kind(key: bool) -> Kind:
    return "key" if key else "value"


def _full(operands: Operands, expr: Expr, kind: Kind) -> Node:
    """A value of all tokens along an axis and all lanes, [*lanes, T, K or V]."""
    insert, place, own = operands.inserter, operands.place, operands.kind(expr)
    if own not in ("scalar", kind):
        raise Refusal(leaves(expr)[0].node, "block", "a sum over the tokens of a block mixes rows and columns")
    node = operands.converted(operands.node(expr, own))
    node = insert.call(aten.unsqueeze.default, node, -1) if own == "scalar" else node
    assert operands.token is not None
    sizes = [*map(insert.product, place.lanes), insert.size(operands.token.size), place.sizes[kind == "value"]]
    return insert.call(aten.expand.default, node, sizes)


def _flat(operands: Operands, node: Node) -> Node:
    """All lanes as one, [lanes, T, K or V]."""
    return operands.inserter.call(aten.reshape.default, node, [-1, *map(operands.inserter.size, shape(node)[-2:])])


def once(operands: Operands, node: Node, at: int) -> Node:
    """The factor of one token, and 1 for all others. node: [*lanes, T(, K or V)]; at: 0 or -1."""
    assert operands.token is not None
    insert, lanes = operands.inserter, len(operands.place.lanes)
    place = insert.call(aten.arange.default, insert.size(operands.token.size), device=operands.device)
    place = place if at == 0 else insert.call(aten.flip.default, place, [0])
    here = insert.call(aten.eq.Scalar, place, 0)
    for _ in shape(node)[lanes + 1 :]:
        here = insert.call(aten.unsqueeze.default, here, -1)
    return insert.call(aten.where.ScalarOther, here, node, 1.0)
