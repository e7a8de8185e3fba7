"""Looking backwards through a graph: what a value is made of, and along which indices it really varies."""

from __future__ import annotations

from collections.abc import Iterable

from torch.fx import Node

from kvbuffer_compile.passes.forms import (
    Cast,
    Choice,
    Constant,
    Contract,
    Expand,
    Permute,
    Pointwise,
    Product,
    Quotient,
    Reduce,
    Regroup,
    Same,
    Select,
    Slice,
    Sum,
    Token,
    Variance,
    is_view,
    operands,
)
from kvbuffer_compile.passes.graph import read, shape
from kvbuffer_compile.passes.labels import (
    Atom,
    Dim,
    Labels,
    Size,
    TokenAtom,
    aligned,
    atoms_of,
    fresh,
    regroup,
    resolve,
    resolved,
)

Use = tuple[Node, Labels]  # a node at one place where it is used
WIDEST = 16  # contractions that are looked through when they may be products with weights; also the largest rank


def pull(node: Node, labels: Labels) -> list[Use] | None:
    """The operands of a node with the labels that its own labels give them; None when it cannot be looked through."""
    form = read(node)
    match form:
        case Regroup(x):
            inner = regroup(labels, shape(x))
            return None if inner is None else [(x, inner)]
        case Permute(x, order):
            return [(x, tuple(labels[order.index(i)] for i in range(len(order))))]
        case Same(x) | Cast(x, _):
            return [(x, labels)]
        case Select(x, dim) | Token(x, dim):
            return [(x, (*labels[:dim], _position(shape(x)[dim], form), *labels[dim:]))]
        case Slice(x, dim):
            if shape(node)[dim] != 1:
                return None
            return [(x, (*labels[:dim], _position(shape(x)[dim], form), *labels[dim + 1 :]))]
        case Contract():
            return pull_contract(form, labels)
        case Reduce(x, dims, keep, _) | Variance(x, dims, keep, _):
            return [(x, unreduced(shape(x), dims, keep, labels))]
        case Expand() | Product() | Quotient() | Sum() | Choice() | Pointwise() | Constant():
            return [(x, aligned(labels, shape(x))) for x in operands(form)]
        case _:
            return None


def _position(size: Size, form: Select | Slice | Token) -> Dim:
    if size == 1:
        return ()
    match form:
        case Token():
            return (TokenAtom(size),)
        case Select(_, _, index) | Slice(_, _, index):
            return (Atom(size, index),)


def unreduced(sizes: Iterable[Size], dims: tuple[int, ...], keep: bool, labels: Labels) -> Labels:
    """Labels of the operand of a reduction: new atoms for the reduced dims."""
    sizes = list(sizes)
    kept = [d for i, d in enumerate(labels) if i not in dims] if keep else list(labels)
    return tuple(fresh([sizes[i]])[0] if i in dims else kept.pop(0) for i in range(len(sizes)))


def pull_contract(form: Contract, labels: Labels) -> list[Use] | None:
    """Both factors, with a new atom for the contracted index. Products with weights are not looked through."""
    left, right, out = form.letters
    size = shape(form.x)[left.index("c")]
    if "b" not in left and not (isinstance(size, int) and size <= WIDEST):
        return None
    env = dict(zip(out, labels, strict=True), c=fresh([size])[0])
    return [(form.x, tuple(env[i] for i in left)), (form.y, tuple(env[i] for i in right))]


def is_zero(node: Node) -> bool:
    """Whether a node is zero everywhere by construction."""
    form = read(node)
    while is_view(form) or isinstance(form, Cast):
        form = read(operands(form)[0])
    return isinstance(form, Constant) and form.value == 0


class Values:
    """Questions about values seen from one state. stops: its reads, which are not looked through."""

    def __init__(self, stops: Iterable[Node] = ()) -> None:
        self.stops = frozenset(stops)
        self._known: dict[Use, frozenset[Atom]] = {}

    def vary(self, node: Node, labels: Labels) -> frozenset[Atom]:
        """The atoms of `labels` along which the value may not be constant: never too few."""
        use = (node, resolved(labels))
        if use not in self._known:
            self._known[use] = self._search(use)
        return frozenset(resolve(self._known[use]))

    def _search(self, use: Use) -> frozenset[Atom]:
        wanted, found = atoms_of(use[1]), frozenset[Atom]()
        seen: set[Use] = set()
        stack = [use]
        while stack:
            node, labels = stack.pop()
            wanted, found = frozenset(resolve(wanted)), frozenset(resolve(found))
            here = atoms_of(labels) & wanted
            if here <= found or (node, labels) in seen:
                continue
            seen.add((node, labels))
            inputs = None if node in self.stops else pull(node, labels)
            if inputs is None:
                found |= here
            else:
                stack += [(x, resolved(l)) for x, l in inputs]
        return found

    def peel(self, node: Node, labels: Labels) -> Use:
        """The same value behind all views: constants along broadcast dims come to light, casts and arithmetic stay."""
        while node not in self.stops and is_view(read(node)):
            inner = pull(node, labels)
            if inner is None:
                break
            node, labels = inner[0]
        return node, labels
