"""The states of several tokens, each given in terms of the first one, as a chain: each in terms of the one before.

A scan that combines tokens in pairs, or in any other order, leaves S_t = a_1 ... a_t S_0 + sum_i a_(i+1) ... a_t b_i.
All versions are written out as such sums over S_0, with factors taken apart as far as they go, and sorted by length. If
each is then the one before times something, plus more, that is the chain: S_t = a_t S_(t-1) + b_t.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from copy import copy
from dataclasses import dataclass, replace
from functools import reduce
from math import isclose

from torch.fx import Node

from kvbuffer_compile.passes.algebra.factor import EXP, Factoring
from kvbuffer_compile.passes.algebra.terms import Call, Factor, Leaf, Mask, Ones, Refusal, Term, leaves, settled_factor
from kvbuffer_compile.passes.algebra.versions import Version, chain
from kvbuffer_compile.passes.reading.arguments import shape
from kvbuffer_compile.passes.reading.aten import read
from kvbuffer_compile.passes.reading.forms import (
    WIDEST,
    Cast,
    Constant,
    Cumulative,
    Operand,
    Pointwise,
    Product,
    Quotient,
    Sum,
)
from kvbuffer_compile.passes.reading.labels import Labels, aligned, pinned, position
from kvbuffer_compile.passes.walk.walk import Walk

RECIPROCAL = "aten.reciprocal.default"
MOST = 2 * WIDEST  # terms of a version


@dataclass(frozen=True)
class Monomial:
    """A product: its factors, each as often as it occurs, and a number."""

    factors: Counter[Factor]
    number: float

    def times(self, other: Monomial) -> Monomial:
        return Monomial(self.factors + other.factors, self.number * other.number)

    def over(self, other: Monomial) -> Monomial | None:
        """The quotient, None when it is no product."""
        if not other.factors <= self.factors or other.number == 0:
            return None
        return Monomial(self.factors - other.factors, self.number / other.number)

    def equals(self, other: Monomial) -> bool:
        return self.factors == other.factors and isclose(self.number, other.number, rel_tol=1e-12)

    @property
    def inverse(self) -> Monomial:
        factors: Counter[Factor] = Counter()
        for factor, count in self.factors.items():
            if isinstance(factor, Mask | Ones):
                raise Refusal(leaves(factor)[0].node, "full-rank", "a quotient by a mask")
            below = isinstance(factor, Call) and factor.fn == RECIPROCAL
            factors[factor.args[0] if below else Call(RECIPROCAL, (factor,))] = count  # type: ignore[union-attr]
        return Monomial(factors, 1 / self.number)

    @property
    def term(self) -> Term:
        factors = tuple(self.factors.elements())
        return factors if self.number == 1 else (*factors, self.number)


ONE = Monomial(Counter(), 1)


@dataclass(frozen=True)
class Written:
    """decay * S_0 + sum(addends)."""

    decay: Monomial
    addends: list[Monomial]

    @property
    def length(self) -> tuple[int, int]:
        return len(self.addends), self.decay.factors.total()

    def after(self, other: Written) -> tuple[Monomial, list[Monomial]] | None:
        """c and more, with self = c * other + more."""
        c = self.decay.over(other.decay)
        if c is None:
            return None
        more = list(self.addends)
        for addend in other.addends:
            carried = addend.times(c)
            at = next((i for i, x in enumerate(more) if x.equals(carried)), None)
            if at is None:
                return None
            del more[at]
        return c, more


def chained(walk: Walk, factoring: Factoring) -> Walk:
    """The walk with its versions as a chain, where reads are of versions beside it and all of them make one."""
    assert walk.after is not None
    read_from = {read.version for read in walk.reads.values()}
    if read_from <= set(chain(walk.after.version)):
        return walk
    writing = _Writing(walk, factoring)
    try:
        found = {version: writing.version(version) for version in (*read_from, walk.after.version)}
    except Refusal:
        return walk
    line = _line(walk, found)
    if line is None:
        return walk
    new = copy(walk)
    new.after = replace(walk.after, version=line[walk.after.version])
    new.reads = {node: replace(read, version=line[read.version]) for node, read in walk.reads.items()}
    return new


def _line(walk: Walk, found: dict[Version, Written]) -> dict[Version, Version] | None:
    """A version in the chain for each of those found; None when they make none."""
    last, at = walk.root, Written(ONE, [])
    line: dict[Version, Version] = {}
    for version, written in sorted(found.items(), key=lambda item: item[1].length):
        step = written.after(at)
        if step is None:
            return None
        c, more = step
        if c.factors or c.number != 1 or more:
            last, at = Version(version.node, ((last, c.term),), tuple(m.term for m in more)), written
        line[version] = last
    return line


class _Writing:
    """Versions over the first one. Refusal when one is no such sum, or too long."""

    def __init__(self, walk: Walk, factoring: Factoring) -> None:
        self.factoring = factoring
        self.values = factoring.values
        self.known: dict[Version, Written] = {walk.root: Written(ONE, [])}

    def version(self, version: Version) -> Written:
        if version not in self.known:
            self.known[version] = self._version(version)
        return self.known[version]

    def _version(self, version: Version) -> Written:
        decays: list[Monomial] = []
        addends = [m for term in version.addends for m in self._monomials(term)]
        for parent, factors in version.terms:
            above, scale = self.version(parent), self._monomials(factors)
            decays += [above.decay.times(m) for m in scale]
            addends += [a.times(m) for a in above.addends for m in scale]
        if len(decays) != 1 or len(addends) > MOST:
            raise Refusal(version.node, "full-rank", "no sum of few products with the first state")
        return Written(decays[0], addends)

    def _monomials(self, term: Term) -> list[Monomial]:
        return [self._product(product) for product in self.factoring.terms(term)]

    def _product(self, factors: Iterable[Factor]) -> Monomial:
        return reduce(Monomial.times, (self._atoms(f) for f in factors), ONE)

    def _atoms(self, factor: Factor) -> Monomial:
        """A factor taken apart into factors that cannot be."""
        match factor:
            case int() | float():
                return Monomial(Counter(), factor)
            case Leaf(node, labels):
                return self._leaf(*self.values.peel(node, labels))
            case Call("aten.reciprocal.default", (x,)):
                return self._atoms(x).inverse
            case Call("aten.exp.default", (Leaf(node, labels),)):
                return self._exp(node, labels)
            case _:
                return _single(factor)

    def _leaf(self, node: Node, labels: Labels) -> Monomial:
        form = None if node in self.values.stops else read(node)
        match form:
            case Product(x, y):
                return self._operand(x, labels).times(self._operand(y, labels))
            case Quotient(x, y):
                return self._operand(x, labels).times(self._operand(y, labels).inverse)
            case Constant(float() as value):
                return Monomial(Counter(), value)
            case Cast(x, True):
                inner = self._operand(x, labels)
                return inner if inner.factors.total() != 1 or inner.number != 1 else _single(Leaf(node, labels))
            case Pointwise("aten.exp.default", (Node() as x,)):
                return self._exp(x, labels)
            case Cumulative(x, dim, "cumprod") if (at := position(labels[dim])) is not None:
                return self._product(Leaf(x, _held_at(x, labels, dim, i)) for i in range(at + 1))
        return _single(Leaf(node, labels))

    def _operand(self, x: Operand, labels: Labels) -> Monomial:
        return self._atoms(Leaf(x, aligned(labels, shape(x))) if isinstance(x, Node) else x)

    def _exp(self, node: Node, labels: Labels) -> Monomial:
        """exp of a sum: the product of those of its terms."""
        node, labels = self.values.peel(node, labels)
        form = None if node in self.values.stops else read(node)
        match form:
            case Sum(Node() as x, Node() as y, 1):
                sides = [(z, aligned(labels, shape(z))) for z in (x, y)]
            case Cumulative(x, dim, "cumsum") if (at := position(labels[dim])) is not None:
                sides = [(x, _held_at(x, labels, dim, i)) for i in range(at + 1)]
            case _:
                return _single(Call(EXP, (Leaf(node, labels),)))
        return reduce(Monomial.times, (self._exp(*side) for side in sides), ONE)


def _held_at(x: Node, labels: Labels, dim: int, at: int) -> Labels:
    return (*labels[:dim], pinned(shape(x)[dim], at), *labels[dim + 1 :])


def _single(factor: Factor) -> Monomial:
    return Monomial(Counter([settled_factor(factor)]), 1)
