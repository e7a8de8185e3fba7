"""One tensor that holds the states of several layers or heads, each touched only as a constant slice of it.

Slices become inputs of the graph (`apart`), and then are states like any other; the tensor itself is used no more.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch.fx import GraphModule, Node

from kvbuffer_compile.passes.captured import written
from kvbuffer_compile.passes.forms import Constant, Metadata, Regroup, Same, Select
from kvbuffer_compile.passes.graph import read
from kvbuffer_compile.passes.labels import Size
from kvbuffer_compile.passes.lifted import Part
from kvbuffer_compile.passes.nodes import argument, shape

aten = torch.ops.aten
Place = tuple[int, int]  # a dim, and the position in it


@dataclass
class Stack:
    """An input and its slices along one dim. values: for every node that holds all of it, what was stored last in each
    slice; a slice that is missing is still that of the input."""

    state: Node
    write: Node
    values: dict[Node, dict[Place, Node]] = field(default_factory=dict)
    reads: list[tuple[Node, Node, Place]] = field(default_factory=list)  # slice, what it is taken from, where

    @property
    def places(self) -> list[Place]:
        """The slices that are used, in order."""
        return sorted({place for *_, place in self.reads} | set(self.stored))

    @property
    def stored(self) -> dict[Place, Node]:
        """What is stored in each slice in the end."""
        last = self.write.args[1]
        assert isinstance(last, Node)
        return self.values[last]


def stacks(gm: GraphModule) -> list[Stack]:
    """The written inputs of a graph that are stacks."""
    found = (_stack(state, write) for state, write in written(gm).items())
    return [stack for stack in found if stack is not None]


def _stack(state: Node, write: Node) -> Stack | None:
    """Every use must be a slice, a select_scatter or the final write, all along one dim at constant positions."""
    stack = Stack(state, write, {state: {}})
    queue, seen = [state], {state}
    while queue:
        base = queue.pop(0)
        for node in sorted(base.users):
            if not _follow(stack, node, base):
                return None
            if node in stack.values and node not in seen:
                seen.add(node)
                queue.append(node)
    last = write.args[1]
    assert isinstance(last, Node)
    if last not in stack.values and (pieces := _pieces(last, shape(state))) is not None:
        stack.values[last] = pieces
    found = last in stack.values and stack.stored
    return stack if found and len({dim for dim, _ in stack.places}) == 1 else None


def _follow(stack: Stack, node: Node, base: Node) -> bool:
    """Take one use of the stack in; False for a use of another kind."""
    form = read(node)
    if isinstance(form, Select):
        stack.reads.append((node, base, (form.dim, form.index)))
    elif node.target is aten.unbind.int:
        pieces = [(user, read(user)) for user in node.users]
        stack.reads += [(user, base, (piece.dim, piece.index)) for user, piece in pieces if isinstance(piece, Select)]
    elif isinstance(form, Same) and form.x is base:
        stack.values[node] = stack.values[base]
    elif node.target is aten.select_scatter.default and node.args[0] is base and node.args[1] not in stack.values:
        value, dim, index = node.args[1:]
        sizes = shape(base)
        if not isinstance(index, int) or not isinstance(dim, int) or not isinstance(value, Node):
            return False
        size = sizes[dim]
        if index < 0 and not isinstance(size, int):
            return False
        at = index % size if isinstance(size, int) else index
        stack.values[node] = {**stack.values[base], (dim % len(sizes), at): value}
    else:
        return node is stack.write or isinstance(form, Metadata | Constant | Same)  # the last: overwritten by another
    return True


def _pieces(node: Node, sizes: tuple[Size, ...]) -> dict[Place, Node] | None:
    """torch.stack of one value for each slice, as it is decomposed: a cat along dim 0, or of unsqueezed values."""
    joined = node.args[0] if isinstance(read(node), Regroup) else node
    if not isinstance(joined, Node) or joined.target is not aten.cat.default or len(node.users) > 1:
        return None
    values = argument(joined, 0, "tensors")
    dim = argument(joined, 1, "dim", 0) % len(sizes)
    if len(values) != sizes[dim]:
        return None
    if joined is node:
        values = [x.args[0] if x.target is aten.unsqueeze.default else x for x in values]
    slice_sizes = (*sizes[:dim], *sizes[dim + 1 :])
    fits = shape(node) == sizes and all(shape(x) == slice_sizes for x in values)
    return {(dim, i): x for i, x in enumerate(values)} if fits else None


def apart(gm: GraphModule, found: list[Stack]) -> tuple[Part, ...]:
    """Make every slice an input of its own, behind the others, and store it there. Changes gm."""
    whole = [n for n in gm.graph.nodes if n.op == "placeholder"]
    parts: list[Part] = []
    for stack in found:
        inputs = {place: _input(stack.state, place) for place in stack.places}
        for select, base, place in stack.reads:
            last = stack.values[base].get(place)
            select.replace_all_uses_with(inputs[place] if last is None else last)
        for place, last in stack.stored.items():
            _store(inputs[place], last, stack.write)
        gm.graph.erase_node(stack.write)
        at = whole.index(stack.state)
        parts += [Part(node.name, at, place) for place, node in inputs.items()]
    if parts:
        gm.graph.eliminate_dead_code()
    return tuple(parts)


def _input(state: Node, place: Place) -> Node:
    """A new input for one slice, behind all others."""
    inputs = [n for n in state.graph.nodes if n.op == "placeholder"]
    with state.graph.inserting_after(inputs[-1]):
        node = state.graph.placeholder(f"{state.name}_part{place[1]}")
    slice_of = state.meta["val"].select(*place)
    node.meta = {**state.meta, "val": slice_of.new_empty_strided(slice_of.shape, slice_of.stride())}
    return node


def _store(part: Node, value: Node, write: Node) -> None:
    with part.graph.inserting_before(write):
        node = part.graph.call_function(aten.copy_.default, (part, value))
    node.meta = {**value.meta, "val": part.meta["val"]}
