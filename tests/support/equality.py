"""Whether two results of anything are the same, whatever kind of thing they are."""

from __future__ import annotations

import math
import re
import types
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.support.oracle import check


def equal(a: Any, b: Any) -> bool:
    """The same values; what holds no values is equal to anything."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return _equal_tensors(a, b)
    if isinstance(a, np.ndarray | torch.UntypedStorage):
        return bool(np.array_equal(np.asarray(a), np.asarray(b), equal_nan=True))
    if isinstance(a, dict):
        return equal(list(a.items()), list(b.items()))
    if isinstance(a, list | tuple | types.GeneratorType):
        a, b = list(a), list(b)
        return len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, str):
        return _numbers(a) == _numbers(b)
    if isinstance(a, float):
        return a == b or (math.isnan(a) and math.isnan(b))
    return bool(a == b) if isinstance(a, int | bool | complex) else True


def _equal_tensors(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype or a.layout != b.layout:
        return False
    if a.layout is not torch.strided:
        a, b = a.to_dense(), b.to_dense()
    if a.is_complex():
        a, b = (torch.view_as_real(x.to(torch.complex128).resolve_conj()) for x in (a, b))
    if not torch.equal(a.isnan(), b.isnan()):
        return False
    a, b = (x.nan_to_num(0, 1e30, -1e30) if x.is_floating_point() else x for x in (a, b))
    # LAPACK's last bits depend on how its arguments are aligned
    return torch.equal(a, b) or (a.is_floating_point() and _near(a, b))


def _near(a: Tensor, b: Tensor) -> bool:
    try:
        check(a, b, b.double())
    except AssertionError:
        return False
    return True


def _numbers(text: str) -> list[float]:
    return [float(x) for x in re.findall(r"-?\d+\.?\d*(?:e[-+]\d+)?", text)]
