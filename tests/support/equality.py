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


def equal(a: Any, b: Any, rounding: float = 0.0) -> bool:
    """The same values; what holds no values is equal to anything. rounding: what floating-point tensors may differ by
    beyond their dtype's own rounding, as a part of the largest value: LAPACK's last bits depend on how its arguments
    are aligned, and a solve makes much of them."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return _equal_tensors(a, b, rounding)
    if isinstance(a, np.ndarray | torch.UntypedStorage):
        return bool(np.array_equal(np.asarray(a), np.asarray(b), equal_nan=True))
    if isinstance(a, dict):
        return equal(list(a.items()), list(b.items()), rounding)
    if isinstance(a, list | tuple | types.GeneratorType):
        a, b = list(a), list(b)
        return len(a) == len(b) and all(equal(x, y, rounding) for x, y in zip(a, b, strict=True))
    if isinstance(a, str):
        return _numbers(a) == _numbers(b)
    if isinstance(a, float):
        return a == b or (math.isnan(a) and math.isnan(b))
    return bool(a == b) if isinstance(a, int | bool | complex) else True


def _equal_tensors(a: Tensor, b: Tensor, rounding: float) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype or a.layout != b.layout:
        return False
    if a.layout is not torch.strided:
        a, b = a.to_dense(), b.to_dense()
    if a.is_complex():
        a, b = (torch.view_as_real(x.to(torch.complex128).resolve_conj()) for x in (a, b))
    if not torch.equal(a.isnan(), b.isnan()):
        return False
    a, b = (x.nan_to_num(0, 1e30, -1e30) if x.is_floating_point() else x for x in (a, b))
    return torch.equal(a, b) or (a.is_floating_point() and _near(a, b, rounding))


def _near(a: Tensor, b: Tensor, rounding: float) -> bool:
    if (a.double() - b.double()).abs().max() <= rounding * b.abs().max():
        return True
    try:
        check(a, b, b.double())
    except AssertionError:
        return False
    return True


def _numbers(text: str) -> list[float]:
    return [float(x) for x in re.findall(r"-?\d+\.?\d*(?:e[-+]\d+)?", text)]
