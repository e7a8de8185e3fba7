"""The memory that a state's rows are kept in."""

from __future__ import annotations

import math
import os

import torch
from torch import Tensor

from kvbuffer_compile.errors import StateError
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
