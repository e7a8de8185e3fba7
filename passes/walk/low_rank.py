"""A state times a matrix that is a sum of few products: S (a b^T) becomes (S a) b^T, on the copy of the graph.

RWKV-7 writes its removal so: S * w + S @ ab + v k^T. What looks like a read by as many queries as the matrix has
columns is one read by a, and b the key of an update.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch.fx import Node

from kvbuffer_compile.ir.plan import Layout
from kvbuffer_compile.ir.program import Kind
from kvbuffer_compile.passes.algebra.coordinates import Coordinates
from kvbuffer_compile.passes.algebra.factor import Axes, Factoring
from kvbuffer_compile.passes.algebra.operands import Inserter, Operands
from kvbuffer_compile.passes.algebra.terms import Factor, Leaf, Mask, Refusal, Term, product
from kvbuffer_compile.passes.algebra.versions import ReadOut
from kvbuffer_compile.passes.reading.arguments import shape
from kvbuffer_compile.passes.reading.aten import read
from kvbuffer_compile.passes.reading.counterparts import instead
from kvbuffer_compile.passes.reading.forms import Contract
from kvbuffer_compile.passes.reading.labels import Atom, resolve, resolved
from kvbuffer_compile.passes.reading.variation import Values
from kvbuffer_compile.passes.walk.walk import Walk

aten = torch.ops.aten


def reassociated(walks: Iterable[Walk], insert: Inserter) -> bool:
    """Give every product of a state with such a matrix the other order. Whether there was one: then walk again."""
    found = {node: made for walk in walks for node, out in walk.reads.items() if (made := _product(walk, node, out))}
    for one in found.values():
        one.replace(insert)
    return bool(found)


def _product(walk: Walk, node: Node, out: ReadOut) -> _Product | None:
    """A read of a state as the product with a matrix of lower rank than columns; None when it is none."""
    form = read(node)
    foreign = [a for dim in resolved(out.labels) for a in dim if not walk.own([a])]
    contracted = resolve(out.contracted)
    if not isinstance(form, Contract) or len(foreign) != 1 or len(contracted) != 1 or foreign[0].at is not None:
        return None
    matrix = out.factors[-1]  # the other operand of the contraction
    if not isinstance(matrix, Leaf) or {form.x, form.y} != {matrix.node, *_images(walk, form)}:
        return None
    values, axes = Values(walk.reads), Axes(contracted, (foreign[0],))
    factoring = Factoring(values, axes)
    if len(factoring.along(matrix)) < 2:
        return None
    try:
        terms = factoring.open(matrix.node, matrix.labels)
    except Refusal:
        return None
    size = foreign[0].size
    if isinstance(size, int) and len(terms) >= size:
        return None
    return _Product(walk, node, form, matrix, contracted[0], foreign[0], factoring, terms)


def _images(walk: Walk, form: Contract) -> list[Node]:
    return [x for x in (form.x, form.y) if x in walk.values]


@dataclass(frozen=True)
class _Product:
    """node = an image of the state times `matrix`, summed over the index `old`; `new` is the one the matrix brings."""

    walk: Walk
    node: Node
    form: Contract
    matrix: Leaf
    old: Atom
    new: Atom
    factoring: Factoring
    terms: list[Term]

    def replace(self, insert: Inserter) -> None:
        """sum of (S a) b^T for the terms a b^T of the matrix, in the place of the product."""
        users = list(self.node.users)
        parts = [self._term(insert, term) for term in self.terms]
        whole = parts[0] if parts else insert.call(aten.zeros_like.default, self.node)
        for part in parts[1:]:
            whole = insert.call(aten.add.Tensor, whole, part)
        if whole.meta["val"].dtype != self.node.meta["val"].dtype:
            dtype = self.node.meta["val"].dtype
            whole = insert.call(torch.ops.prims.convert_element_type.default, whole, dtype)
        instead(whole, self.node)
        for user in users:
            user.replace_input_with(self.node, whole)

    def _term(self, insert: Inserter, term: Term) -> Node:
        """(S a) b^T in the dims of the product."""
        column = [f for f in term if "key" in self.factoring.along(f)]
        row = [f for f in term if f not in column]
        column += [f for f in row if isinstance(f, Mask) and not self.factoring.along(f)]
        a, b = self._vector(insert, column, "key"), self._vector(insert, row, "value")
        state_first = self.form.x in self.walk.values
        x = self.form.x if state_first else self.form.y
        a = _as(insert, insert.call(aten.unsqueeze.default, a, -1 if state_first else -2), x)
        b = insert.call(aten.unsqueeze.default, b, -2 if state_first else -1)
        target = aten.bmm.default if "b" in self.form.letters[0] else aten.mm.default
        y = insert.call(target, x, a) if state_first else insert.call(target, a, x)
        return insert.call(aten.mul.Tensor, y, b)

    def _vector(self, insert: Inserter, factors: list[Factor], kind: Kind) -> Node:
        """A product of factors, [b, n], or [n] without a dim of the batch."""
        batched = "b" in self.form.letters[0]
        dim = resolved(self.matrix.labels)[0] if batched else ()
        lanes = tuple((a,) for a in dim if a.at is None)
        place = Coordinates(Layout((), ()), lanes, (self.old,), (self.new,), (0, 0))
        operands = Operands(insert, place, self.factoring.values, self.walk.state, None)
        node = operands.node(product(tuple(factors)), kind)
        axis = self.old if kind == "key" else self.new
        sizes = [insert.size(a.size) for (a,) in lanes] + [insert.size(axis.size)]
        node = insert.call(aten.expand.default, node, sizes)
        head = [insert.size(shape(self.node)[0])] if batched else []
        return insert.call(aten.reshape.default, node, [*head, sizes[-1]])


def _as(insert: Inserter, node: Node, like: Node) -> Node:
    dtype = like.meta["val"].dtype
    if node.meta["val"].dtype == dtype:
        return node
    return insert.call(torch.ops.prims.convert_element_type.default, node, dtype)
