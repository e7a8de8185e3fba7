"""One tensor that holds the states of several layers or heads, each touched only as a constant slice of it.

Slices become inputs of the graph (`apart`), and then are states like any other, or stacks themselves; the tensor itself
is used no more.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch.fx import GraphModule, Node

from kvbuffer_compile.passes.algebra.operands import Inserter
from kvbuffer_compile.passes.lifted import Part
from kvbuffer_compile.passes.reading.arguments import argument, shape
from kvbuffer_compile.passes.reading.aten import read
from kvbuffer_compile.passes.reading.captured import written
from kvbuffer_compile.passes.reading.forms import Constant, Metadata, Regroup, Same, Select, Slice, is_view, operands
from kvbuffer_compile.passes.reading.labels import Size

aten = torch.ops.aten
SCATTERS = (aten.select_scatter.default, aten.slice_scatter.default)
Place = tuple[int, int]  # a dim, and the position in it


@dataclass(frozen=True)
class Piece:
    """What one slice holds. wide: the node keeps the dim that is indexed, of size 1."""

    node: Node
    wide: bool = False

    def through(self, now: dict[Node, Node]) -> Piece:
        """With the node that stands for this one by now."""
        return Piece(now.get(self.node, self.node), self.wide)

    def of_width(self, wide: bool, dim: int, insert: Inserter) -> Node:
        """The value with that dim or without."""
        if self.wide == wide:
            return self.node
        target, args = (aten.unsqueeze.default, (dim,)) if wide else (aten.select.int, (dim, 0))
        return insert.call(target, self.node, *args)


@dataclass
class Stack:
    """An input and its slices along one dim. values: for every node that holds all of it, what was stored last in each
    slice; a slice that is missing is still that of the input."""

    state: Node
    write: Node
    values: dict[Node, dict[Place, Piece]] = field(default_factory=dict)
    reads: list[tuple[Piece, Node, Place]] = field(default_factory=list)  # slice, what it is taken from, where

    @property
    def places(self) -> list[Place]:
        """The slices that are used, in order."""
        return sorted({place for *_, place in self.reads} | set(self.stored))

    @property
    def stored(self) -> dict[Place, Piece]:
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
        stack.reads.append((Piece(node), base, (form.dim, form.index)))
    elif isinstance(form, Slice) and shape(node)[form.dim] == 1:
        stack.reads.append((Piece(node, wide=True), base, (form.dim, form.start)))
    elif node.target is aten.unbind.int:
        pieces = [(user, read(user)) for user in node.users]
        stack.reads += [(Piece(user), base, (one.dim, one.index)) for user, one in pieces if isinstance(one, Select)]
    elif node.target is aten.split.Tensor:
        pieces = [(user, read(user)) for user in node.users]
        if not all(isinstance(one, Slice) and shape(user)[one.dim] == 1 for user, one in pieces):
            return False
        stack.reads += [
            (Piece(user, True), base, (one.dim, one.start)) for user, one in pieces if isinstance(one, Slice)
        ]
    elif isinstance(form, Same) and form.x is base:
        stack.values[node] = stack.values[base]
    elif node.target in SCATTERS and node.args[0] is base and node.args[1] not in stack.values:
        found = _scattered(node, shape(base))
        if found is None:
            return False
        stack.values[node] = {**stack.values[base], found[0]: found[1]}
    else:
        return node is stack.write or isinstance(form, Metadata | Constant | Same)  # the last: overwritten by another
    return True


def _scattered(node: Node, sizes: tuple[Size, ...]) -> tuple[Place, Piece] | None:
    """The one slice that a scatter changes."""
    value, dim, at = node.args[1], argument(node, 2, "dim", 0), argument(node, 3, "index", None)
    wide = node.target is aten.slice_scatter.default
    if wide:
        at = argument(node, 3, "start", None) or 0
    if not isinstance(value, Node) or not isinstance(at, int) or (wide and shape(value)[dim] != 1):
        return None
    size = sizes[dim]
    if at < 0 and not isinstance(size, int):
        return None
    return (dim % len(sizes), at % size if isinstance(size, int) else at), Piece(value, wide)


def _pieces(node: Node, sizes: tuple[Size, ...]) -> dict[Place, Piece] | None:
    """torch.stack of one value for each slice, as it is decomposed: a cat along dim 0, or of unsqueezed values."""
    joined = node.args[0] if isinstance(read(node), Regroup) else node
    if not isinstance(joined, Node) or joined.target is not aten.cat.default or len(node.users) > 1:
        return None
    values = argument(joined, 0, "tensors")
    dim = argument(joined, 1, "dim", 0) % len(sizes)
    if len(values) != sizes[dim] or shape(node) != sizes:
        return None
    narrow, wide = (*sizes[:dim], *sizes[dim + 1 :]), (*sizes[:dim], 1, *sizes[dim + 1 :])
    fits = all(shape(x) == (wide if joined is node else narrow) for x in values)
    return {(dim, i): Piece(x, joined is node) for i, x in enumerate(values)} if fits else None


def apart(gm: GraphModule, found: list[Stack]) -> tuple[Part, ...]:
    """Make every slice an input of its own, behind the others, and store it there. Changes gm."""
    whole = gm.graph.find_nodes(op="placeholder")
    parts: dict[Node, Part] = {}
    while found:
        inputs: dict[tuple[Node, Place], Node] = {}
        for stack in found:
            of = parts.pop(stack.state, None) or Part("", whole.index(stack.state), ())
            for place in stack.places:
                node = inputs[stack.state, place] = _input(stack.state, place)
                parts[node] = Part(node.name, of.index, (*of.place, place))
        _replace(found, inputs)
        gm.graph.eliminate_dead_code()
        for stack in found:
            if stack.state not in whole:
                gm.graph.erase_node(stack.state)
        found = [stack for stack in stacks(gm) if stack.state in parts]
    return tuple(parts.values())


def _replace(found: list[Stack], inputs: dict[tuple[Node, Place], Node]) -> None:
    """Each slice is what was stored there last, or its input."""
    insert = Inserter(found[0].state.graph)
    order = {node: i for i, node in enumerate(found[0].state.graph.nodes)}
    now: dict[Node, Node] = {}
    reads = [(order[piece.node], piece, stack, base, place) for stack in found for piece, base, place in stack.reads]
    for _, piece, stack, base, place in sorted(reads, key=lambda r: r[0]):
        last = stack.values[base].get(place, Piece(inputs[stack.state, place])).through(now)
        now[piece.node] = last.of_width(piece.wide, place[0], insert)
        piece.node.replace_all_uses_with(now[piece.node])
    writes = [
        (
            inputs[stack.state, place],
            _kept(last.through(now).of_width(False, place[0], insert), stack.write),
            stack.write,
        )
        for stack in found
        for place, last in stack.stored.items()
    ]
    for part, value, write in writes:
        _store(part, value, write)
    for stack in found:
        stack.write.graph.erase_node(stack.write)


def _kept(value: Node, write: Node) -> Node:
    """A value that no write changes: of another input's memory, a copy."""
    base, form = value, read(value)
    while is_view(form):
        base = operands(form)[0]
        form = read(base)
    if base.op != "placeholder":
        return value
    with write.graph.inserting_before(write):
        copy = write.graph.call_function(aten.clone.default, (value,))
    copy.meta = dict(value.meta)
    return copy


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
