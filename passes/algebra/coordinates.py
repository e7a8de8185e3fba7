"""State coordinates: one dim for each lane, then the key or the value axis. Where every operand is brought to."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import sympy
from torch.fx import Node

from kvbuffer_compile.ir.plan import Layout
from kvbuffer_compile.ir.program import Kind
from kvbuffer_compile.passes.algebra.factor import Axes
from kvbuffer_compile.passes.algebra.terms import Leaf, Refusal
from kvbuffer_compile.passes.algebra.versions import ReadOut
from kvbuffer_compile.passes.reading.labels import Atom, Dim, Labels, resolve, resolved, specialised
from kvbuffer_compile.passes.reading.variation import Values


@dataclass(frozen=True)
class Coordinates:
    """lanes: the atoms of each lane in physical order, () for a dim of size 1; names: one for each lane."""

    layout: Layout
    lanes: tuple[Dim, ...]
    key: Dim
    value: Dim
    sizes: tuple[int, int]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(f"n{i}" for i in range(len(self.lanes)))

    def along(self, atoms: frozenset[Atom]) -> tuple[str, ...]:
        """Names of the lanes that run over any of these atoms."""
        return tuple(name for name, lane in zip(self.names, self.lanes, strict=True) if not atoms.isdisjoint(lane))

    def axis(self, kind: Kind) -> Dim:
        """The atoms of the last dim of a value of this kind."""
        return {"scalar": (), "key": self.key, "value": self.value}[kind]


def coordinates(
    state: Node, home: Labels, axes: Axes, values: Values, uses: Iterable[Leaf], reads: Iterable[ReadOut]
) -> Coordinates:
    """The coordinates of a state. uses: every leaf of its program; reads: the nodes its outputs replace.

    Refusal("layout") when the key or the value axis is no part of one dim.
    """
    home = resolved(home)
    key, value = resolve(axes.key), resolve(axes.value)
    varying = [values.vary(leaf.node, leaf.labels) for leaf in uses]
    rows = [tuple(a for dim in resolved(r.labels) for a in dim) for r in reads]
    parts = [_parts(state, dim, key, value, varying, rows) for dim in home]
    flat = [p for dim in parts for p in dim]
    if key not in flat or value not in flat:
        raise Refusal(state, "layout", "an axis of the state is spread over several of its dims")
    lanes = [p for p in flat if p not in (key, value)]
    order = [i for i, p in enumerate(flat) if p not in (key, value)] + [flat.index(key), flat.index(value)]
    sizes = (_known(state, key), _known(state, value))
    dims = tuple(tuple(_size(p) for p in dim) for dim in parts)
    if any(dim.count(None) > 1 for dim in dims):
        raise Refusal(state, "layout", "a dim of the state stands for several sizes that are only known at run time")
    return Coordinates(Layout(dims, tuple(order)), tuple(lanes), key, value, sizes)


def _parts(state: Node, dim: Dim, key: Dim, value: Dim, varying: list[frozenset[Atom]], rows: list[Dim]) -> list[Dim]:
    """One dim of the state as runs of atoms: an axis is one run, and lanes that always vary together are merged."""
    out: list[Dim] = []
    for atom in dim:
        last = out[-1] if out else ()
        axis = next((a for a in (key, value) if atom in a), None)
        if last and _joins(last, atom, axis, (key, value), varying, rows):
            out[-1] = (*last, atom)
        else:
            out.append((atom,))
    return out or [()]


def _joins(
    last: Dim, atom: Atom, axis: Dim | None, axes: tuple[Dim, Dim], varying: list[frozenset[Atom]], rows: list[Dim]
) -> bool:
    if axis is not None:
        return last[-1] in axis
    if any(last[-1] in a for a in axes):
        return False
    together = all((last[-1] in v) == (atom in v) for v in varying)
    return together and all(row.index(atom) == row.index(last[-1]) + 1 for row in rows)


def _size(part: Dim) -> int | None:
    size = 1
    for atom in part:
        if not isinstance(atom.size, int):
            return None
        size *= atom.size
    return size


def _known(state: Node, axis: Dim) -> int:
    """The size of the key or value axis; a symbolic one becomes a guard, as it does in Inductor."""
    size = _size(axis)
    return specialised(sympy.Mul(*(a.size for a in axis)), state.meta["val"].shape) if size is None else size
