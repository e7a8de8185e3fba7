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

_BINARY = {"Scalar": "Scalar", "ScalarList": "Scalar", "List": "Tensor"}
# By name and overload of a call on lists: the overload of the call on one tensor.
OVERLOADS: dict[str, dict[str, str]] = {
    **{fn: {**_BINARY, "Tensor": "Tensor"} for fn in ("add", "mul", "div")},
    "sub": _BINARY,
    "neg": {"default": "default"},
    "copy": {"default": "default"},
    "lerp": {"Scalar": "Scalar", "List": "Tensor"},
    "addcmul": {"Scalar": "default", "ScalarList": "default"},
    "addcdiv": {"Scalar": "default", "ScalarList": "default"},
}

_FUSED = {aten.addcmul.default: aten.mul.Tensor, aten.addcdiv.default: aten.div.Tensor}


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
        if str(node.target).startswith(PREFIX) and (overload := _overload(node)) is not None:
            found = True
            for user in list(node.users):
                new = _one(insert, node, user.args[1], overload)
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


def _overload(node: Node) -> Any:
    """The call on one tensor that a call on lists makes for each; None for a call that is not known."""
    name, way = str(node.target).removeprefix(PREFIX).split(".")
    overload = OVERLOADS.get(name, {}).get(way)
    if overload is None or not all(user.target is operator.getitem for user in node.users):
        return None
    return getattr(getattr(aten, name), overload)


def _one(insert: Inserter, node: Node, index: Any, overload: Any) -> Node:
    """The call of a list on its tensors at one position."""
    args = [x[index] if isinstance(x, list | tuple) else x for x in node.args]
    if overload not in _FUSED:
        return insert.call(overload, *args, **node.kwargs)
    base, x, y, *rest = args
    scale = rest[0] if rest else node.kwargs.get("value", 1)
    product = insert.call(_FUSED[overload], x, y)
    product = product if scale == 1 else insert.call(aten.mul.Tensor, product, scale)
    return insert.call(aten.add.Tensor, base, product)
