"""Why a candidate is no state that can be served, in the words that help its author, and whether to say so at all."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import permutations

from torch.fx import Node

from kvbuffer_compile.errors import Declined
from kvbuffer_compile.passes.algebra.factor import Axes, Factoring
from kvbuffer_compile.passes.algebra.terms import Refusal, Term, leaves
from kvbuffer_compile.passes.algebra.versions import ReadOut
from kvbuffer_compile.passes.lifted import Refused
from kvbuffer_compile.passes.reading.aten import read
from kvbuffer_compile.passes.reading.captured import source
from kvbuffer_compile.passes.reading.forms import Opaque, Product, Quotient, operands
from kvbuffer_compile.passes.reading.labels import atoms_of, resolve
from kvbuffer_compile.passes.reading.variation import Values
from kvbuffer_compile.passes.storage.pools import GATHERS, SCATTERS
from kvbuffer_compile.passes.walk.walk import Walk

# Rules that say what went wrong on the way; that the state is no matrix says more.
_SYMPTOMS = frozenset(
    {"nonlinear", "full-rank", "full-decay", "extra-axis", "both-axes", "three-axes", "wider-read", "opaque-map"}
)

EMPTY = "the state has an axis of size 0: it holds nothing that could be buffered"


def refused(walk: Walk, refusal: Refusal, write: Node | None) -> Refused:
    """The refusal as reports show it. write: the copy_ that stores the next state, None when nothing is stored.

    Hidden as hopeless: what is not stored and never read by a contraction, caches and shift registers.
    """
    if refusal.rule == "nonlinear" and refusal.node.target in GATHERS | SCATTERS:
        reason = (
            "rows of the state are taken or stored by an index: they can be followed where they are taken once, whole, "
            "by a one-dimensional integer index, and stored once by the same one"
        )
        refusal = Refusal(refusal.node, "partial", reason)
    if 0 in walk.state.meta["val"].shape:  # of nothing much is true: sums are zeros, and axes look alike
        refusal = Refusal(refusal.node, "empty", EMPTY)
    elif refusal.rule in _SYMPTOMS and _is_vector(walk):
        reason = "the state is used element by element, as a vector: a token's update would be as large as itself"
        refusal = Refusal(refusal.node, "vector", reason)
    if write is None:
        return told(walk.state, refusal, hopeless=walk.after is None or not walk.reads)
    carried = _between(walk, write)
    if not carried:
        reason = "the next state is computed without the old one: it is overwritten, not carried along"
        return told(walk.state, Refusal(write, "overwritten", reason))
    if refusal.rule == "overwritten":
        reason = "the next state is contracted from the old one by a matrix that is no sum of identity and k q^T"
        refusal = Refusal(refusal.node, "full-transition", reason)
    scaled = any(isinstance(read(n), Product | Quotient) for n in carried)
    return told(walk.state, refusal, hopeless=not (scaled or walk.active))


def told(state: Node, refusal: Refusal, hopeless: bool = False) -> Refused:
    nodes = (refusal.node, *sorted(state.users))  # an input itself is of no line: then where it is used first
    where = next((line for node in nodes if (line := source(node))), "")
    return Refused(state, Declined(refusal.node.name, refusal.rule, refusal.reason, where), hopeless)


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
