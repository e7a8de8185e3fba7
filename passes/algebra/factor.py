"""Writing a value as a sum of products in which no factor runs along both axes of the state.

A value that does not vary along both is a leaf, whatever computed it; only values that do are opened. Expressions come
back with every leaf peeled of its views.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product as cross

from torch.fx import Node

from kvbuffer_compile.passes.algebra.refusals import mentioned, prefill
from kvbuffer_compile.passes.algebra.terms import (
    Call,
    Expr,
    Factor,
    Leaf,
    Mask,
    Number,
    Refusal,
    Term,
    counted,
    held,
    leaves,
    mean,
    product,
)
from kvbuffer_compile.passes.reading.arguments import shape
from kvbuffer_compile.passes.reading.aten import read
from kvbuffer_compile.passes.reading.forms import (
    WIDEST,
    Cast,
    Choice,
    Contract,
    Operand,
    Pointwise,
    Product,
    Quotient,
    Reduce,
    Sum,
)
from kvbuffer_compile.passes.reading.labels import Atom, Dim, Labels, aligned, fresh, resolve
from kvbuffer_compile.passes.reading.variation import Values, can_peel, is_zero, pull, unreduced

EXP = "aten.exp.default"


@dataclass(frozen=True)
class Axes:
    """The key (row) and the value (column) axis of the state, as atoms; they may be split later."""

    key: Dim
    value: Dim

    def of(self, atoms: Iterable[Atom]) -> frozenset[str]:
        """Which of the axes "key" and "value" these atoms run along."""
        met = frozenset(resolve(atoms))
        named = (("key", self.key), ("value", self.value))
        return frozenset(name for name, axis in named if not met.isdisjoint(resolve(axis)))


class Factoring:
    """Factorisation for one choice of axes. Raises Refusal("full-rank") with the node that cannot be opened.

    token: the index of the tokens of a block. A sum over as many is one over its tokens, and stays one term.
    """

    def __init__(self, values: Values, axes: Axes, token: Atom | None = None) -> None:
        self.values = values
        self.axes = axes
        self.token = token

    def along(self, factor: Factor) -> frozenset[str]:
        """The axes along which a factor may vary."""
        return self.axes.of(a for leaf in leaves(factor) for a in self.values.vary(leaf.node, leaf.labels))

    def terms(self, term: Term) -> list[Term]:
        """A product of any factors as a sum of products of one-axis factors."""
        return [self._joined(choice) for choice in self._cross([self.factor(f) for f in term])]

    def factor(self, factor: Factor) -> list[Term]:
        """One factor as such a sum."""
        match factor:
            case Mask(condition, _):
                if len(self.along(condition)) > 1:
                    raise _full(condition)
                return [(factor,)]
            case Leaf(node, labels):
                return self.open(node, labels)
            case Call(_, args) if len(self.along(factor)) > 1:
                return [self._inverted(self._single(self.factor(args[0]), factor))]  # only reciprocals come here
            case _:
                return [(factor,)]

    def shared(self, factor: Factor) -> Term:
        """A factor without the per-head scalars that alone keep it from being shared by a group of heads."""
        if not isinstance(factor, Leaf):
            return (factor,)
        node, labels = factor.node, factor.labels
        while can_peel(read(node)) or isinstance(read(node), Cast):
            inner = pull(node, labels)
            if not inner:
                return (factor,)
            node, labels = inner[0]
        form = read(node)
        if isinstance(form, Product) and isinstance(form.x, Node) and isinstance(form.y, Node):
            whole = self.values.vary(node, labels)
            for x, y in ((form.x, form.y), (form.y, form.x)):
                kept, scalar = (Leaf(*self.values.peel(z, aligned(labels, shape(z)))) for z in (x, y))
                if not self.along(scalar) and self.values.vary(kept.node, kept.labels) < whole:
                    return (*self.shared(kept), scalar)
        return (factor,)

    def open(self, node: Node, labels: Labels) -> list[Term]:
        """A node in labelled use as such a sum."""
        if is_zero(node):
            return []
        if len(self.axes.of(self.values.vary(node, labels))) < 2:
            return [(Leaf(*self.values.peel(node, labels)),)]
        if node in self.values.stops:
            raise _full(Leaf(node, labels))
        return self._bounded(node, self._opened(node, labels))

    def _opened(self, node: Node, labels: Labels) -> list[Term]:
        form = read(node)
        match form:
            case Product(x, y):
                return self._product(self._operand(x, labels), self._operand(y, labels))
            case Quotient(x, y):
                below = self._single(self._operand(y, labels), Leaf(node, labels))
                return self._product(self._operand(x, labels), [self._inverted(below)])
            case Sum(x, y, scale):
                return self._operand(x, labels) + self._product(self._operand(y, labels), [(scale,)])
            case Choice(condition, x, y):
                return self._choice(condition, x, y, labels)
            case Contract():
                return self._contract(form, labels)
            case Reduce():
                return self._reduce(form, labels)
            case Pointwise(fn, (Node() as x,)) if fn == EXP:
                return [tuple(self._exp(t, Leaf(node, labels)) for t in self._operand(x, labels))]
        inner = pull(node, labels) if can_peel(form) or (isinstance(form, Cast) and form.exact) else None
        if inner is None:
            raise _full(Leaf(node, labels))
        return self.open(*inner[0]) if inner else []

    def _operand(self, x: Operand, labels: Labels) -> list[Term]:
        if isinstance(x, Node):
            return self.open(x, aligned(labels, shape(x)))
        return [] if x == 0 else [(x,)]

    def _choice(self, condition: Node, x: Operand, y: Operand, labels: Labels) -> list[Term]:
        chosen = Leaf(*self.values.peel(condition, aligned(labels, shape(condition))))
        self.factor(Mask(chosen, True))
        kept = self._product(self._operand(x, labels), [(Mask(chosen, True),)])
        return kept + self._product(self._operand(y, labels), [(Mask(chosen, False),)])

    def _contract(self, form: Contract, labels: Labels) -> list[Term]:
        left, right, out = form.letters
        size = shape(form.x)[left.index("c")]
        index = fresh([size])[0]
        env = dict(zip(out, labels, strict=True), c=index)
        sides = [(form.x, tuple(env[i] for i in left)), (form.y, tuple(env[i] for i in right))]
        terms = self._product(self.open(*sides[0]), self.open(*sides[1]))
        return self._summed(form.x, terms, index)

    def _reduce(self, form: Reduce, labels: Labels) -> list[Term]:
        if form.fn not in ("sum", "mean"):
            raise _full(Leaf(form.x, ()))
        inner = unreduced(shape(form.x), form.dims, form.keep, labels)
        index = tuple(a for i in form.dims for a in inner[i])
        terms = self._summed(form.x, self.open(form.x, inner), index)
        if form.fn == "sum":
            return terms
        return self._product(terms, [(mean(form.x, resolve(index)),)])

    def _summed(self, node: Node, terms: list[Term], index: Dim) -> list[Term]:
        """The terms with a contracted index held at each of its positions in turn."""
        for atom in resolve(index):
            if self.token is not None and atom.size == self.token.size:
                terms = [tuple(counted(f, atom, self.token) for f in t) for t in terms]
                continue
            if not isinstance(atom.size, int) or atom.size * len(terms) > WIDEST:
                raise prefill(node, atom.size, "products of a key and a value are added to the state")
            terms = [tuple(held(f, atom, i) for f in t) for t in terms for i in range(atom.size)]
        return terms

    def _exp(self, term: Term, where: Leaf) -> Factor:
        """exp of one product of a sum; the exp of the sum is the product of these."""
        whole = product(term)
        if len(self.along(whole)) > 1:
            raise _full(where)
        return Call(EXP, (whole,))

    def _single(self, terms: list[Term], where: Expr) -> Term:
        if len(terms) != 1 or any(isinstance(f, Mask) for f in terms[0]):
            raise _full(where)
        return terms[0]

    def _inverted(self, term: Term) -> Term:
        return tuple(_inverse(f) for f in term)

    def _product(self, x: list[Term], y: list[Term]) -> list[Term]:
        return [self._joined(pair) for pair in cross(x, y)]

    def _cross(self, sums: list[list[Term]]) -> Iterable[tuple[Term, ...]]:
        count = 1
        for terms in sums:
            count *= len(terms)
        if count > WIDEST:
            raise _full(next(f for terms in sums if len(terms) > 1 for f in terms[0]))
        return cross(*sums)

    def _joined(self, terms: Iterable[Term]) -> Term:
        """One product out of several, its numbers folded into one."""
        number: Number = 1
        rest: list[Factor] = []
        for f in (f for t in terms for f in t):
            if isinstance(f, int | float):
                number = number * f
            else:
                rest.append(f)
        return tuple(rest) if number == 1 else (*rest, number)

    def _bounded(self, node: Node, terms: list[Term]) -> list[Term]:
        if len(terms) > WIDEST:
            raise _full(Leaf(node, ()))
        return terms


def _inverse(f: Factor) -> Factor:
    match f:
        case Call("aten.reciprocal.default", (x,)):
            return x
        case Call() | Leaf():
            return Call("aten.reciprocal.default", (f,))
        case int() | float():
            return 1 / f
        case _:
            raise AssertionError(f)


def _full(where: Factor) -> Refusal:
    found = leaves(where)
    node = found[0].node
    reason = (
        f"what is added to the state is no sum of at most {WIDEST} products of a row and a column: add outer products "
        "of vectors"
    )
    if node.op == "placeholder":
        reason = (
            f"another tensor as large as the state{mentioned(node)} is added to it, whole: if it is the product of a "
            "key and a value (of the token before), keep those two vectors and add their product; else no few rows can "
            "stand for it, and there is nothing to be done"
        )
    return Refusal(node, "full-rank", reason)
