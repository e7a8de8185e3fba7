"""The memory that a state's rows and its shadow are kept in."""

from __future__ import annotations

import math
import os

import torch
from torch import Tensor

from kvbuffer_compile.errors import StateError
from kvbuffer_compile.guard.overlap import has_memory
from kvbuffer_compile.ir.plan import Plan
from kvbuffer_compile.steps import ops


def allocate(state: Tensor, plan: Plan) -> tuple[Tensor, list[Tensor]]:
    """Cursor and rows for a state; nothing has happened to it when there is no memory for them: StateError."""
    lanes = plan.layout.sizes(state.shape)[:-2]
    logged = list(zip(plan.program.logged, plan.row_dtypes, strict=True))
    try:
        cursor = ops.new_cursor(plan, lanes, state.device)
        rows = [torch.empty(plan.row_shape(v, lanes), dtype=dtype, device=state.device) for v, dtype in logged]
    except RuntimeError as error:
        needed = sum(math.prod(plan.row_shape(v, lanes)) * dtype.itemsize for v, dtype in logged)
        raise StateError(
            f"no memory for {plan.capacity} rows of a state of shape {tuple(state.shape)}, {needed / 1e9:.3g} GB: the "
            f"state is as it was; use a smaller flush (now {plan.flush}) or capacity\n{error}"
        ) from error
    if os.environ.get("KVBUFFER_STRICT") == "1":  # unused slots must never be read
        for row in rows:
            row.fill_(float("nan"))
    return cursor, rows


def allocate_shadow(state: Tensor, plan: Plan) -> tuple[Tensor, ...]:
    """A shadow that holds nothing yet, and its scale; nothing where the plan has none. Without memory while the state
    has none. StateError as for rows."""
    if plan.read_dtype is None:
        return ()
    lanes = plan.layout.sizes(state.shape)[:-2]
    try:
        scale = torch.zeros(plan.scale_shape(lanes), dtype=torch.float32, device=state.device)
        shadow = torch.empty(state.shape, dtype=plan.read_dtype, device=state.device)
    except RuntimeError as error:
        raise StateError(
            f"no memory for a shadow of a state of shape {tuple(state.shape)}, {state.numel() * 2e-9:.3g} GB: the "
            f"state is as it was; use read_dtype=None\n{error}"
        ) from error
    if not has_memory(state):
        shadow.untyped_storage().resize_(0)
    elif os.environ.get("KVBUFFER_STRICT") == "1":  # what was never made must never be read
        shadow.fill_(float("nan"))
    return shadow, scale
