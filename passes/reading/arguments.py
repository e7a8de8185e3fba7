"""What a node of a graph computes, and the arguments of its call."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from kvbuffer_compile.passes.reading.labels import Size, size_of


def tensor(node: Node) -> Tensor | None:
    """The fake tensor a node computes, None for anything but a tensor."""
    value = node.meta.get("val")
    return value if isinstance(value, Tensor) else None


def shape(node: Node) -> tuple[Size, ...]:
    """Sizes of the tensor a node computes; () for a number."""
    value = tensor(node)
    return () if value is None else tuple(size_of(n) for n in value.shape)


def is_repeated(node: Node) -> tuple[bool, ...]:
    """For each dim of an input whether it was expanded before it was given: one element, seen many times."""
    value = tensor(node) if node.op == "placeholder" else None
    return () if value is None else tuple(isinstance(s, int) and s == 0 for s in value.stride())


def have_one_shape(x: Node, y: Node) -> bool:
    """Whether two tensors are known to have the same shape."""
    a, b = tensor(x), tensor(y)
    if a is None or b is None or a.dim() != b.dim():
        return False
    return shape(x) == shape(y) or all(statically_known_true(m == n) for m, n in zip(a.shape, b.shape, strict=True))


def argument(node: Node, position: int, name: str, default: Any = None) -> Any:
    """An argument given by position or by name."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def operand(node: Node) -> Any:
    """The tensor that a call is made on."""
    return argument(node, 0, "self")


def rank_of(node: Node) -> int:
    """How many dims a node has."""
    return len(shape(node))


def positive(dim: int, rank: int) -> int:
    """A dim counted from the front."""
    return dim % rank if rank else 0
