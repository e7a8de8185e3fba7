"""Why a tensor that is written is no state that can be served, in the words that help its author."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import permutations
from math import prod
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from kvbuffer_compile.errors import Declined
from kvbuffer_compile.passes.algebra.factor import Axes, Factoring
from kvbuffer_compile.passes.algebra.terms import Refusal, Term, leaves
from kvbuffer_compile.passes.algebra.versions import ReadOut
from kvbuffer_compile.passes.lifted import Refused
from kvbuffer_compile.passes.reading.arguments import shape, tensor
from kvbuffer_compile.passes.reading.aten import read
from kvbuffer_compile.passes.reading.captured import source, written
from kvbuffer_compile.passes.reading.forms import (
    Blocks,
    Cast,
    Choice,
    Constant,
    Contract,
    Form,
    Join,
    Metadata,
    Opaque,
    Product,
    Quotient,
    Reduce,
    Sum,
    Variance,
    is_view,
    operands,
)
from kvbuffer_compile.passes.reading.labels import atoms_of, resolve
from kvbuffer_compile.passes.reading.variation import Values
from kvbuffer_compile.passes.storage.pools import GATHERS, SCATTERS
from kvbuffer_compile.passes.walk.walk import Walk

aten = torch.ops.aten

# Rules that say what went wrong on the way; that the state is no matrix says more.
_SYMPTOMS = frozenset(
    {"nonlinear", "full-rank", "prefill", "full-decay", "both-axes", "three-axes", "wider-read", "opaque-map"}
)
_ENDS = Contract | Reduce | Variance | Opaque | Metadata | Constant  # of what is carried along element by element

EMPTY = "the state has an axis of size 0: it holds nothing that could be buffered"
VECTOR = (
    "it is added to element by element, so what a token adds is as large as itself and there is nothing to buffer; the "
    "compiler reads and writes all of it at every token, as much as one more column of a matrix that it lies beside"
)
CACHE = (
    "values are put in, moved along or taken out, and nothing is decayed or added to: a cache or a shift register, no "
    "recurrence"
)
ELEMENTS = "it is changed element by element, and neither decayed nor read by a key: no matrix state"
OVERWRITTEN = "it is overwritten: what is stored does not depend on what was there"
SMALL = "it has fewer than two dims: no matrix state"
COUNTER = "it holds no real numbers: no state of a recurrence"
COMPLEX = (
    "the state holds complex numbers: a complex gate is a decay and a rotation of two rows into each other, and a "
    "decay must be one factor a head, a row or a column; keep the state real, and rotate keys and queries by the sum "
    "of the angles so far, as rotary embeddings do"
)
ROTATION = (
    "parts of the state are taken along an axis and put together again, as when rows are rotated into each other in "
    "pairs: a decay must be one factor a head, a row or a column; rotate keys and queries by the sum of the angles so "
    "far instead, as rotary embeddings do"
)
INDEXED = (
    "rows of the state are taken or stored by an index: they can be followed where they are taken once, whole, by a "
    "one-dimensional integer index, and stored once by the same one"
)
TRANSITION = (
    "the next state is contracted from the old one by a matrix that is no sum of identity (or a diagonal) and k q^T: "
    "write the matrix as such a sum, or as a decay and products of vectors"
)


def refused(walk: Walk, refusal: Refusal, write: Node | None) -> Refused | None:
    """The refusal as reports show it. write: the copy_ that stores the next state, None when nothing is stored.

    None for what is not written and does not look like a matrix state that is returned: an operand like any other.
    """
    refusal = _explained(walk, refusal)
    if write is None:
        shown = refusal.rule != "vector" and ((walk.after is not None and bool(walk.reads)) or _is_returned(walk))
        if refusal.rule == "partial" and _is_rotated(walk, _onward(walk)):
            refusal = Refusal(refusal.node, "rotation", ROTATION)
        return told(walk.state, refusal) if shown else None
    carried = _between(walk, write)
    if not carried:
        return told(walk.state, Refusal(write, "overwritten", OVERWRITTEN), kept=True)
    if refusal.rule == "vector":
        return told(walk.state, refusal, kept=True)
    if refusal.rule != "empty" and all(_only_moves(read(n)) for n in carried - {walk.state}):
        return told(walk.state, Refusal(write, "cache", CACHE), kept=True)
    if refusal.rule != "empty" and not walk.active and not _is_scaled_or_grows(carried):
        return told(walk.state, Refusal(refusal.node, "vector", ELEMENTS), kept=True)
    if refusal.rule == "overwritten":
        refusal = Refusal(refusal.node, "full-transition", TRANSITION)
    if refusal.rule == "partial" and _is_rotated(walk, carried):
        refusal = Refusal(refusal.node, "rotation", ROTATION)
    return told(walk.state, refusal)


def told(state: Node, refusal: Refusal, kept: bool = False) -> Refused:
    """A refusal at the line where it happened."""
    nodes = (refusal.node, *sorted(state.users))  # an input itself is of no line: then where it is used first
    where = next((line for node in nodes if (line := source(node))), "")
    return Refused(state, Declined(refusal.node.name, refusal.rule, refusal.reason, where), kept)


def others(gm: GraphModule, known: Iterable[Node]) -> list[Refused]:
    """What the graph writes besides, no candidate for a state. known: what has been told of already."""
    seen = set(known)
    return [_other(state, write) for state, write in written(gm).items() if state not in seen]


def _other(state: Node, write: Node) -> Refused:
    value, last = tensor(state), write.args[1]
    where = last if isinstance(last, Node) and source(last) else write
    if value is not None and value.dtype.is_complex and value.dim() > 2:
        return told(state, Refusal(where, "complex", COMPLEX))
    if value is not None and value.dtype.is_floating_point:
        return told(state, Refusal(where, "vector", SMALL), kept=True)
    return told(state, Refusal(where, "counter", COUNTER), kept=True)


def _explained(walk: Walk, refusal: Refusal) -> Refusal:
    """The refusal, or what is behind it."""
    if refusal.rule == "nonlinear" and refusal.node.target in GATHERS | SCATTERS:
        refusal = Refusal(refusal.node, "partial", INDEXED)
    if refusal.node.target is aten.view_as_complex.default:
        refusal = Refusal(refusal.node, "rotation", COMPLEX)
    if 0 in walk.state.meta["val"].shape:  # of nothing much is true: sums are zeros, and axes look alike
        return Refusal(refusal.node, "empty", EMPTY)
    if refusal.rule in _SYMPTOMS and _is_vector(walk):
        return Refusal(refusal.node, "vector", VECTOR)
    return refusal


# ---------------------------------------------------------------------------------------------- carried


def _only_moves(form: Form) -> bool:
    """Whether values come out of a form as they went in. It is supposed of unknown calls: index_put, roll."""
    return is_view(form) or isinstance(form, Blocks | Cast | Choice | Join | Opaque)


def _is_scaled_or_grows(carried: set[Node]) -> bool:
    """Whether the state is multiplied on the way to the next one, or the product of a row and a column added to it."""
    forms = [read(n) for n in carried]
    added = (x for form in forms if isinstance(form, Sum) for x in operands(form))
    return any(isinstance(form, Product | Quotient) for form in forms) or any(_is_outer(x, carried) for x in added)


def _is_rotated(walk: Walk, carried: Iterable[Node]) -> bool:
    """Whether parts of the state are mixed and joined again."""
    inside = set(carried)
    joins = [n for n in inside if n.target in (aten.cat.default, aten.stack.default)]
    parts = [{x for x in n.all_input_nodes if x is not walk.state} for n in joins]
    return any(len(xs) > 1 and xs <= inside for xs in parts)


def _is_returned(walk: Walk) -> bool:
    """Whether an output of the state's shape is what became of it element by element, with a product of a row and a
    column added on the way: a next state, though not stored by the graph."""
    inside, found = _onward(walk), {_like(walk.state)}
    size = prod(shape(walk.state))
    sums = [form for n in inside if prod(shape(n)) == size and isinstance(form := read(n), Sum)]
    grows = any(_is_outer(x, inside) for form in sums for x in operands(form))
    return grows and any(n in inside and n is not walk.state and _like(n) in found for n in _outputs(walk.state.graph))


def _onward(walk: Walk) -> set[Node]:
    """What is computed from the state element by element: views, products, sums and functions of it."""
    inside, stack = {walk.state}, [walk.state]
    while stack:
        for user in stack.pop().users:
            if user not in inside and user.op == "call_function" and not isinstance(read(user), _ENDS):
                inside.add(user)
                stack.append(user)
    return inside


def _is_outer(node: Node, inside: set[Node]) -> bool:
    """Whether an addend that does not depend on the state is the product of a row and a column."""
    while node not in inside:
        match form := read(node):
            case Contract():
                return shape(form.x)[form.letters[0].index("c")] == 1
            case Product(Node() as x, Node() as y):
                if shape(x) != shape(node) and shape(y) != shape(node):
                    return True
                node = x if shape(x) == shape(node) else y
            case _ if is_view(form) or isinstance(form, Cast):
                node = operands(form)[0]
            case _:
                return False
    return False


def _like(node: Node) -> tuple[object, ...]:
    value = tensor(node)
    return (None,) if value is None else (shape(node), value.dtype)


def _outputs(graph: Graph) -> list[Node]:
    returned: Any = graph.output_node().args[0]
    return [n for n in returned if isinstance(n, Node)]


def _between(walk: Walk, write: Node) -> set[Node]:
    """What the stored value is computed by from the state's own values. Nodes before the state's first use are not
    visited: with them the time would grow with the square of the number of layers."""
    first = min(walk.order.get(user, 0) for user in walk.state.users)
    last = write.args[1]
    assert isinstance(last, Node)
    above, stack = {last}, [last]
    while stack:
        fresh = {x for x in _operands(stack.pop()) if x is walk.state or walk.order.get(x, -1) >= first} - above
        above |= fresh
        stack += fresh
    below = {walk.state} & above
    for node in sorted(above, key=lambda n: walk.order.get(n, -1)):
        if not below.isdisjoint(_operands(node)):
            below.add(node)
    return below


def _operands(node: Node) -> list[Node]:
    """The nodes whose values a node uses: what copy overwrites is not among them."""
    form = read(node)
    return node.all_input_nodes if isinstance(form, Opaque) else operands(form)


# ---------------------------------------------------------------------------------------------- vectors


def _is_vector(walk: Walk) -> bool:
    """Whether something as wide as the whole state is added to it, and no read keeps an axis apart as its values."""
    values = Values(walk.reads)
    added = [t for version in {lin.version for lins in walk.values.values() for lin in lins} for t in version.addends]
    if not added or any(_keeps_an_axis(walk, r, values) for r in walk.reads.values()):
        return False
    return not any(_factor(walk, axes, values, added) for axes in _pairs(walk))


def _pairs(walk: Walk) -> Iterable[Axes]:
    dims = [resolve(dim) for dim in walk.home if dim]
    return (Axes(*pair) for pair in permutations(dims, 2))


def _factor(walk: Walk, axes: Axes, values: Values, added: list[Term]) -> bool:
    factoring = Factoring(values, axes)
    try:
        for term in added:
            factoring.terms(term)
    except Refusal:
        return False
    return True


def _keeps_an_axis(walk: Walk, out: ReadOut, values: Values) -> bool:
    """A read whose key is the same along some other axis of the state. The weights of a linear layer are, along all."""
    own = atoms_of(walk.home)
    rest = own - frozenset(resolve(out.contracted))
    along = frozenset(a for f in out.factors for leaf in leaves(f) for a in values.vary(leaf.node, leaf.labels))
    is_layer = not along & rest and bool(along - own)
    return not is_layer and not rest <= along
