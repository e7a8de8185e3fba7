"""The part of a captured graph and of its lifted copy that a proof evaluates.

The two graphs are one here: a node of the copy that is the same call as its original has the original's value, so what
is evaluated is the captured graph, and of the copy only what lifting made. It is cut where computation becomes opaque
(products with weights, convolutions, embeddings, inputs): what that makes is an operand, whatever it was made from.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from kvbuffer_compile.ir.sequence import STANDS_FOR
from kvbuffer_compile.passes.reading.aten import read
from kvbuffer_compile.passes.reading.counterparts import Origins
from kvbuffer_compile.passes.reading.forms import Opaque, Slice

aten = torch.ops.aten
_OPAQUE = frozenset(
    {
        aten.mm, aten.addmm, aten.convolution, aten.embedding, aten.index, aten.index_select, aten.gather,
        aten.topk, aten.sort, aten.scatter, aten.index_put, aten._grouped_mm,
        aten._scaled_dot_product_flash_attention_for_cpu, aten._softmax,
    }
)  # fmt: skip


def is_tensor(node: Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)


@dataclass
class Region:
    """captured: the original graph. below: the nodes of both graphs whose values depend on a state's: they are
    evaluated whatever they are, a read may be a plain matrix product. stops: further nodes to cut at. narrow: cut
    wherever the lift cannot look through, too: it proves more than is needed, of smaller values.
    """

    captured: Graph
    origins: Origins
    below: set[Node] = field(default_factory=set)
    stops: frozenset[Node] = frozenset()
    narrow: bool = False

    def __post_init__(self) -> None:
        self._claimed = frozenset(self.origins.claims.values())  # to be compared, so not to be made up

    def source(self, node: Node) -> Node | None:
        """The node whose value this one has."""
        if node.target is STANDS_FOR:
            return node.all_input_nodes[-1]
        return self.origins.same.get(node) or self.origins.aliases.get(node)

    def is_cut(self, node: Node) -> bool:
        if self.source(node) is not None:
            return False
        if node.op != "call_function" or node in self.stops:
            return True
        opaque = getattr(node.target, "overloadpacket", None) in _OPAQUE or (self.narrow and _is_unseen(node))
        return opaque and self.may_cut(node)

    def may_cut(self, node: Node) -> bool:
        """Whether any value may stand for that of a captured call: nothing is to be compared with it, and the state is
        not in it. What holds for all values of it holds for its own."""
        return node not in self.below and node.graph is self.captured and node not in self._claimed

    def inputs(self, node: Node) -> list[Node]:
        """The nodes that a value is computed from."""
        if (source := self.source(node)) is not None:
            return [source]
        if self.is_cut(node):
            return []
        return node.all_input_nodes

    def order(self, ends: Iterable[Node]) -> list[Node]:
        """The nodes to evaluate for `ends`, operands before users."""
        order: list[Node] = []
        seen: set[Node] = set()
        stack = [(n, False) for n in reversed(list(ends))]
        while stack:
            node, ready = stack.pop()
            if ready:
                order.append(node)
            elif node not in seen:
                seen.add(node)
                stack.append((node, True))
                stack.extend((n, False) for n in self.inputs(node))
        return order


def below(state: Node, captured: Graph, copy: Graph, origins: Origins) -> set[Node]:
    """Every node of both graphs whose values depend on the state's."""
    found = {state}
    if (known := origins.of(state)) is not None:
        found.add(known)
    for node in captured.nodes:
        alias = origins.aliases.get(node)
        known = alias if alias is None else origins.of(alias) or alias
        if known in found or not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    for node in copy.nodes:
        if origins.same.get(node) in found or not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def _is_unseen(node: Node) -> bool:
    """A tensor that the lift takes as it is, made of others."""
    if not is_tensor(node) or not node.all_input_nodes:
        return False
    form: Any = read(node)
    part = isinstance(form, Slice) and node.meta["val"].shape[form.dim] != 1
    return part or isinstance(form, Opaque)
