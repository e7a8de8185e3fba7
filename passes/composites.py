"""Fused calls written out, on a copy of the graph, in the calls that graph.read knows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule, Node

from kvbuffer_compile.passes.captured import candidates
from kvbuffer_compile.passes.forms import Cast, Choice, Product, Quotient, Sum, is_view, operands
from kvbuffer_compile.passes.graph import read
from kvbuffer_compile.passes.nodes import argument, tensor
from kvbuffer_compile.passes.operands import Inserter

aten = torch.ops.aten
Build = Callable[[Inserter, Node], Node]


def opened(gm: GraphModule) -> GraphModule:
    """gm itself, with fused calls replaced. A product with weights and its bias (addmm) is left alone unless one of its
    factors may be a state: every other user keeps the kernel it had."""
    linear = _may_be_linear(gm)
    inserter = Inserter(gm.graph)
    for node in list(gm.graph.nodes):
        build = COMPOSITES.get(str(node.target)) if node.op == "call_function" else None
        if build is None or (node.target is aten.addmm.default and linear.isdisjoint(node.all_input_nodes[-2:])):
            continue
        new = build(inserter, node)
        new.meta = {**node.meta, "val": new.meta["val"]}
        node.replace_all_uses_with(new)
        gm.graph.erase_node(node)
    return gm


def _may_be_linear(gm: GraphModule) -> set[Node]:
    """Nodes that may be a linear image of a state: no contraction lies between."""
    found = set(candidates(gm))
    for node in gm.graph.nodes:
        form = read(node)
        linear = is_view(form) or isinstance(form, Cast | Product | Quotient | Sum | Choice)
        if linear and not found.isdisjoint(operands(form)):
            found.add(node)
    return found


def _scaled(insert: Inserter, x: Any, number: Any) -> Any:
    return x if number == 1 else insert.call(aten.mul.Tensor, x, number)


def _plus_product(product: Any) -> Build:
    """base * beta + alpha * product(x, y)."""

    def build(insert: Inserter, node: Node) -> Node:
        base, x, y = node.args[:3]
        base = _scaled(insert, base, node.kwargs.get("beta", 1))
        result = insert.call(aten.add.Tensor, base, _scaled(insert, product(insert, x, y), node.kwargs.get("alpha", 1)))
        return _same_dtype(insert, result, node)

    return build


def _plus_pointwise(target: Any) -> Build:
    """base + value * target(x, y)."""

    def build(insert: Inserter, node: Node) -> Node:
        base, x, y = node.args[:3]
        value = node.kwargs.get("value", argument(node, 3, "value", 1))
        result = insert.call(aten.add.Tensor, base, _scaled(insert, insert.call(target, x, y), value))
        return _same_dtype(insert, result, node)

    return build


def _lerp(insert: Inserter, node: Node) -> Node:
    x, end, weight = node.args[:3]
    step = insert.call(aten.mul.Tensor, insert.call(aten.sub.Tensor, end, x), weight)
    return _same_dtype(insert, insert.call(aten.add.Tensor, x, step), node)


def _same_dtype(insert: Inserter, result: Node, node: Node) -> Node:
    wanted = tensor(node)
    assert wanted is not None
    if result.meta["val"].dtype == wanted.dtype:
        return result
    return insert.call(torch.ops.prims.convert_element_type.default, result, wanted.dtype)


def _matmul(target: Any) -> Any:
    return lambda insert, x, y: insert.call(target, x, y)


def _outer(insert: Inserter, x: Node, y: Node) -> Node:
    return insert.call(
        aten.mul.Tensor, insert.call(aten.unsqueeze.default, x, 1), insert.call(aten.unsqueeze.default, y, 0)
    )


COMPOSITES: dict[str, Build] = {
    "aten.addcmul.default": _plus_pointwise(aten.mul.Tensor),
    "aten.addcdiv.default": _plus_pointwise(aten.div.Tensor),
    "aten.baddbmm.default": _plus_product(_matmul(aten.bmm.default)),
    "aten.addmm.default": _plus_product(_matmul(aten.mm.default)),
    "aten.addmv.default": _plus_product(_matmul(aten.mv.default)),
    "aten.addr.default": _plus_product(_outer),
    "aten.lerp.Scalar": _lerp,
    "aten.lerp.Tensor": _lerp,
}
