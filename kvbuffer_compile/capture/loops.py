"""Loops as ops (`scan`, `associative_scan`, `while_loop`) written out token by token, so that their carries can be
lifted.

Done on the graph that Dynamo captured, where a loop's body is a graph of its own. Only loops of at most MOST_TRIPS
trips whose number is fixed: the length of what a scan runs over, or a counter that starts at a constant and alone
decides when to stop. A loop that may end early is left as it is.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

MOST_TRIPS = 16
LARGEST_CONSTANT = 16  # elements of a value that is computed here: counters and positions
SCAN, WHILE = torch.ops.higher_order.scan, torch.ops.higher_order.while_loop
ASSOCIATIVE = torch.ops.higher_order.associative_scan
FACTORIES = (torch.zeros, torch.ones, torch.full, torch.tensor, torch.arange)


def unrolled(gm: GraphModule) -> GraphModule | None:
    """A copy of the graph with its short loops written out; None when it has none."""
    if not any(n.target in WRITERS for n in gm.graph.nodes):
        return None
    new = GraphModule(gm, copy.deepcopy(gm.graph))
    new.meta.update(gm.meta)
    for fresh, old in zip(new.graph.nodes, gm.graph.nodes, strict=True):
        fresh.meta = dict(old.meta)  # fake tensors are shared, not copied
    done = [_write_out(new, n) for n in list(new.graph.nodes) if n.target in WRITERS]
    if not any(done):
        return None
    new.delete_all_unused_submodules()
    new.graph.lint()
    new.recompile()
    return new


def _write_out(gm: GraphModule, loop: Node) -> bool:
    writer = _Writer(loop)
    results = WRITERS[loop.target](gm, loop, writer)
    if results is None:
        return False
    for user in list(loop.users):
        index: Any = user.args[1]
        assert user.target is operator.getitem
        user.replace_all_uses_with(writer.node(results[index]))
        gm.graph.erase_node(user)
    gm.graph.erase_node(loop)
    return True


def _scan(gm: GraphModule, loop: Node, writer: _Writer) -> list[Any] | None:
    """Final carries, then what every trip gives, stacked."""
    body, carried, over, others = loop.args
    graph = _body(gm, body)
    assert isinstance(carried, list | tuple) and isinstance(over, list | tuple) and isinstance(others, list | tuple)
    length = _length(over)
    if graph is None or length is None:
        return None
    values: list[Any] = list(carried)
    given: list[list[Any]] = []
    for trip in range(length):
        at = [writer.call(torch.select, x, 0, trip) for x in over]
        out = writer.inline(graph, [*values, *at, *others])
        values = out[: len(values)]
        given.append(out[len(values) :])
    stacked = [writer.call(torch.stack, [writer.node(x) for x in each]) for each in zip(*given, strict=True)]
    return [*values, *stacked]


def _associative(gm: GraphModule, loop: Node, writer: _Writer) -> list[Any] | None:
    """What is combined of all elements up to each, stacked."""
    body, over, others = loop.args
    graph = _body(gm, body)
    assert isinstance(over, list | tuple) and isinstance(others, list | tuple)
    length = _length(over)
    if graph is None or length is None:
        return None
    values = [[writer.call(torch.select, x, 0, 0) for x in over]]
    for trip in range(1, length):
        at = [writer.call(torch.select, x, 0, trip) for x in over]
        values.append(writer.inline(graph, [*values[-1], *at, *others]))
    return [writer.call(torch.stack, [writer.node(x) for x in each]) for each in zip(*values, strict=True)]


def _length(over: Sequence[Any]) -> int | None:
    """How many trips a scan makes, None when that is not fixed or too many."""
    example = over[0].meta.get("example_value") if over and isinstance(over[0], Node) else None
    length = example.shape[0] if isinstance(example, Tensor) else None
    return length if isinstance(length, int) and length <= MOST_TRIPS else None


def _while(gm: GraphModule, loop: Node, writer: _Writer) -> list[Any] | None:
    """Final carries, when the condition follows from constants alone."""
    condition, body, carried, others = loop.args
    test, graph = _body(gm, condition), _body(gm, body)
    assert isinstance(carried, list | tuple) and isinstance(others, list | tuple)
    if test is None or graph is None:
        return None
    values = [_constant(x) for x in carried]
    for _ in range(MOST_TRIPS + 1):
        going = writer.inline(test, [*values, *others])[0]
        if isinstance(going, Node):
            break
        if not bool(going):
            return values
        values = writer.inline(graph, [*values, *others])
    writer.undo()
    return None


WRITERS: dict[Any, Callable[[GraphModule, Node, _Writer], list[Any] | None]] = {
    SCAN: _scan, ASSOCIATIVE: _associative, WHILE: _while,
}  # fmt: skip


def _body(gm: GraphModule, node: Any) -> Graph | None:
    """The graph of a loop's function; None when it holds modules or loops of its own."""
    inner = getattr(gm, node.target)
    if not isinstance(inner, GraphModule) or any(n.op in ("get_attr", "call_module") for n in inner.graph.nodes):
        return None
    return inner.graph


def _constant(x: Any) -> Any:
    """The value of a node that is a small constant of whole numbers; otherwise the node."""
    if not isinstance(x, Node) or x.op != "call_function" or x.target not in FACTORIES or x.all_input_nodes:
        return x
    factory: Any = x.target
    made = factory(*x.args, **{**x.kwargs, "device": "cpu"})
    return made if _is_small(made) else x


def _is_small(x: Any) -> bool:
    return isinstance(x, Tensor) and not x.dtype.is_floating_point and x.numel() <= LARGEST_CONSTANT


class _Writer:
    """Inserts copies of a body in front of a loop. Values are nodes, numbers, or constants known by now (tensors)."""

    def __init__(self, loop: Node) -> None:
        self.loop = loop
        self.graph = loop.graph
        self.device = next((_device(n) for n in loop.all_input_nodes if _device(n) is not None), None)
        self.made: list[Node] = []

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
        with self.graph.inserting_before(self.loop):
            node = self.graph.call_function(target, args, kwargs)
        node.meta["stack_trace"] = self.loop.meta.get("stack_trace")
        self.made.append(node)
        return node

    def node(self, value: Any) -> Any:
        """A value as an argument of a call."""
        if not isinstance(value, Tensor):
            return value
        return self.call(torch.tensor, value.tolist(), dtype=value.dtype, device=self.device)

    def inline(self, body: Graph, arguments: Sequence[Any]) -> list[Any]:
        """One trip: the values of the body's outputs."""
        inputs = iter(arguments)
        env: dict[Node, Any] = {}
        for n in body.nodes:
            if n.op == "placeholder":
                env[n] = next(inputs)
            elif n.op == "output":
                out = map_arg(n.args[0], env.__getitem__)
                return list(out) if isinstance(out, list | tuple) else [out]
            else:
                env[n] = self._one(n, env)
        raise AssertionError("a graph ends with its output")

    def _one(self, n: Node, env: dict[Node, Any]) -> Any:
        args: Any = map_arg(n.args, env.__getitem__)
        kwargs: Any = map_arg(n.kwargs, env.__getitem__)
        given = [env[x] for x in n.all_input_nodes]
        target: Any = n.target
        if given and not any(isinstance(x, Node) for x in given):
            known = getattr(args[0], target)(*args[1:], **kwargs) if n.op == "call_method" else target(*args, **kwargs)
            if not isinstance(known, Tensor) or _is_small(known):
                return known
        if n.target in ("index_select", torch.index_select) and isinstance(args[2], Tensor) and args[2].numel() == 1:
            return self.call(torch.narrow, args[0], args[1], int(args[2]), 1)
        with self.graph.inserting_before(self.loop):
            node = self.graph.node_copy(n, lambda x: self.node(env[x]))
        self.made.append(node)
        return node

    def undo(self) -> None:
        """Take everything back."""
        for node in reversed(self.made):
            self.graph.erase_node(node)
        self.made.clear()


def _device(node: Node) -> torch.device | None:
    example = node.meta.get("example_value")
    return example.device if isinstance(example, Tensor) else None
