"""A shadow: the base of a buffered state in 16 bits, which steps read in its place. The base itself stays exact.

The numbers of one column (one row, where reads contract the columns) share a scale, the power of two that brings the
largest of them into [2^14, 2^15), so that eleven bits of a float16 count whatever the range. It multiplies what is
read, once, behind the sum. With u = 2^-11 (float16) or 2^-8 (bfloat16), a read by x errs by at most

    sum over k of u |x[k] S[k, v]|  +  2^-39 max over k of |S[k, v]| * sum over k of |x[k]|

where the second part stands for float16's subnormal numbers; bfloat16 has no such part. Scaling by powers of two rounds
nothing, so a shadow of numbers that fit is exact.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvbuffer_compile.ir.memory import Dense, along
from kvbuffer_compile.ir.program import Kind, Program, Read

READ_DTYPES = (torch.float16, torch.bfloat16)
LARGEST = 14  # exponent of the largest number of a column in a shadow: float16 ends at 2^16
INFINITE = 255  # the exponent bits of inf and NaN in float32


def scale_kind(program: Program) -> Kind | None:
    """The axis along which a shadow has its scales: the one that all reads leave free. None where there is no such, and
    so no shadow."""
    free: set[Kind] = {"value" if op.x.kind == "key" else "key" for op in program.ops if isinstance(op, Read)}
    return free.pop() if len(free) == 1 else None


def may_have_shadow(program: Program, state_dtype: torch.dtype) -> bool:
    """Whether states of this dtype under this program can be read as a shadow."""
    return state_dtype == torch.float32 and scale_kind(program) is not None


@dataclass(frozen=True)
class Shadow:
    """values: [*lanes, K, V], any dtype. scale: [*lanes, V] for kind "value", [*lanes, K] for "key"."""

    values: Tensor
    scale: Tensor
    kind: Kind

    def read(self, x: Tensor, kind: Kind) -> Tensor:
        """What Dense.read gives, of the rounded state; x contracts the axis that has no scales."""
        assert kind != self.kind, "reads leave the axis of the scales free"
        return Dense(self.values.to(x.dtype)).read(x, kind) * self.scale.to(x.dtype)

    def state(self, dtype: torch.dtype) -> Tensor:
        """The state that is read, [*lanes, K, V]."""
        return self.values.to(dtype) * along(self.scale.to(dtype), self.kind)


def shadow_of(state: Tensor, kind: Kind, dtype: torch.dtype) -> Shadow:
    """The shadow of a float32 state [*lanes, K, V]. Its scale is NaN where a column holds inf or NaN."""
    largest = state.abs().amax(-2 if kind == "value" else -1)
    exponent = largest.view(torch.int32) >> 23
    field = (exponent - LARGEST).clamp(min=1)
    scale, inverse = (bits.view(torch.float32) for bits in (field << 23, (254 - field) << 23))
    values = (state * along(inverse, kind)).to(dtype)
    return Shadow(values, torch.where(exponent == INFINITE, torch.nan, scale), kind)
