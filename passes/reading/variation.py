"""Looking backwards through a graph: what a value is made of, and along which indices it really varies."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from torch.fx import Node

from kvbuffer_compile.passes.reading.arguments import is_repeated, shape
from kvbuffer_compile.passes.reading.aten import read
from kvbuffer_compile.passes.reading.forms import (
    WIDEST,
    Blocks,
    Cast,
    Choice,
    Constant,
    Contract,
    Expand,
    Form,
    Join,
    Operand,
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
from kvbuffer_compile.passes.reading.labels import (
    Atom,
    Dim,
    Labels,
    Size,
    TokenAtom,
    aligned,
    atoms_of,
    fresh,
    pinned,
    position,
    regroup,
    resolve,
    resolved,
)

Use = tuple[Node, Labels]  # a node at one place where it is used
Shape = Callable[[Node], Sequence[Size]]


def pull(node: Node, labels: Labels, shape: Shape = shape) -> list[Use] | None:
    """The operands of a node with the labels that its own labels give them; None when it cannot be looked through.

    shape: the sizes of a node that `labels` were made from.
    """
    form = read(node)
    match form:
        case Regroup(x):
            inner = regroup(labels, shape(x))
            return None if inner is None else [(x, inner)]
        case Permute(x, order):
            return [(x, tuple(labels[order.index(i)] for i in range(len(order))))]
        case Same(x) | Cast(x, _):
            return [(x, labels)]
        case Select(x, dim, index):
            return [(x, (*labels[:dim], pinned(shape(x)[dim], index), *labels[dim:]))]
        case Token(x, dim):
            size = shape(x)[dim]
            return [(x, (*labels[:dim], () if size == 1 else (TokenAtom(size),), *labels[dim:]))]
        case Slice() | Blocks() | Join():
            return _pull_position(form, labels, shape(node)[form.dim])
        case Contract():
            return pull_contract(form, labels, shape)
        case Reduce(x, dims, keep, _) | Variance(x, dims, keep, _):
            return [(x, unreduced(shape(x), dims, keep, labels))]
        case Expand() | Product() | Quotient() | Sum() | Choice() | Pointwise() | Constant():
            return [(x, aligned(labels, shape(x))) for x in operands(form)]
        case _:
            return None


def _pull_position(form: Slice | Blocks | Join, labels: Labels, size: Size) -> list[Use] | None:
    """Where one position of a dim of this size comes from; None when the dim is not held."""
    dim, before, after = form.dim, labels[: form.dim], labels[form.dim + 1 :]
    if isinstance(form, Blocks):
        found = regroup((labels[dim],), (len(form.xs), shape(form.xs[0])[dim])) if _begins_held(labels[dim]) else None
        at = None if found is None else position(found[0])
        return None if found is None or at is None else [(form.xs[at], (*before, found[1], *after))]
    at = position(labels[dim]) if labels[dim] or size == 1 else None
    if at is None:
        return None
    if isinstance(form, Slice):
        return [(form.x, (*before, pinned(shape(form.x)[dim], form.start + at * form.step), *after))]
    x, index = form.parts[at]
    if not isinstance(x, Node):
        return [] if x == 0 else None
    return [(x, (*before, *(() if index is None else (pinned(shape(x)[dim], index),)), *after))]


def _begins_held(dim: Dim) -> bool:
    return position(resolve(dim)[:1]) is not None


def can_peel(form: Form) -> bool:
    """Whether the form only rearranges its operands, in their own dtype."""
    return is_view(form) or isinstance(form, Blocks | Join)


def unreduced(sizes: Iterable[Size], dims: tuple[int, ...], keep: bool, labels: Labels) -> Labels:
    """Labels of the operand of a reduction: new atoms for the reduced dims."""
    sizes = list(sizes)
    kept = [d for i, d in enumerate(labels) if i not in dims] if keep else list(labels)
    return tuple(fresh([sizes[i]])[0] if i in dims else kept.pop(0) for i in range(len(sizes)))


def pull_contract(form: Contract, labels: Labels, shape: Shape = shape) -> list[Use] | None:
    """Both factors, with a new atom for the contracted index. Products with weights are not looked through."""
    left, right, out = form.letters
    size = shape(form.x)[left.index("c")]
    if "b" not in left and not (isinstance(size, int) and size <= WIDEST):
        return None
    env = dict(zip(out, labels, strict=True), c=fresh([size])[0])
    return [(form.x, tuple(env[i] for i in left)), (form.y, tuple(env[i] for i in right))]


def is_zero(x: Operand) -> bool:
    """Whether an operand is zero everywhere by construction."""
    if not isinstance(x, Node):
        return x == 0
    form = read(x)
    while is_view(form) or isinstance(form, Cast):
        form = read(operands(form)[0])
    return isinstance(form, Constant) and form.value == 0


def _seen_once(node: Node, labels: Labels) -> Labels:
    """The dims along which an input is not one element seen many times."""
    repeated = is_repeated(node)
    return tuple(d for d, same in zip(labels, repeated, strict=True) if not same) if any(repeated) else labels


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
                found |= atoms_of(_seen_once(node, labels)) & wanted
            else:
                stack += [(x, resolved(l)) for x, l in inputs]
        return found

    def peel(self, node: Node, labels: Labels) -> Use:
        """The same value behind all views: constants along broadcast dims come to light, casts and arithmetic stay."""
        while node not in self.stops and can_peel(read(node)):
            inner = pull(node, labels)
            if not inner:
                break
            node, labels = inner[0]
        return node, labels
