"""The one place with tolerances: a result is right when it is as near to float64 as the eager model is."""

from __future__ import annotations

import torch
from torch import Tensor

FACTOR = 1.5  # of the error of eager in its working dtype
ULPS = 8  # of the largest value, for results where eager happens to be exact


def excess(got: Tensor, eager: Tensor, exact: Tensor) -> float:
    """Error of `got` beyond what is allowed, relative to the largest value; <= 0 is right.

    exact: the same computation in float64. eager: in the working dtype, whose rounding sets the scale; truth values and
    integers must be equal.
    """
    exact = exact.double()
    scale = exact.abs().max().clamp_min(1e-30)
    error = (got.double() - exact).abs().max() / scale
    ulp = torch.finfo(eager.dtype).eps if eager.is_floating_point() else 0
    allowed = FACTOR * (eager.double() - exact).abs().max() / scale + ULPS * ulp
    if not bool(error.isfinite()):
        return float("inf")
    return float(error - allowed)


def check(got: Tensor, eager: Tensor, exact: Tensor, what: str = "result") -> None:
    """AssertionError when `got` is worse than the oracle allows."""
    over = excess(got, eager, exact)
    assert over <= 0, f"{what}: error exceeds that of eager by {over:.3g} of the largest value"
