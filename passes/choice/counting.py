"""Memories that count instead of computing: what a step does to a state, as sympy expressions over all lanes.

The symbols are those of cost.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import sympy
from sympy import Expr, Integer

from kvbuffer_compile.ir.program import Kind, Map

K, V = sympy.symbols("K V", positive=True)
ZERO, ONE = Integer(0), Integer(1)


@dataclass(frozen=True, eq=False)
class Size:
    """A value as a counter sees it. depth: how many passes over the state come before it is known."""

    kind: Kind
    lanes: frozenset[str]
    depth: int = 0


def lanes_product(lanes: tuple[str, ...] | frozenset[str]) -> Expr:
    """How many independent copies a value has that varies along these lanes."""
    return sympy.prod([sympy.Symbol(x, positive=True) for x in sorted(lanes)], start=ONE)


def axis(kind: Kind) -> Expr:
    """Elements of a value in one lane."""
    return {"scalar": ONE, "key": K, "value": V}[kind]


def elements(x: Size) -> Expr:
    """Elements of a value over all lanes."""
    return lanes_product(x.lanes) * axis(x.kind)


@dataclass
class Recurrent:
    """Counts a step that updates the state itself. The other memory shares what it counts for reads and maps.

    passes: over the state, for reads. updated: the pass, from 1, in which the last update is known.
    """

    lanes: tuple[str, ...]
    passes: int = 0
    updated: int = 1
    operations: Expr = ZERO

    @property
    def cells(self) -> Expr:
        """Elements of the state."""
        return lanes_product(self.lanes) * K * V

    def decay(self, factor: Size, kind: Kind) -> None:
        self.operations += self.cells

    def update(self, left: Size, right: Size, kinds: tuple[Kind, Kind]) -> None:
        self.updated = max(self.updated, left.depth + 1, right.depth + 1)
        self.operations += 2 * self.cells

    def read(self, x: Size, kind: Kind) -> Size:
        self.passes = max(self.passes, x.depth + 1)
        self.operations += 2 * self.cells
        return Size("value" if kind == "key" else "key", frozenset(self.lanes), x.depth + 1)

    def map(self, op: Map, args: list[Any]) -> Size:
        depth = max((x.depth for x in args if isinstance(x, Size)), default=0)
        out = Size(op.out.kind, frozenset(op.out.lanes), depth)
        self.operations += elements(out)
        return out


@dataclass
class Buffered(Recurrent):
    """Counts a step that logs what it owes and reads through `owed` slots, each of which costs `walk` operations.

    Afterwards: logged tells which values one slot holds (True for gates), slot_walk what one read spends on a slot,
    faded which axes have vectors for decays, sides the sides of all updates, fold what a flush does.
    """

    owed: Expr = ZERO
    walk: Expr = ZERO
    row_operations: Expr = ZERO
    slot_walk: Expr = ZERO
    fold: Expr = ZERO
    logged: dict[Size, bool] = field(default_factory=dict)
    faded: list[Kind] = field(default_factory=list)
    sides: list[Kind] = field(default_factory=list)

    def decay(self, factor: Size, kind: Kind) -> None:
        self.logged[factor] = True
        self.faded += [] if kind == "scalar" else [kind]
        self.fold += elements(factor)

    def update(self, left: Size, right: Size, kinds: tuple[Kind, Kind]) -> None:
        for side in (left, right):
            self.logged[side] = self.logged.get(side, False) or side.kind == "scalar"
        self.sides += kinds
        self.slot_walk += 2 * lanes_product(self.lanes) * (K + V)
        self.fold += 2 * self.cells

    @property
    def packed(self) -> Expr:
        """Elements of one slot's rows, which a fold wants side by side."""
        return lanes_product(self.lanes) * sum(map(axis, self.sides), start=ZERO)

    @property
    def gathered(self) -> Expr:
        """Elements of one slot that are multiplied by decays of their axis, and those of the decays."""
        met = [*self.faded, *(kind for kind in self.sides if kind in self.faded)]
        return lanes_product(self.lanes) * sum(map(axis, met), start=ZERO)

    def read(self, x: Size, kind: Kind) -> Size:
        self.row_operations += self.owed * self.walk + self.slot_walk
        return super().read(x, kind)
