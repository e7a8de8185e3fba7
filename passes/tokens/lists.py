"""Calls on lists of tensors (torch._foreach_mul) as one call for each tensor, on a copy of the graph.

They stay so in a graph that is rewritten: one call on the whole list would need tensors that a program has taken the
place of. Each result is by definition that of the call on its own tensors.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import GraphModule, Node

from kvbuffer_compile.passes.algebra.operands import Inserter
from kvbuffer_compile.passes.reading.counterparts import instead

aten = torch.ops.aten
PREFIX = "aten._foreach_"

_BINARY = {"Scalar": "Scalar", "ScalarList": "Scalar", "List": "Tensor", "Tensor": "Tensor"}
_SCALED: dict[str, tuple[str, str | None]] = {way: ("default", "value") for way in ("Scalar", "ScalarList")}
# By name and overload of a call on lists: overload of the call on one tensor, and the keyword of its last argument.
OVERLOADS: dict[str, dict[str, tuple[str, str | None]]] = {
    **{fn: {way: (one, None) for way, one in _BINARY.items()} for fn in ("add", "sub", "mul", "div")},
    "neg": {"default": ("default", None)},
    "copy": {"default": ("default", None)},
    "lerp": {"Scalar": ("Scalar", None), "List": ("Tensor", None)},
    "addcmul": _SCALED,
    "addcdiv": _SCALED,
}


def opened_lists(gm: GraphModule, insert: Inserter, states: set[Node]) -> bool:
    """Write out the calls with a tensor that may depend on one of these. Whether there were any. Changes gm."""
    nodes = [n for n in gm.graph.nodes if n.op == "call_function"]
    if not any(str(n.target).startswith(PREFIX) for n in nodes):
        return False
    depending, found = set(states), False
    for node in nodes:
        if depending.isdisjoint(node.all_input_nodes):
            continue
        depending.add(node)
        if str(node.target).startswith(PREFIX) and (calls := _calls(node)):
            found = True
            for user, (target, args, kwargs) in calls.items():
                new = insert.call(target, *args, **kwargs)
                new.meta = {**user.meta, "val": new.meta["val"], "stack_trace": node.meta.get("stack_trace")}
                instead(new, user)
                user.replace_all_uses_with(new)
                gm.graph.erase_node(user)
                depending.add(new)
            gm.graph.erase_node(node)
    return found


def is_of_list(node: Node) -> bool:
    """Whether a captured node is a result of a call on lists."""
    return node.target is operator.getitem and str(node.all_input_nodes[0].target).startswith(PREFIX)


def _calls(node: Node) -> dict[Node, tuple[Any, tuple[Any, ...], dict[str, Any]]] | None:
    """The call of its own for each result that is used: target and arguments. None for a call that is not known."""
    name, way = str(node.target).removeprefix(PREFIX).split(".")
    known = OVERLOADS.get(name, {}).get(way)
    if known is None or not all(user.target is operator.getitem for user in node.users):
        return None
    overload, keyword = known
    target = getattr(getattr(aten, name), overload)
    return {user: (target, *_arguments(node, user.args[1], keyword)) for user in node.users}


def _arguments(node: Node, index: Any, keyword: str | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    args: list[Any] = [x[index] if isinstance(x, list | tuple) else x for x in node.args]
    kwargs = dict(node.kwargs)
    if keyword is not None and len(args) > 3:
        kwargs[keyword] = args.pop()
    return tuple(args), kwargs
