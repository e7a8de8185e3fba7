"""Where the memory of tensors is, and whether two on one storage share some, told from their strides alone."""

from __future__ import annotations

import torch
from torch import Tensor

Reach = list[tuple[int, int, int]]  # by stride, largest first: the stride, the last index of one and of the other


def has_memory(t: Tensor) -> bool:
    """Whether there is memory behind a tensor: states that are zero do without while they can."""
    return t.numel() == 0 or t.untyped_storage().nbytes() > 0


def storage_of(t: Tensor) -> int:
    """What tensors on the same storage have in common; 0 for those without one."""
    return int(t.untyped_storage()._cdata) if torch._C._has_storage(t) else 0


def provide(t: Tensor) -> None:
    """Put memory behind a tensor that has none, whatever that then holds."""
    if not has_memory(t):
        t.untyped_storage().resize_(_span(t)[1])


def overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors on the same storage have an element in common.

    Exact for slices of one tensor; True where sizes and strides are too odd to tell.
    """
    if a.numel() == 0 or b.numel() == 0:
        return False
    low, high = _span(a)
    start, end = _span(b)
    if high <= start or end <= low:
        return False
    reach = _reach(a, b)
    if reach is None or a.element_size() != b.element_size():
        return True
    return _meet(int(b.storage_offset()) - int(a.storage_offset()), reach)


def covers(a: Tensor, b: Tensor) -> bool:
    """Whether a tensor without gaps has all the memory of another one on the same storage."""
    low, high = _span(a)
    start, end = _span(b)
    return low <= start and end <= high and a.numel() * a.element_size() == high - low


def _span(t: Tensor) -> tuple[int, int]:
    """First and one past the last byte a tensor touches within its storage."""
    start = int(t.storage_offset()) * t.element_size()
    last = sum((n - 1) * int(s) for n, s in zip(t.shape, t.stride(), strict=True))
    return start, start + (last + 1) * t.element_size()


def _reach(a: Tensor, b: Tensor) -> Reach | None:
    """None when a tensor has two dims of one stride."""
    ends: dict[int, list[int]] = {}
    for which, t in enumerate((a, b)):
        for n, s in zip(t.shape, t.stride(), strict=True):
            if n > 1:
                end = ends.setdefault(int(s), [0, 0])
                if s == 0 or end[which]:
                    return None
                end[which] = n - 1
    return [(s, *ends[s]) for s in sorted(ends, reverse=True)]  # type: ignore[misc]


def _meet(distance: int, reach: Reach) -> bool:
    """Whether distance = sum of (i - j) * stride for some i within the one tensor and j within the other."""
    if not reach:
        return distance == 0
    (stride, end, other), *inner = reach
    forward, back = sum([s * m for s, m, _ in inner]), sum([s * n for s, _, n in inner])
    first = max(-other, -((forward - distance) // stride))
    last = min(end, (distance + back) // stride)
    if last - first > 2:
        return True  # dims that interleave
    for m in range(first, last + 1):  # three at most
        if _meet(distance - m * stride, inner):
            return True
    return False
