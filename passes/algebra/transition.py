"""A state multiplied by a transition written out as a matrix: (Diag(a) - b k k^T) S.

The matrix must be a sum of products in which the identity keeps the state's index and everything else is a column
times a row: factors of the identity are decays, each row makes a read, its column is the key of an update of rank one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Node

from kvbuffer_compile.passes.algebra.factor import Axes, Factoring
from kvbuffer_compile.passes.algebra.operands import Inserter
from kvbuffer_compile.passes.algebra.terms import Call, Expr, Factor, Leaf, Mask, Refusal, Term, leaves
from kvbuffer_compile.passes.algebra.versions import Lin, ReadOut, Version
from kvbuffer_compile.passes.reading.arguments import shape, tensor
from kvbuffer_compile.passes.reading.aten import read
from kvbuffer_compile.passes.reading.forms import Cast, Choice, Operand, Pointwise
from kvbuffer_compile.passes.reading.labels import Atom, Dim, Labels, aligned, atoms_of, resolve, resolved
from kvbuffer_compile.passes.reading.variation import Values, is_zero

aten = torch.ops.aten
IDENTITY = Call("kronecker", ())  # 1 where the two indices of the matrix are equal, 0 elsewhere
_COUNTS = (torch.ops.prims.iota.default, aten.arange.default, aten.arange.start, aten.arange.start_step)


@dataclass(frozen=True)
class _Part:
    """One product of a matrix: factors that run along its rows, and the others."""

    rows: Term
    others: Term
    diagonal: bool


def applied(
    node: Node, lin: Lin, matrix: Leaf, index: Dim, free: list[Dim], labels: Labels
) -> tuple[Lin, list[ReadOut]] | None:
    """matrix times the image `lin`, summed over `index`: the image of a new version, and the reads it is made of.

    free: the indices that the matrix brings along; labels: those of the product. None when it is no such matrix.
    """
    index = resolve(index)
    if len(free) != 1 or len(index) != 1 or len(free[0]) != 1 or free[0][0].size != index[0].size:
        return None
    old, new = index[0], free[0][0]
    parts = _parts(matrix, new, old)
    if parts is None:
        return None
    out = tuple(index if dim == free[0] else dim for dim in resolved(labels))
    kept, addends, reads = [], [], []
    for part in parts:
        rows = tuple(_renamed(f, new, old) for f in part.rows)
        if part.diagonal:
            kept.append((lin.version, (*lin.factors, *rows, *part.others)))
        else:
            reads.append(_read(node, lin, part.others, old))
            addends.append((Leaf(reads[-1].node, reads[-1].labels), *rows))
    return Lin(Version(node, tuple(kept), tuple(addends)), out), reads


def _parts(matrix: Leaf, row: Atom, column: Atom) -> list[_Part] | None:
    """The products of a matrix; None without any identity among them, or when it is no sum of products."""
    opening = _Matrix(Values(), Axes((row,), (column,)))
    try:
        terms = opening.open(matrix.node, matrix.labels)
    except Refusal:
        return None
    parts = []
    for term in terms:
        rest = [f for f in term if f != IDENTITY]
        rows = tuple(f for f in rest if "key" in opening.along(f))
        parts.append(_Part(rows, tuple(f for f in rest if f not in rows), IDENTITY in term))
    return parts if any(p.diagonal for p in parts) else None


def _read(node: Node, lin: Lin, factors: Term, index: Atom) -> ReadOut:
    """A read that the graph has no node for: an empty one stands for it, which nothing ever computes."""
    labels = tuple(dim for dim in resolved(lin.labels) if index not in dim)
    value = tensor(node)
    assert value is not None
    insert = Inserter(node.graph)
    sizes = [insert.product(dim) for dim in labels]
    empty = insert.call(aten.empty.memory_format, sizes, dtype=value.dtype, device=value.device)
    return ReadOut(empty, lin.version, (*lin.factors, *factors), (index,), labels)


def _renamed(factor: Factor, new: Atom, old: Atom) -> Factor:
    match factor:
        case Mask(condition, keep):
            return Mask(_renamed_value(condition, new, old), keep)
        case _:
            return _renamed_value(factor, new, old)


def _renamed_value(expr: Expr, new: Atom, old: Atom) -> Expr:
    match expr:
        case Leaf(node, labels):
            return Leaf(node, tuple(tuple(old if a is new else a for a in dim) for dim in resolved(labels)))
        case Call(fn, args):
            return Call(fn, tuple(_renamed_value(a, new, old) for a in args))
        case _:
            return expr


class _Matrix(Factoring):
    """Factorisation of a matrix along its two indices that knows the identity."""

    def _opened(self, node: Node, labels: Labels) -> list[Term]:
        form = read(node)
        if node.target in (aten.eye.default, aten.eye.m) and self._is_square(labels):
            return [(IDENTITY,)]
        if node.target is aten.diag_embed.default and len(node.args) == 1:
            return self._product(self._operand(node.all_input_nodes[0], labels[:-1]), [(IDENTITY,)])
        if isinstance(form, Cast) and self._is_identity(form.x, labels):
            return [(IDENTITY,)]
        if isinstance(form, Choice) and self._is_identity(form.condition, aligned(labels, shape(form.condition))):
            return self._diagonal(form.x, form.y, labels, node)
        return super()._opened(node, labels)

    def _diagonal(self, x: Operand, y: Operand, labels: Labels, node: Node) -> list[Term]:
        if not is_zero(y):
            raise Refusal(node, "full-rank", "the matrix is not diagonal")
        return self._product(self._operand(x, labels), [(IDENTITY,)])

    def _is_square(self, labels: Labels) -> bool:
        both = {*self.axes.key, *self.axes.value}
        return atoms_of(labels) == both and all(len(resolve(dim)) == 1 for dim in labels)

    def _is_identity(self, node: Node, labels: Labels) -> bool:
        """Whether the node compares the position along one index with that along the other."""
        node, labels = self.values.peel(node, labels)
        form = read(node)
        if not isinstance(form, Pointwise) or form.fn != "aten.eq.Tensor":
            return False
        sides = [self.values.peel(x, aligned(labels, shape(x))) for x in form.args if isinstance(x, Node)]
        if len(sides) != 2 or not self._is_square(tuple(dim for _, each in sides for dim in each)):
            return False
        (x, _), (y, _) = sides
        return x.target in _COUNTS and (x.target, x.args, _range(x)) == (y.target, y.args, _range(y))

    def _single(self, terms: list[Term], where: Expr) -> Term:
        if any(IDENTITY in t for t in terms):
            raise Refusal(leaves(where)[0].node, "full-rank", "a quotient by the identity")
        return super()._single(terms, where)

    def _exp(self, term: Term, where: Leaf) -> Factor:
        if IDENTITY in term:
            raise Refusal(where.node, "full-rank", "exp of the identity is no multiple of it")
        return super()._exp(term, where)


def _range(node: Node) -> tuple[object, object]:
    return node.kwargs.get("start"), node.kwargs.get("step")
