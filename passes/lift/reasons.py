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
from kvbuffer_compile.passes.algebra.refusals import mentioned
from kvbuffer_compile.passes.algebra.terms import Refusal, Term, leaves
from kvbuffer_compile.passes.algebra.versions import ReadOut
from kvbuffer_compile.passes.lift import words
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


def refused(walk: Walk, refusal: Refusal, write: Node | None) -> Refused | None:
    """The refusal as reports show it. write: the copy_ that stores the next state, None when nothing is stored.

    None for what is not written and does not look like a matrix state that is returned: an operand like any other.
    """
    refusal = _explained(walk, refusal)
    if write is None:
        shown = refusal.rule != "vector" and ((walk.after is not None and bool(walk.reads)) or _is_returned(walk))
        if refusal.rule == "partial" and _is_rotated(walk, _onward(walk.state)):
            refusal = Refusal(refusal.node, "rotation", words.ROTATION)
        return told(walk.state, refusal) if shown else None
    carried = _between(walk, write)
    if not carried:
        return _overwritten(walk, write)
    if refusal.rule == "vector":
        return told(walk.state, refusal, kept=True)
    if adder := next((n for n in carried if _adds_by_index(n)), None):
        return _added_by_index(walk, adder)
    if refusal.rule != "empty" and all(_only_moves(read(n)) for n in carried - {walk.state}):
        return told(walk.state, Refusal(write, "cache", words.CACHE), kept=True)
    if refusal.rule != "empty" and not walk.active and not _is_scaled_or_grows(carried):
        return told(walk.state, Refusal(refusal.node, "vector", words.ELEMENTS), kept=True)
    if refusal.rule == "overwritten":
        refusal = Refusal(refusal.node, "full-transition", words.TRANSITION)
    if refusal.rule == "partial" and _is_rotated(walk, carried):
        refusal = Refusal(refusal.node, "rotation", words.ROTATION)
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
        return told(state, Refusal(where, "complex", words.COMPLEX))
    if value is not None and value.dtype.is_floating_point:
        return told(state, Refusal(where, "vector", words.SMALL), kept=True)
    if value is not None and value.dim() > 2 and isinstance(last, Node) and _is_dequantised(state, last):
        return told(state, Refusal(where, "quantised", words.QUANTISED))
    return told(state, Refusal(where, "counter", words.COUNTER), kept=True)


def _explained(walk: Walk, refusal: Refusal) -> Refusal:
    """The refusal, or what is behind it."""
    if refusal.rule == "nonlinear" and refusal.node.target in GATHERS | SCATTERS:
        refusal = Refusal(refusal.node, "partial", words.INDEXED)
    if refusal.node.target is aten.view_as_complex.default:
        refusal = Refusal(refusal.node, "rotation", words.COMPLEX)
    if 0 in walk.state.meta["val"].shape:  # of nothing much is true: sums are zeros, and axes look alike
        return Refusal(refusal.node, "empty", words.EMPTY)
    if refusal.rule in _SYMPTOMS and _is_vector(walk):
        return Refusal(refusal.node, "vector", words.VECTOR)
    return refusal


def _overwritten(walk: Walk, write: Node) -> Refused:
    """A tensor whose own values are not among what is stored: of no interest, unless another state moves into it."""
    last = write.args[1]
    assert isinstance(last, Node)
    if len(shape(walk.state)) > 2:
        like = (n for n in walk.state.graph.find_nodes(op="placeholder") if _like(n) == _like(walk.state))
        other = next((n for n in like if n is not walk.state and n is not last and last in _grown(n)), None)
        if other is not None:
            return told(walk.state, Refusal(write, "elsewhere", words.ELSEWHERE.format(mentioned(other))))
    return told(walk.state, Refusal(write, "overwritten", words.OVERWRITTEN), kept=True)


def _added_by_index(walk: Walk, adder: Node) -> Refused:
    """A matrix in some rows of which something is added. With two dims it may count as well."""
    if len(shape(walk.state)) > 2:
        return told(walk.state, Refusal(adder, "partial", words.ADDED))
    return told(walk.state, Refusal(adder, "vector", words.ELEMENTS), kept=True)


# ---------------------------------------------------------------------------------------------- carried


def _adds_by_index(node: Node) -> bool:
    """Whether values are added to some rows of a tensor, and not put in their place."""
    if node.target in (aten.index_put.default, aten._unsafe_index_put.default):
        return len(node.args) > 3 and node.args[3] is True
    return node.target in (aten.scatter_add.default, aten.index_add.default, aten.scatter_reduce.two)


def _is_dequantised(state: Node, last: Node) -> bool:
    """Whether a stored integer is computed from the state's own through real numbers."""
    inside, seen, stack = _onward(state), {last}, [last]
    while stack:
        above = [x for x in stack.pop().all_input_nodes if x in inside and x not in seen]
        seen.update(above)
        stack += above
    return state in seen and any(n.meta["val"].dtype.is_floating_point for n in seen if tensor(n) is not None)


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
    """Whether an output is a next state, though not stored by the graph."""
    state = walk.state
    found = [n for n in _outputs(state.graph) if n is not state and _like(n) == _like(state)]
    return bool(found) and not _grown(state).isdisjoint(found)


def _grown(state: Node) -> set[Node]:
    """What an input becomes element by element, if a product of a row and a column is added on the way."""
    inside, size = _onward(state), prod(shape(state))
    sums = [form for n in inside if prod(shape(n)) == size and isinstance(form := read(n), Sum)]
    return inside if any(_is_outer(x, inside) for form in sums for x in operands(form)) else set()


def _onward(state: Node) -> set[Node]:
    """What is computed from the state element by element: views, products, sums and functions of it."""
    inside, stack = {state}, [state]
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
