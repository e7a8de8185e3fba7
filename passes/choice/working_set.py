"""What one call of a graph touches: of what lies between two visits of a state depends in which cache it is found."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from kvbuffer_compile.passes.lifted import Call

aten = torch.ops.aten
# Ops that take some rows of a table: of an embedding only those of the tokens are touched.
PICKING = frozenset({
    aten.embedding.default, aten.index.Tensor, aten.index_select.default, aten.gather.default, aten.select.int,
})  # fmt: skip


def call_of(gm: GraphModule, states: int) -> Call:
    """What one call of a graph touches: its inputs and constants, each once. Intermediate values are as small as
    operands; what states write is what they are."""
    return Call(sum(_touched(node) for node in gm.graph.nodes if node.op in ("placeholder", "get_attr")), states)


def _touched(node: Node) -> int:
    if not node.users:
        return 0
    if all(user.target in PICKING and user.args[0] is node for user in node.users):
        return min(_bytes(node), sum(map(_bytes, node.users)))
    return _bytes(node)


def _bytes(node: Node) -> int:
    value = node.meta.get("val")
    return prod(map(hint, value.shape)) * value.dtype.itemsize if isinstance(value, Tensor) else 0


def hint(size: int | torch.SymInt) -> int:
    """A size, or the value a symbolic one had when it was captured; no guard is made."""
    return int(size.node.hint) if isinstance(size, torch.SymInt) else int(size)
