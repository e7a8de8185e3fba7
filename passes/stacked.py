"""One tensor that holds the states of several layers or heads, each touched only as a constant slice of it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch.fx import GraphModule, Node

from kvbuffer_compile.passes.captured import written
from kvbuffer_compile.passes.forms import Metadata, Same, Select
from kvbuffer_compile.passes.graph import read, shape

aten = torch.ops.aten
Place = tuple[int, int]  # a dim, and the position in it


@dataclass
class Stack:
    """An input and its slices along one dim. values: for every node of the chain that stores them one by one, the
    select_scatter that last stored each slice; a slice that is missing is still that of the input."""

    state: Node
    write: Node
    values: dict[Node, dict[Place, Node]] = field(default_factory=dict)
    reads: list[tuple[Node, Node, Place]] = field(default_factory=list)  # select, what it selects from, where

    @property
    def places(self) -> list[Place]:
        """The slices that are used, in order."""
        return sorted({place for *_, place in self.reads} | set(self.stored))

    @property
    def stored(self) -> dict[Place, Node]:
        """The select_scatter that stores each slice in the end."""
        last = self.write.args[1]
        assert isinstance(last, Node)
        return self.values[last]


def stacks(gm: GraphModule) -> list[Stack]:
    """The written inputs of a graph that are stacks."""
    if not any(node.target is aten.select_scatter.default for node in gm.graph.nodes):
        return []
    found = (_stack(state, write) for state, write in written(gm).items())
    return [stack for stack in found if stack is not None]


def _stack(state: Node, write: Node) -> Stack | None:
    """Every use must be a select, a select_scatter or the final write, all along one dim at constant positions."""
    stack = Stack(state, write, {state: {}})
    for node in state.graph.nodes:
        for base in [x for x in node.all_input_nodes if x in stack.values]:
            if not _follow(stack, node, base):
                return None
    known = isinstance(write.args[1], Node) and write.args[1] in stack.values
    return stack if known and stack.stored and len({dim for dim, _ in stack.places}) == 1 else None


def _follow(stack: Stack, node: Node, base: Node) -> bool:
    """Take one use of the stack in; False for a use of another kind."""
    form = read(node)
    if isinstance(form, Select):
        stack.reads.append((node, base, (form.dim, form.index)))
    elif isinstance(form, Same):
        stack.values[node] = stack.values[base]
    elif node.target is aten.select_scatter.default and node.args[0] is base and node.args[1] not in stack.values:
        dim, index = node.args[2:]
        sizes = shape(base)
        if not isinstance(index, int) or not isinstance(dim, int) or not isinstance(size := sizes[dim], int):
            return False
        stack.values[node] = {**stack.values[base], (dim % len(sizes), index % size): node}
    else:
        return node is stack.write or isinstance(form, Metadata)
    return True


def apart(gm: GraphModule, found: list[Stack]) -> dict[str, Stack]:
    """Make every slice an input of its own, behind the others, and store it there. Changes gm; which input is of which
    stack, by name."""
    parts: dict[str, Stack] = {}
    for stack in found:
        inputs = {place: _input(stack.state, place) for place in stack.places}
        for select, base, place in stack.reads:
            last = stack.values[base].get(place)
            value = inputs[place] if last is None else last.args[1]
            assert isinstance(value, Node)
            select.replace_all_uses_with(value)
        for place, last in stack.stored.items():
            _store(inputs[place], last, stack.write)
        gm.graph.erase_node(stack.write)
        parts |= {node.name: stack for node in inputs.values()}
    gm.graph.eliminate_dead_code()
    return parts


def _input(state: Node, place: Place) -> Node:
    """A new input for one slice, behind all others."""
    inputs = [n for n in state.graph.nodes if n.op == "placeholder"]
    with state.graph.inserting_after(inputs[-1]):
        node = state.graph.placeholder(f"{state.name}_part{place[1]}")
    node.meta = {**state.meta, "val": state.meta["val"].select(*place)}
    return node


def _store(part: Node, scatter: Node, write: Node) -> None:
    with part.graph.inserting_before(write):
        node = part.graph.call_function(aten.copy_.default, (part, scatter.args[1]))
    node.meta = {**scatter.meta, "val": part.meta["val"]}
