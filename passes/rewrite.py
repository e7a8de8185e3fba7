"""Splice planned steps into the lifted copy of a graph: one op a state in place of the recurrence's own nodes."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._inductor.pattern_matcher import stable_topological_sort
from torch.fx import Graph, GraphModule, Node

from kvbuffer_compile.errors import IRError
from kvbuffer_compile.ir.plan import Plan
from kvbuffer_compile.passes.lifted import Lifted, Output
from kvbuffer_compile.passes.reading.arguments import shape
from kvbuffer_compile.passes.reading.labels import size_of
from kvbuffer_compile.passes.tokens.sequences import closed_sequences

aten = torch.ops.aten
_METADATA_USES = frozenset(
    {aten.sym_size.int, aten.sym_stride.int, aten.sym_numel.default, aten.sym_storage_offset.default}
)


@dataclass(frozen=True)
class Count:
    """A number that is known (size), or found at run time: the graph's input at `source`, or one of its dims."""

    size: int | None = None
    source: int = 0
    dim: int | None = None

    def of(self, args: Sequence[Any]) -> int:
        """The number for these inputs."""
        if self.size is not None:
            return self.size
        given = args[self.source]
        return int(given) if self.dim is None else int(given.shape[self.dim])


@dataclass(frozen=True)
class Spliced:
    """One rewritten state: the position of its tensor among the graph's inputs (slices that became inputs of their own
    included), how many inputs were appended for it (cursor and rows, in the op's order; none for the recurrent
    variant), its position among the outputs when the next state is returned instead of written, and how many times a
    step runs the program."""

    index: int
    plan: Plan
    extra: int
    returned: int | None = None
    tokens: Count = Count(1)


def splice(gm: GraphModule, chosen: list[tuple[Lifted, Plan]], op_of: Callable[[Plan], Any]) -> list[Spliced]:
    """Rewrite gm in place. New placeholders are appended behind the existing ones, state by state.

    op_of: gives a plan's step op. IRError when the state keeps a user besides its op: an operand hid a use of it.
    """
    if not chosen:
        return []
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    last = placeholders[-1]
    done = []
    for lifted, plan in chosen:
        extra, last = _side_inputs(gm.graph, lifted, plan, last)
        _replace(gm.graph, lifted, op_of(plan), extra)
        count = _count(lifted.tokens, placeholders) if lifted.several else Count(1)
        done.append(Spliced(placeholders.index(lifted.state), plan, len(extra), lifted.returned, count))
    closed_sequences(gm)
    stable_topological_sort(gm.graph)
    _write_last(gm.graph)
    gm.graph.eliminate_dead_code()
    for lifted, plan in chosen:
        _require_sole_user(lifted, op_of(plan))
    _lift_constants(gm.graph)
    gm.graph.lint()
    gm.recompile()
    return done


def _count(tokens: int | torch.SymInt, inputs: list[Node]) -> Count:
    size = size_of(tokens)
    if isinstance(size, int):
        return Count(size)
    for i, node in enumerate(inputs):
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt) and size_of(value) == size:
            return Count(None, i)
        for dim, found in enumerate(shape(node)):
            if found == size:
                return Count(None, i, dim)
    raise IRError(f"no input of the graph has the {size} tokens of a step")


def _lift_constants(graph: Graph) -> None:
    """Constants of the model's code are real tensors: Inductor's fake propagation takes them from a lift only."""
    lift = aten.lift_fresh_copy.default
    for node in graph.find_nodes(op="get_attr"):
        bare = [user for user in node.users if user.op == "call_function" and user.target is not lift]
        if bare and isinstance(node.meta.get("val"), torch.Tensor):
            with graph.inserting_after(node):
                lifted = graph.call_function(lift, (node,))
            lifted.meta["val"] = node.meta["val"]
            for user in bare:
                user.replace_input_with(node, lifted)


def _write_last(graph: Graph) -> None:
    """Writes to the other inputs stand behind everything that reads those: sorting does not know of that order."""
    end = graph.output_node()
    for node in list(graph.nodes):
        if node.target is aten.copy_.default:
            end.prepend(node)


def _side_inputs(graph: Graph, lifted: Lifted, plan: Plan, last: Node) -> tuple[list[Node], Node]:
    """Placeholders for the cursor, the rows and the shadow of a buffered state."""
    if plan.variant == "recurrent":
        return [], last
    state = lifted.state.meta["val"]
    lanes = tuple(plan.layout.canonical(state).shape[:-2])
    shapes: list[tuple[str, tuple[Any, ...], torch.dtype]] = [("cursor", (4, plan.sequences(lanes)), torch.int32)]
    for v, dtype in zip(plan.program.logged, plan.row_dtypes, strict=True):
        shapes.append((f"row_{v}", plan.row_shape(v, lanes), dtype))
    if plan.read_dtype is not None:
        shapes.append(("shadow", tuple(state.shape), plan.read_dtype))
        shapes.append(("scale", plan.scale_shape(lanes), torch.float32))
    nodes = []
    for name, dims, dtype in shapes:
        with graph.inserting_after(last):
            last = graph.placeholder(f"{lifted.state.name}_{name}")
        last.meta["val"] = state.new_empty(dims, dtype=dtype)
        nodes.append(last)
    return nodes, last


def _replace(graph: Graph, lifted: Lifted, op: Any, extra: list[Node]) -> None:
    """Insert the op at the end (sorting moves it), hand its outputs to the users of the reads, drop the write."""
    end = graph.output_node()
    with graph.inserting_before(end):
        slots = () if lifted.slots is None else (lifted.slots,)
        step = graph.call_function(op, (lifted.state, *extra, *slots, *lifted.operands))
        step.meta["val"] = op(*(n.meta["val"] for n in step.args if isinstance(n, Node)))
        many = len(lifted.program.outputs) != 1
        for output in lifted.outputs:
            value = _call(graph, operator.getitem, (step, output.index)) if many else step
            if output.token is not None:
                value = _call(graph, aten.select.int, (value, lifted.layout.lanes, output.token))
            if output.plus is not None:
                value = _call(graph, aten.add.Tensor, (value, output.plus))
            output.node.replace_all_uses_with(_restored(graph, value, output))
    if lifted.write is not None:
        graph.erase_node(lifted.write)
    else:
        _return_state(end, lifted)


def _restored(graph: Graph, value: Node, output: Output) -> Node:
    """A program output in the dims and dtype of the node it stands for."""
    value = _call(graph, aten.permute.default, (value, list(output.perm)))
    value = _call(graph, aten.reshape.default, (value, list(output.shape)))
    dtype = output.node.meta["val"].dtype
    if value.meta["val"].dtype != dtype:
        value = _call(graph, torch.ops.prims.convert_element_type.default, (value, dtype))
    return value


def _call(graph: Graph, target: Any, args: tuple[Any, ...]) -> Node:
    """A call with its fake value."""
    node = graph.call_function(target, args)
    node.meta["val"] = target(*torch.fx.node.map_arg(args, lambda n: n.meta["val"]))
    return node


def _return_state(end: Node, lifted: Lifted) -> None:
    """The next state is returned: the state itself, updated in place (the user donated it), takes its position."""
    returned: Any = end.args[0]
    end.args = (type(returned)(lifted.state if i == lifted.returned else x for i, x in enumerate(returned)),)


def _require_sole_user(lifted: Lifted, op: Any) -> None:
    others = [
        n for n in lifted.state.users
        if n.target is not op and n.target not in _METADATA_USES and not (n.op == "output" and lifted.write is None)
    ]  # fmt: skip
    if others:
        raise IRError(f"state {lifted.state} keeps the users {others} beside its step\n{lifted.program}")
