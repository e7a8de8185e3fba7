"""Fused calls written out, on a copy of the graph, in the calls that reading/aten.py knows."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.fx import GraphModule, Node

from kvbuffer_compile.ir.sequence import STANDS_FOR
from kvbuffer_compile.passes.algebra.operands import Inserter
from kvbuffer_compile.passes.lifted import Lifted, LiftedGraph
from kvbuffer_compile.passes.reading.arguments import argument, tensor
from kvbuffer_compile.passes.reading.aten import read
from kvbuffer_compile.passes.reading.captured import candidates
from kvbuffer_compile.passes.reading.counterparts import instead, is_instead
from kvbuffer_compile.passes.reading.forms import Cast, Choice, Product, Quotient, Sum, is_view, operands
from kvbuffer_compile.passes.tokens.lists import is_of_list, opened_lists

aten = torch.ops.aten
Build = Callable[[Inserter, Node], Node]


def opened(gm: GraphModule) -> GraphModule:
    """gm itself, with fused calls replaced. A product with weights and its bias (addmm) is left alone unless one of its
    operands may be a linear image of a state: every other user keeps the kernel it had."""
    linear = set(candidates(gm))
    inserter = Inserter(gm.graph)
    if opened_lists(gm, inserter, set(linear)):
        inserter = Inserter(gm.graph)
    for node in list(gm.graph.nodes):
        build = COMPOSITES.get(str(node.target)) if node.op == "call_function" else None
        if build is None:
            if _is_linear(node, linear):
                linear.add(node)
        elif node.target is not aten.addmm.default or not linear.isdisjoint(node.all_input_nodes):
            new = _replaced(inserter, node, build)
            if not linear.isdisjoint(node.all_input_nodes):
                linear.add(new)
            gm.graph.erase_node(node)
    return gm


def _replaced(inserter: Inserter, node: Node, build: Build) -> Node:
    new = build(inserter, node)
    new.meta = {**node.meta, "val": new.meta["val"]}
    instead(new, node)
    node.replace_all_uses_with(new)
    return new


def put_back(graph: LiftedGraph, chosen: Iterable[Lifted]) -> None:
    """Make fused calls, and reads of several queries, again what they were, except where a program's output is inside:
    they are proved, and everything else stays as it was captured."""
    if graph.origins is None:
        return
    kept = set(graph.origins.behind(o.node for lifted in chosen for o in lifted.outputs))
    standing = graph.origins.standing()
    same = {old: new for new, old in graph.origins.same.items()}
    for new, old in graph.origins.claims.items():
        if new in kept or not is_instead(new) or new.target is STANDS_FOR or is_of_list(old):
            continue
        whole = same.get(old)
        if whole is None:
            with graph.gm.graph.inserting_after(new):
                whole = graph.gm.graph.node_copy(old, standing.__getitem__)
        new.replace_all_uses_with(whole)
        standing[old] = whole


def _is_linear(node: Node, linear: set[Node]) -> bool:
    """Whether a node may be a linear image of a state, given those before it: no contraction lies between."""
    form = read(node)
    kept = is_view(form) or isinstance(form, Cast | Product | Quotient | Sum | Choice)
    return kept and not linear.isdisjoint(operands(form))


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


def _fma(insert: Inserter, node: Node) -> Node:
    """x * y + z, which Inductor makes of addcmul with a factor."""
    x, y, z = node.args
    return _same_dtype(insert, insert.call(aten.add.Tensor, insert.call(aten.mul.Tensor, x, y), z), node)


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
    "prims.fma.default": _fma,
    "aten.lerp.Scalar": _lerp,
    "aten.lerp.Tensor": _lerp,
}
