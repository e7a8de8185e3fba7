"""How large every value of a region is when the lanes of a state are few: what is proved of a few holds for any number.

Each dim of each value gets atoms (labels.py), and every call says which dims of its operands are the same index as
those of its result: these atoms become one. What a call takes apart by position (slices, concatenations, anything that
is not known) keeps its size. Then the atoms of the state's lanes are made small, and all sizes follow: also those that
stand in a graph as numbers, and numbers that only look like the batch are left alone. A mistake here cannot prove a
wrong program: at whatever sizes, it is the graph's own calls that are evaluated.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from math import prod
from typing import Any

import torch
from torch.fx import Node

from kvbuffer_compile.ir.plan import Layout
from kvbuffer_compile.ir.sequence import SEQUENCE
from kvbuffer_compile.passes.proof.region import Region, is_tensor
from kvbuffer_compile.passes.reading.arguments import argument
from kvbuffer_compile.passes.reading.aten import aten, read
from kvbuffer_compile.passes.reading.forms import Constant, Contract, Join, Opaque, Select, Slice, Token
from kvbuffer_compile.passes.reading.labels import Atom, Dim, Labels, fresh, resolve
from kvbuffer_compile.passes.reading.variation import pull
from kvbuffer_compile.passes.storage.pools import GATHERS, SCATTERS

FEW = (2, 3)  # lanes are made this large in turn: equal sizes would hide an exchange of two


def concrete(size: Any) -> int:
    """A size as a number; a symbolic one is what it was when the graph was captured."""
    return int(size.node.hint) if isinstance(size, torch.SymInt) else int(size)


def shape(node: Node) -> tuple[int, ...]:
    """The concrete sizes of the tensor a node computes; () for a number."""
    return tuple(concrete(n) for n in node.meta["val"].shape) if is_tensor(node) else ()


class Extents:
    """The sizes of all values of a region. As captured, until `shrink` is called."""

    def __init__(self) -> None:
        self.labels: dict[Node, Labels] = {}
        self.few: dict[Atom, int] = {}
        self._rigid: list[Atom] = []

    def of(self, node: Node) -> tuple[int, ...]:
        """The shape of a value."""
        labels = self.labels.get(node)
        return shape(node) if labels is None else tuple(self._size(dim) for dim in labels)

    def layout(self, state: Node, layout: Layout) -> Layout:
        """The layout of the state at these sizes."""
        if state not in self.labels:
            sizes = zip(shape(state), layout.dims, strict=True)
            return Layout(tuple(tuple(_parts(n, dim)) for n, dim in sizes), layout.order)
        return Layout(tuple(tuple(map(self._size, parts)) for parts in self._home), layout.order)

    def _size(self, dim: Iterable[Atom]) -> int:
        return prod(self.few.get(a, int(a.size)) for a in resolve(dim))

    # ------------------------------------------------------------------------------------------ shrinking

    def shrink(self, region: Region, order: list[Node], state: Node, layout: Layout) -> bool:
        """Make the lanes of a state small; False when none can be."""
        self._relate(region, order, state, layout)
        parts = [part for dim in self._home for part in dim]
        kept = self._kept(parts[i] for i in layout.order[-2:])
        sizes = [(a, int(a.size)) for i in layout.order[:-2] for a in resolve(parts[i])]
        for atom, size in sizes:
            few = FEW[len(self.few) % len(FEW)]
            if atom not in kept and size > few:
                self.few.setdefault(atom, few)
        return bool(self.few)

    def shrink_all(self, region: Region, order: list[Node], first: Iterable[Node]) -> bool:
        """Make everything small, a little less so what `first` run over."""
        self._relate(region, order, None, None)
        kept = self._kept(())
        for node, few in (*((n, FEW[1]) for n in first), *((n, FEW[0]) for n in order)):
            for atom in (a for dim in self.labels.get(node, ()) for a in resolve(dim)):
                if atom not in kept and int(atom.size) > few:
                    self.few.setdefault(atom, few)
        return bool(self.few)

    def _kept(self, others: Iterable[Dim]) -> set[Atom]:
        return set(resolve(self._rigid)).union(*map(resolve, others))

    # ------------------------------------------------------------------------------------------- relating

    def _relate(self, region: Region, order: list[Node], state: Node | None, layout: Layout | None) -> None:
        for node in order:
            if is_tensor(node):
                self.labels[node] = fresh(shape(node))
        if state is not None and layout is not None:
            sizes = zip(shape(state), layout.dims, strict=True)
            self._home = [[() if n == 1 else (Atom(n),) for n in _parts(size, dim)] for size, dim in sizes]
            self._one(self.labels[state], tuple(tuple(a for part in dim for a in part) for dim in self._home))
        claims = {old: new for new, old in region.origins.claims.items() if new in self.labels}
        for node in order:
            source = region.source(node)
            if source is not None and node in self.labels:
                self._same(node, source)
            elif node in claims and isinstance(read(node), Opaque):
                self._same(node, claims[node])  # a fused call: what was written out for it says more
            elif source is None and not region.is_cut(node):
                self._call(node)

    def _call(self, node: Node) -> None:
        """Which dims of a call's operands and of its result are one."""
        if node.target is SEQUENCE:
            self._sequence(node)
        if node not in self.labels or self._by_position(node):
            return  # the first: numbers, and tuples, whose pieces are read from what they are pieces of
        form = read(node)
        if isinstance(form, Contract):
            self._contract(node, form)
        elif isinstance(form, Constant) and "size" not in _names(node) and node.all_input_nodes:
            self._same(node, node.args[0])
        elif isinstance(form, Opaque) or (found := pull(node, self.labels[node], shape)) is None:
            self._unknown(node)
        else:
            for x, labels in found:
                if x in self.labels:
                    self._one(self.labels[x], labels)

    def _by_position(self, node: Node) -> bool:
        """Calls that take something apart by position, or put it together; False for all others."""
        form = read(node)
        if isinstance(form, Slice | Select | Token):
            self._piece(node, form.x, form.dim, isinstance(form, Slice))
        elif isinstance(form, Join):
            for x, at in form.parts:
                if isinstance(x, Node):
                    self._piece(x, node, form.dim, at is not None)
        elif node.target is aten.cat.default:
            for x in argument(node, 0, "tensors"):
                self._piece(x, node, argument(node, 1, "dim", 0) % len(self.labels[node]), True)
        elif node.target is aten.select_scatter.default:
            base, piece, dim = (*node.args, 0)[:3]
            assert isinstance(base, Node) and isinstance(piece, Node) and isinstance(dim, int)
            self._same(node, base)
            self._piece(piece, base, dim % len(self.labels[node]), False)
        elif node.target in GATHERS | SCATTERS:
            self._rows(node)
        else:
            return False
        return True

    def _sequence(self, node: Node) -> None:
        state = node.args[0]
        assert isinstance(state, Node)
        lanes = self.labels[state][:-2]
        for x in node.all_input_nodes + [u for u in node.users if u in self.labels]:
            self._one(self.labels[x][: len(lanes)], lanes)
            self._keep(self.labels[x][len(lanes) :])

    def _piece(self, piece: Node, x: Node, dim: int, kept: bool) -> None:
        """A piece of x along a dim, which the piece has itself where it is `kept`."""
        mine, theirs = self.labels[piece], self.labels[x]
        self._keep((theirs[dim], *([mine[dim]] if kept else [])))
        self._one(mine[:dim] + mine[dim + kept :], theirs[:dim] + theirs[dim + 1 :])

    def _rows(self, node: Node) -> None:
        """Whole rows taken from a tensor, or stored in it, by one index."""
        x, index = node.args[0], node.args[1]
        if node.target in (aten.index_select.default, aten.index_copy.default):
            x, index = node.args[0], [node.args[2]] if node.args[1] == 0 else []
        slots = index[0] if isinstance(index, list | tuple) and len(index) == 1 else None
        if not isinstance(slots, Node) or not isinstance(x, Node) or len(self.labels[slots]) > 1:
            self._unknown(node)
            return
        whole, stored = self.labels[x], None
        if node.target in SCATTERS:
            self._same(node, x)
            stored = node.args[3 if node.target is aten.index_copy.default else 2]
        rows = self.labels[stored if isinstance(stored, Node) else node]
        expected = (*self.labels[slots], *whole[1:])
        self._one(rows, expected[len(expected) - len(rows) :])

    def _contract(self, node: Node, form: Contract) -> None:
        left, right, out = form.letters
        env = dict(zip(left, self.labels[form.x], strict=True))
        for letters, labels in ((right, self.labels[form.y]), (out, self.labels[node])):
            for letter, dim in zip(letters, labels, strict=True):
                self._one((env.setdefault(letter, dim),), (dim,))

    def _unknown(self, node: Node) -> None:
        """A call of one tensor that keeps its shape works along the dims it names. Anything else keeps all sizes."""
        tensors = [x for x in node.all_input_nodes if x in self.labels]
        dims = argument(node, 1, "dims", argument(node, 1, "dim")) if {"dim", "dims"} & _names(node) else None
        if len(tensors) == 1 and shape(tensors[0]) == shape(node) and isinstance(dims, int | list | tuple):
            self._same(node, tensors[0])
            for dim in [dims] if isinstance(dims, int) else dims:
                self._keep((self.labels[node][dim],))
            return
        for x in (node, *tensors):
            self._keep(self.labels[x])

    # ------------------------------------------------------------------------------------------- joining

    def _keep(self, labels: Labels) -> None:
        self._rigid += [a for dim in labels for a in dim]

    def _same(self, x: Any, y: Any) -> None:
        self._one(self.labels[x], self.labels[y])

    def _one(self, x: Labels, y: Labels) -> None:
        """Make the atoms of two values one, dim by dim; a dim of size 1 is broadcast."""
        for a, b in zip(x, y, strict=True):
            if a and b:
                self._join(a, b)

    def _join(self, x: Dim, y: Dim) -> None:
        left, right = deque(resolve(x)), deque(resolve(y))
        while left and right:
            a, b = left.popleft(), right.popleft()
            if a is b:
                continue
            if a.size == b.size:
                a.parts = (b,)
            elif int(a.size) % int(b.size) == 0:
                self._split(a, b, left)
            elif int(b.size) % int(a.size) == 0:
                self._split(b, a, right)
            else:
                self._rigid += [a, b]
                break
            left, right = deque(resolve(left)), deque(resolve(right))
        self._rigid += [*left, *right]

    def _split(self, atom: Atom, outer: Atom, rest: deque[Atom]) -> None:
        """Split an atom into a known outer one and what is left."""
        if outer in resolve(rest):
            self._rigid += [atom, outer]
            return
        inner = Atom(int(atom.size) // int(outer.size))
        atom.parts = (outer, inner)
        rest.appendleft(inner)


def _parts(size: int, dim: tuple[int | None, ...]) -> list[int]:
    """The sizes of the parts of a dim, one of which may be left open."""
    known = prod(n for n in dim if n is not None)
    return [size // known if n is None else n for n in dim]


def _names(node: Node) -> set[str]:
    """What a call's arguments are called."""
    schema = getattr(node.target, "_schema", None)
    return set() if schema is None else {a.name for a in schema.arguments}
