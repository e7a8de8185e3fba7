"""Prove that the inputs which lifting gave a graph are what they stand for: slices of a stack, rows of a pool.

The captured graph is cut at what is stored in them, so nothing is evaluated but how states are taken and put back. Then
every captured value that such an input took the place of must be that slice or those rows, and what the captured graph
stores in the end must be what the copy stores, slice by slice and row by row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from kvbuffer_compile.passes.lifted import LiftedGraph, Part
from kvbuffer_compile.passes.proof.evaluate import LARGE, Limit, cost, difference, evaluate
from kvbuffer_compile.passes.proof.region import Region, below
from kvbuffer_compile.passes.proof.sizes import Extents
from kvbuffer_compile.passes.reading.captured import written
from kvbuffer_compile.passes.reading.counterparts import Origins


def problem_of_inputs(graph: LiftedGraph, origins: Origins) -> str | None:
    """What is wrong with the inputs of a lifted graph, looked for once."""
    if not (graph.parts or graph.pools or origins.aliases):
        return None
    if graph.inputs_problem is None:
        graph.inputs_problem = _Inputs(graph, origins).problem() or ""
    return graph.inputs_problem or None


class _Inputs:
    def __init__(self, graph: LiftedGraph, origins: Origins) -> None:
        self.graph, self.origins = graph, origins
        captured, copy = graph.original.graph, graph.gm.graph
        self.inputs: list[Node] = copy.find_nodes(op="placeholder")
        self.writes = written(graph.gm)
        self.old_writes = written(graph.original)
        by_name = {p.name: p for p in self.inputs}
        self.parts = [(by_name[part.name], part) for part in graph.parts]
        whole = {self.inputs[part.index] for part in graph.parts} | {pool.state for pool in graph.pools}
        self.holders = [n for n in self.inputs if n in whole and n in origins.same]
        stored = {self._stored(p) for p in self.inputs if p not in origins.same} - set(origins.aliases)
        alone = Origins(origins.same, origins.claims)
        depending: set[Node] = set()
        for holder in self.holders:
            depending |= below(holder, captured, copy, alone)
        self.region = Region(captured, alone, depending, frozenset(n for n in stored if n is not None))

    def _value(self, view: Node) -> Node:
        """What the copy stores in one of its own inputs."""
        value: Any = self.writes[view].args[1]
        return self.origins.shown(value)

    def _stored(self, view: Node) -> Node | None:
        """The captured value that the copy stores in one of its own inputs."""
        return self.origins.of(self._value(view)) if view in self.writes else None

    def problem(self) -> str | None:
        """The first difference at small sizes, or at those of the graph where small ones do not fit."""
        ends = self._ends()
        order = self.region.order(ends)
        small = Extents()
        tries = [Extents()]
        if cost(order, self.region, tries[0], ends)[0] > LARGE and small.shrink_all(self.region, order, self.holders):
            tries.insert(0, small)
        found: str | None = None
        for extents in tries:
            most = cost(order, self.region, extents, ends)
            if Limit.exceeded(most):
                return Limit(most)
            try:
                found = self._difference(evaluate(order, self.region, extents, ends, torch.randn, 0))
            except (RuntimeError, ValueError, IndexError) as error:
                found = str(error)
            if found is None:
                return None
        return found

    def _ends(self) -> list[Node]:
        ends = [*self.holders, *(pool.slots for pool in self.graph.pools), *self.region.stops]
        ends += [self._written(holder) for holder in self.holders]
        for old, new in self.origins.aliases.items():
            ends += [old, *([known] if (known := self.origins.of(self.origins.shown(new))) is not None else [])]
        return ends

    def _written(self, holder: Node) -> Node:
        returned: Any = self.graph.original.graph.output_node().args[0]
        positions = {self.inputs[index]: position for index, position in self.graph.donated}
        at = positions.get(holder)
        value: Any = self.old_writes[self.origins.same[holder]].args[1] if at is None else returned[at]
        assert isinstance(value, Node)
        return value

    def _difference(self, values: dict[Node, Any]) -> str | None:
        for old, new in self.origins.aliases.items():
            shown = self.origins.shown(new)
            known = self.origins.of(shown)
            want = self._taken(shown, values) if known is None else values[known]
            if difference(values[old], want if shown is new else want.reshape(values[old].shape)):
                return f"{new} is not {old}"
        for holder in self.holders:
            if difference(values[self._written(holder)], self._next(holder, values[holder], values)):
                return f"the states in {holder} are stored in another way"
        return None

    def _taken(self, view: Node, values: dict[Node, Any]) -> Tensor:
        """The value of an input: what it is a slice of, or rows of, tells."""
        for node, part in self.parts:
            if node is view:
                return _slice(self._taken(self.inputs[part.index], values), part)
        for pool in self.graph.pools:
            if pool.rows is view:
                return self._taken(pool.state, values).index_select(0, values[pool.slots])
        value: Tensor = values[view]
        return value

    def _next(self, view: Node, now: Tensor, values: dict[Node, Any]) -> Tensor:
        """What the copy leaves in an input, the slices and rows that it is made of put together."""
        if view in self.writes:
            stored = self._stored(view)
            return (self._taken(self._value(view), values) if stored is None else values[stored]).reshape(now.shape)
        after = now.clone()
        for node, part in self.parts:
            if self.inputs[part.index] is view:
                _slice(after, part).copy_(self._next(node, _slice(now, part), values))
        for pool in self.graph.pools:
            if pool.state is view:
                slots = values[pool.slots]
                after.index_copy_(0, slots.long(), self._next(pool.rows, now.index_select(0, slots), values))
        return after


def _slice(whole: Tensor, part: Part) -> Tensor:
    for dim, at in part.place:
        whole = whole.select(dim, at)
    return whole
