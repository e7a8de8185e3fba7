"""The narrowest dtype that holds a node's values: what rows and shadows are kept in."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

aten = torch.ops.aten

# Ops whose result holds values of their first argument and nothing else.
_SAME_VALUES = frozenset({
    aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.unsqueeze.default, aten.squeeze.default,
    aten.squeeze.dim, aten.squeeze.dims, aten.permute.default, aten.transpose.int, aten.t.default, aten.expand.default,
    aten.clone.default, aten.alias.default, aten.detach.default, aten.select.int, aten.slice.Tensor,
})  # fmt: skip
_CASTS = frozenset({aten._to_copy.default, torch.ops.prims.convert_element_type.default})


def exact_dtype(node: Node, compute: torch.dtype) -> torch.dtype:
    """The narrowest dtype, found by walking back over views and widening casts, that holds a node's values exactly.
    At most the compute dtype: the arithmetic drops the rest anyway."""
    dtype = _dtype(node)
    if dtype is None or not dtype.is_floating_point:
        return compute
    if node.target is aten.cat.default:
        parts: Any = node.args[0]
        return functools.reduce(torch.promote_types, (exact_dtype(part, compute) for part in parts))
    while node.target in _SAME_VALUES or node.target in _CASTS:
        source = node.args[0]
        narrower = _dtype(source) if isinstance(source, Node) else None
        if not isinstance(source, Node) or narrower is None or not holds(dtype, narrower):
            break
        node, dtype = source, narrower
    return compute if dtype.itemsize > compute.itemsize else dtype


def _dtype(node: Node) -> torch.dtype | None:
    value = node.meta.get("val")
    return value.dtype if isinstance(value, Tensor) else None


def holds(wide: torch.dtype, narrow: torch.dtype) -> bool:
    """Whether every value of `narrow` is one of `wide`."""
    if not (wide.is_floating_point and narrow.is_floating_point):
        return False
    large, small = torch.finfo(wide), torch.finfo(narrow)
    return large.eps <= small.eps and large.max >= small.max and large.tiny <= small.tiny
