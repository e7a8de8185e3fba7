"""From the versions and reads of a walk to a program's events: which axes, which decay, in which order.

The chain is the line of versions that every path from the next state back to the state goes through. Reads of a
version beside the chain are moved onto it: with v the nearest chain version,

    value = v * f + sum(l r^T)        gives        S^T x  =  post * Read(f x) + sum <l, x> r

and the correction is a small dot product of fresh operands, which is what a buffered state wants.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby

from torch.fx import Node

from kvbuffer_compile.passes.algebra.factor import Axes, Factoring
from kvbuffer_compile.passes.algebra.terms import (
    Call,
    Expr,
    Factor,
    Fetch,
    Mask,
    Ones,
    Refusal,
    Term,
    add,
    mul,
    product,
    settled,
    settled_factor,
)
from kvbuffer_compile.passes.algebra.versions import ReadOut, Version, chain, relative
from kvbuffer_compile.passes.reading.labels import Atom, Dim, resolve
from kvbuffer_compile.passes.walk import words
from kvbuffer_compile.passes.walk.walk import Walk

SUM = "aten.sum.dim_IntList"


@dataclass(frozen=True)
class ReadEvent:
    """The value of a read node. Its Fetches happen here."""

    node: Node
    value: Expr
    stage: int


@dataclass(frozen=True)
class DecayEvent:
    """once: of the tokens of a block, the one in whose turn it happens."""

    factor: Expr
    node: Node
    once: int | None = None


@dataclass(frozen=True)
class UpdateEvent:
    left: Expr
    right: Expr
    node: Node


Event = ReadEvent | DecayEvent | UpdateEvent


# ------------------------------------------------------------------------------------------------- axes


def choices(walk: Walk) -> Iterator[Axes]:
    """Possible axes, the preferred ones first. Refusal when the reads leave none.

    Each set of indices that reads contract is an axis: the last read's is the key axis. With one set, the value axis is
    any other; the innermost comes first, because it leaves the decay a scalar where heads would do as well.
    """
    home = [a for dim in walk.home for a in resolve(dim)]
    sets = list(dict.fromkeys(frozenset(resolve(r.contracted)) for r in walk.reads.values()))
    if sum(len(s) for s in sets) != len(frozenset().union(*sets)):
        reason = "reads contract overlapping sets of the state's axes: each must be by a key along one whole axis"
        raise Refusal(_last(walk), "both-axes", reason)
    if len(sets) > 2:
        reason = "reads contract three different axes of the state: a matrix state has rows and columns, and heads"
        raise Refusal(_last(walk), "three-axes", reason)
    key = frozenset(resolve(walk.reads[_last(walk)].contracted)) if walk.reads else _inner(walk)
    if len(sets) == 2:
        yield Axes(_ordered(home, key), _ordered(home, next(s for s in sets if s != key)))
        return
    seen = set()
    for value in _values(walk, key):
        if value not in seen:
            seen.add(value)
            yield Axes(_ordered(home, key), value)
    if not seen:
        raise Refusal(walk.state, "vector", words.VECTOR)


def _last(walk: Walk) -> Node:
    return list(walk.reads)[-1] if walk.reads else walk.state


def _inner(walk: Walk) -> frozenset[Atom]:
    """Without reads: the axis before the last."""
    dims = [resolve(d) for d in walk.home if d]
    if len(dims) < 2:
        raise Refusal(walk.state, "vector", words.VECTOR)
    return frozenset(dims[-2])


def _ordered(home: list[Atom], axis: frozenset[Atom]) -> Dim:
    return tuple(filter(axis.__contains__, home))


def _values(walk: Walk, key: frozenset[Atom]) -> Iterator[Dim]:
    """Candidates for the value axis: what is left of each dim, then single indices, innermost first."""
    left = [tuple(a for a in resolve(dim) if a not in key) for dim in reversed(walk.home)]
    yield from (dim for dim in left if dim)
    yield from ((a,) for dim in left for a in reversed(dim))


# ------------------------------------------------------------------------------------------------ chain


@dataclass
class Step:
    """What leads from one chain version to the next, and the reads of the first one."""

    decays: list[Term]
    addends: list[Term]
    node: Node
    reads: list[ReadOut]


def steps(walk: Walk) -> list[Step]:
    """The chain, its reads sorted to the version they can be served from."""
    assert walk.after is not None
    line = chain(walk.after.version)
    out = [Step(*relative(new, old), new.node, []) for old, new in zip(line, line[1:], strict=False)]
    out.append(Step([walk.after.factors], [], line[-1].node, []))
    at = {version: step for version, step in zip(line, out, strict=True)}
    for read in walk.reads.values():
        at[_anchor(read.version, at)].reads.append(read)
    return out


def _anchor(version: Version, line: Iterable[Version]) -> Version:
    on = set(line)
    while version not in on:
        assert version.base is not None
        version = version.base
    return version


# ----------------------------------------------------------------------------------------------- events


class Ordering:
    """The events of a walk for one choice of axes. Refusal when something does not factorise."""

    def __init__(self, walk: Walk, factoring: Factoring) -> None:
        self.walk = walk
        self.factoring = factoring
        self.axes = factoring.axes

    def events(self) -> list[Event]:
        """In order: for each step the reads of the undecayed state, its decay, reads of the decayed one, updates."""
        line = chain(self.walk.after.version) if self.walk.after else []
        out: list[Event] = []
        for i, (version, step) in enumerate(zip(line, steps(self.walk), strict=True)):
            late = [r for r in step.reads if self._sees(r, version, step)]
            out += [self._read(r, version, (), 2 * i) for r in step.reads if r not in late]
            out += self._decay(step)
            out += [self._read(r, version, step.decays[0], 2 * i + 1) for r in late]
            out += self._updates(step)
        return _joined(out, self._along)

    def _sees(self, read: ReadOut, version: Version, step: Step) -> bool:
        """Whether every path of the read to this version goes through the step's decay."""
        if len(step.decays) != 1 or not step.decays[0]:
            return False
        decays, _ = relative(read.version, version)
        return all(_without((*t, *read.factors), step.decays[0]) is not None for t in decays)

    def _decay(self, step: Step) -> list[Event]:
        try:
            terms = [t for d in step.decays for t in self.factoring.terms(d)]
        except Refusal as error:
            raise _full_decay(error.node if error.node.op == "call_function" else step.node) from None
        if terms == [()]:
            return []
        if len(terms) == 1:
            both = [[f for f in terms[0] if ("value" in self._along(f)) == v] for v in (False, True)]
            return [DecayEvent(product(tuple(fs)), step.node) for fs in both if fs]
        total = add(*(product(t) for t in terms))
        if len(self.factoring.along(total)) > 1:
            raise _full_decay(step.node)
        return [DecayEvent(total, step.node)]

    def _updates(self, step: Step) -> list[Event]:
        try:
            terms = [t for a in step.addends for t in self.factoring.terms(a)]
        except Refusal as error:
            reason = words.MIXED if error.node is self.walk.state else error.reason
            raise Refusal(step.node, error.rule, reason) from None
        merged: dict[Expr, list[Expr]] = {}
        for term in terms:
            left, right = self._sides(term)
            merged.setdefault(settled(left), []).append(right)
        return [UpdateEvent(left, add(*rights), step.node) for left, rights in merged.items()]

    def _sides(self, term: Term) -> tuple[Expr, Expr]:
        """Row factors left, the rest (numbers and per-head scalars too) right. Masks of neither axis go on both."""
        rows = [f for f in term if "key" in self._along(f)]
        bare = [f for row in rows for f in self.factoring.shared(row)]
        left = [f for f in bare if "key" in self._along(f)]
        right = [f for f in bare if f not in left] + [f for f in term if f not in rows]
        left += [f for f in right if isinstance(f, Mask) and not self._along(f)]
        return product(tuple(left)), product(tuple(right))

    def _read(self, read: ReadOut, version: Version, decay: Term, stage: int) -> Event:
        decays, addends = relative(read.version, version)
        terms = [_without((*t, *read.factors), decay) for t in decays]
        fetched = self._fetched(read, [t for t in terms if t is not None], stage)
        fixes = [self._fix(t, self._axis(read)) for a in addends for t in self.factoring.terms((*a, *read.factors))]
        return ReadEvent(read.node, add(*fetched, *fixes), stage)

    def _fetched(self, read: ReadOut, terms: list[Term], stage: int) -> list[Expr]:
        """Reads by these products, those with one factor behind them together."""
        axis, keys = self._axis(read), dict[Expr, list[Expr]]()
        for term in (t for whole in terms for t in self.factoring.terms(whole)):
            x, post = self._split(term, axis)
            keys.setdefault(settled(post), []).append(x)
        return [mul(Fetch(add(*xs), axis == "key", stage), post) for post, xs in keys.items()]

    def _axis(self, read: ReadOut) -> str:
        return next(iter(self.axes.of(read.contracted)))

    def _split(self, term: Term, axis: str) -> tuple[Expr, Expr]:
        """What is contracted (per-head scalars too), and what multiplies the result."""
        outer = [f for f in term if not self._along(f) <= {axis}]
        return product(tuple(f for f in term if f not in outer)), product(tuple(outer))

    def _fix(self, term: Term, axis: str) -> Expr:
        """What one addend contributes to a read."""
        inner = tuple(f for f in term if axis in self._along(f))
        outer = tuple(f for f in term if f not in inner)
        met = product(inner) if inner else Ones(axis == "key")
        return mul(Call(SUM, (met,)), product(outer))

    def _along(self, factor: Factor) -> frozenset[str]:
        return self.factoring.along(factor)


def _joined(events: list[Event], axes_of: Callable[[Expr], frozenset[str]]) -> list[Event]:
    """Neighbouring updates with one key are one, neighbouring decays along one axis too; those by 1 vanish."""
    out: list[Event] = []
    for kind, run in groupby(events, key=type):
        if kind is DecayEvent:
            out += _decays([e for e in run if isinstance(e, DecayEvent)], axes_of)
            continue
        for event in run:
            last = out[-1] if out else None
            if (
                isinstance(event, UpdateEvent)
                and isinstance(last, UpdateEvent)
                and settled(last.left) == settled(event.left)
            ):
                out[-1] = UpdateEvent(last.left, add(last.right, event.right), last.node)
            else:
                out.append(event)
    return out


def _decays(run: list[DecayEvent], axes_of: Callable[[Expr], frozenset[str]]) -> list[Event]:
    """At most one decay of rows and one of columns; factors of whole heads go with either."""
    rows, columns = ([e for e in run if axis in axes_of(e.factor)] for axis in ("key", "value"))
    heads = [e for e in run if e not in rows and e not in columns]
    parts = ([*heads, *rows], columns) if rows or not columns else (rows, [*heads, *columns])
    merged = [(mul(*(e.factor for e in part)), part[0].node) for part in parts if part]
    return [DecayEvent(factor, node) for factor, node in merged if factor != 1]


def _without(term: Term, decay: Term) -> Term | None:
    """The product with these factors taken out, None when it does not have them all."""
    wanted = Counter(settled_factor(f) for f in decay)
    rest = []
    for f in term:
        if wanted[settled_factor(f)] > 0:
            wanted[settled_factor(f)] -= 1
        else:
            rest.append(f)
    return None if wanted.total() > 0 else tuple(rest)


def _full_decay(node: Node) -> Refusal:
    return Refusal(node, "full-decay", words.FULL_DECAY)
