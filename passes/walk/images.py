"""The states of several tokens in one tensor: a linear image for each position of an index that is none of the state.

A state is spread over such an index by a sum with something that runs along it, or by being put beside others (cat).
Each piece is an image with that index held, and goes its own way; a slice takes some of them, a select one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from math import prod

from torch.fx import Node

from kvbuffer_compile.passes.algebra.refusals import in_part, nonlinear
from kvbuffer_compile.passes.algebra.terms import Leaf, Refusal, held
from kvbuffer_compile.passes.algebra.versions import Lin, Version
from kvbuffer_compile.passes.reading.arguments import shape
from kvbuffer_compile.passes.reading.forms import WIDEST, Blocks, Join, Operand, Select, Slice
from kvbuffer_compile.passes.reading.labels import (
    Atom,
    Dim,
    Labels,
    Size,
    aligned,
    broadcast,
    fixed,
    pinned,
    position,
    resolve,
)

Own = frozenset[Atom]
Pieces = tuple[Lin, ...]


def split(node: Node, lin: Lin, own: Own, labels: Labels | None = None) -> list[Lin]:
    """The pieces of an image, each of its foreign indices (those of `labels`) held at every position.

    Refusal when they are too many.
    """
    dims = lin.labels if labels is None else labels
    foreign = [a for dim in dims for a in resolve(dim) if a.at is None and a not in own]
    sizes = [a.size for a in foreign]
    if not all(isinstance(n, int) for n in sizes) or prod(map(int, sizes)) > WIDEST:
        raise Refusal(node, "wider-sum", "a value with more indices than the state is added to it")
    out = [lin]
    for atom in foreign:
        out = [_held(piece, atom, at) for piece in out for at in range(int(atom.size))]
    return out


def _held(lin: Lin, atom: Atom, at: int) -> Lin:
    return Lin(lin.version, fixed(lin.labels, atom, at), tuple(held(f, atom, at) for f in lin.factors))


def together(node: Node, values: Sequence[Pieces], own: Own) -> Iterator[tuple[Lin, ...]]:
    """Pieces of several operands that meet in one value, the first one with the labels of that value."""
    first = [Lin(lin.version, broadcast(lin.labels, shape(node)), lin.factors) for lin in values[0]]
    others = [[p for lin in pieces for p in split(node, lin, own)] for pieces in values[1:]]
    for lead in (p for lin in first for p in split(node, lin, own)):
        yield (lead, *(_met(node, lead, pieces) for pieces in others))


def _met(node: Node, lead: Lin, pieces: Iterable[Lin]) -> Lin:
    """The piece at the positions of another. Refusal when their dims do not run over the same indices."""
    met = [piece for piece in pieces if _meets(node, lead.labels, piece.labels)]
    if len(met) != 1:
        raise _misplaced(node)
    return met[0]


def _meets(node: Node, wide: Labels, labels: Labels) -> bool:
    for dim, other in zip(wide[len(wide) - len(labels) :], labels, strict=True):
        here, there = resolve(dim), resolve(other)
        if not there or here == there:
            continue
        alike = len(here) == len(there) and all(a is b or _are_held(a, b) for a, b in zip(here, there, strict=True))
        if not alike:
            raise _misplaced(node)
        return False
    return True


def _are_held(a: Atom, b: Atom) -> bool:
    return a.at is not None and b.at is not None and a.size == b.size


def _misplaced(node: Node) -> Refusal:
    return Refusal(node, "wider-sum", "values of the state are joined whose indices are not in the same dims")


def rearranged(node: Node, form: Select | Slice | Blocks | Join, values: dict[Node, Pieces], own: Own) -> Pieces:
    """Positions of an index along which the state is spread, or constant. Of its own indices: a part of the state."""
    if isinstance(form, Blocks):
        return tuple(_in_blocks(node, form, values))
    if not isinstance(form, Join):
        (lins,) = values.values()
        if any(not own.isdisjoint(resolve(lin.labels[form.dim])) for lin in lins):
            raise in_part(node)
        if isinstance(form, Select):
            return tuple(p for lin in lins for p in _selected(node, lin, form))
        pieces = [p for lin in lins for p in split(node, lin, own, lin.labels[form.dim : form.dim + 1])]
        return tuple(p for lin in pieces for p in _sliced(lin, form, shape(node)[form.dim]))
    with_dim = [x for x, at in form.parts if at is not None and isinstance(x, Node) and x in values]
    if any(not own.isdisjoint(resolve(lin.labels[form.dim])) for x in with_dim for lin in values[x]):
        raise nonlinear(node)
    return tuple(_joined(node, form, {x: [p for q in lins for p in split(node, q, own)] for x, lins in values.items()}))


def _selected(node: Node, lin: Lin, form: Select) -> Pieces:
    """An image at one position of a dim; none of a piece at another one."""
    index = form.index
    for atom in reversed(resolve(lin.labels[form.dim])):
        if not isinstance(atom.size, int):
            raise in_part(node)
        if atom.at not in (None, index % atom.size):
            return ()
        lin = lin if atom.at is not None else _held(lin, atom, index % atom.size)
        index //= atom.size
    return (Lin(lin.version, lin.labels[: form.dim] + lin.labels[form.dim + 1 :], lin.factors),)


def _sliced(lin: Lin, form: Slice, size: Size) -> Pieces:
    """A piece in a slice of its dim, if it is taken. size: of the slice."""
    at = position(lin.labels[form.dim])
    if at is None or not isinstance(size, int) or (at - form.start) % form.step:
        return ()
    index = (at - form.start) // form.step
    return (_placed(lin, form.dim, pinned(size, index)),) if 0 <= index < size else ()


def _placed(lin: Lin, dim: int, label: Dim) -> Lin:
    return Lin(lin.version, (*lin.labels[:dim], label, *lin.labels[dim + 1 :]), lin.factors)


def _in_blocks(node: Node, form: Blocks, values: dict[Node, Pieces]) -> list[Lin]:
    """Every piece of a tensor of blocks; what does not depend on the state is a piece too."""
    out, empty = [], []
    for i, x in enumerate(form.xs):
        label = pinned(len(form.xs), i)
        if x in values:
            out += [_placed(p, form.dim, (*label, *p.labels[form.dim])) for p in values[x]]
        else:
            empty.append((x, label))
    inner = {p.labels for x in form.xs for p in values.get(x, ())}
    for x, label in empty:
        for labels in inner:
            place = (*labels[: form.dim], (*label, *labels[form.dim]), *labels[form.dim + 1 :])
            out.append(_plain(node, Leaf(x, labels), place))
    return out


def _joined(node: Node, form: Join, values: dict[Node, list[Lin]]) -> list[Lin]:
    """Every piece of a dim that is made of parts. values: with the pieces of each part apart."""
    out: list[Lin] = []
    rest: list[tuple[Operand, int | None, Dim]] = []
    for i, (x, at) in enumerate(form.parts):
        label = pinned(len(form.parts), i)
        if not isinstance(x, Node) or x not in values:
            rest.append((x, at, label))
            continue
        for p in values[x]:
            if at is None:
                labels = (*p.labels[: form.dim], label, *p.labels[form.dim :])
                out.append(Lin(p.version, labels, p.factors))
            elif position(p.labels[form.dim]) == at:
                out.append(_placed(p, form.dim, label))
    around = {(p.labels[: form.dim], p.labels[form.dim + 1 :]) for p in out}
    for x, at, label in rest:
        for before, after in around:
            out.append(_plain(node, _part(x, at, (before, after), form.dim), (*before, label, *after)))
    return out


def _part(x: Operand, at: int | None, around: tuple[Labels, Labels], dim: int) -> Leaf | float:
    if not isinstance(x, Node):
        return x
    before, after = around
    middle = () if at is None else (pinned(shape(x)[dim], at),)
    return Leaf(x, aligned((*before, *middle, *after), shape(x)))


def _plain(node: Node, value: Leaf | float, labels: Labels) -> Lin:
    """A piece that does not depend on the state."""
    addends = ((value,),) if isinstance(value, Leaf) or value != 0 else ()
    return Lin(Version(node, (), addends, plain=True), labels)
