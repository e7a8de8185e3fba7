"""An op that fails when told to: what goes wrong in the middle of a compiled step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

_blown = [False]


@torch.library.custom_op("kvbuffer_test::fuse", mutates_args=())
def fuse(x: Tensor) -> Tensor:
    """x, opaque to every compiler; raises inside of `blown`."""
    if _blown[0]:
        raise RuntimeError("fuse blown")
    return x.clone()


fuse.register_fake(torch.empty_like)


@contextmanager
def blown() -> Iterator[None]:
    """What runs in here must fail at the fuse."""
    _blown[0] = True
    try:
        with pytest.raises(RuntimeError, match="fuse blown"):
            yield
    finally:
        _blown[0] = False
