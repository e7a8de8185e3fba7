"""Tensors that are made of others: DTensor is one, with this rank's part of a state inside."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def is_wrapper(x: object) -> bool:
    """Whether a tensor is made of others."""
    return isinstance(x, Tensor) and is_traceable_wrapper_subclass(x)


def inside(x: Any) -> Iterator[Tensor]:
    """The ordinary tensors that a wrapper is made of, whatever it wraps; of any other tensor, itself."""
    if not is_wrapper(x):
        yield x
        return
    for name in x.__tensor_flatten__()[0]:
        part = getattr(x, name)
        if isinstance(part, Tensor):  # a DTensor also names its mesh
            yield from inside(part)
