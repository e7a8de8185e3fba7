"""Arguments of a step in the shapes of the calling convention, to compile or to time a kernel with."""

from __future__ import annotations

from typing import Any

import torch

from kvbuffer_compile.ir.plan import Plan
from kvbuffer_compile.ir.program import Var


def example(plan: Plan, lanes: tuple[int, ...], tokens: int, device: str | torch.device) -> tuple[Any, ...]:
    """(state, cursor, tickets, rows and shadow, operands) for a state whose lanes have these sizes: contiguous zeros,
    and a cursor that flushes every plan.flush tokens. tokens: of a verify step. For a tree also parents, of a binary
    one; for a pool its slots, all of them backwards."""

    def zeros(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    def operand(v: Var) -> torch.Tensor:
        sizes = tuple(n if lane in v.lanes else 1 for lane, n in zip(plan.program.lanes, lanes, strict=True))
        tail = {"scalar": (), "key": plan.sizes[:1], "value": plan.sizes[1:]}[v.kind]
        return zeros((*sizes, *((tokens,) if plan.several else ()), *tail), plan.compute)

    sequences = plan.sequences(lanes)
    cursor = zeros((4, sequences), torch.int32)
    cursor[1] = plan.flush
    shadow = []
    if plan.read_dtype is not None:
        shadow = [zeros(state_shape(plan, lanes), plan.read_dtype), zeros(plan.scale_shape(lanes), torch.float32)]
    logged = zip(plan.program.logged, plan.row_dtypes, strict=True)
    return (
        zeros(state_shape(plan, lanes), plan.state_dtype),
        cursor,
        zeros((sequences, plan.tickets(lanes)), torch.int32),
        [*(zeros(plan.row_shape(v, lanes), dtype) for v, dtype in logged), *shadow],
        [operand(v) for v in plan.program.inputs],
        *([(torch.arange(1, tokens + 1, device=device) // 2 - 1)[None].int()] if plan.variant == "tree" else []),
        *([torch.arange(sequences, device=device).flip(0)] if plan.slots else []),
    )


def state_shape(plan: Plan, lanes: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a state tensor whose lanes have these sizes."""
    sizes = dict(zip(plan.layout.order, (*lanes, *plan.sizes), strict=True))
    shape, part = [], 0
    for parts in plan.layout.dims:
        total = 1
        for _ in parts:
            total, part = total * sizes[part], part + 1
        shape.append(total)
    return tuple(shape)


def typical_lanes(plan: Plan, total: int) -> tuple[int, ...]:
    """Sizes of the lanes that multiply to about `total`: those the layout knows, and the rest on the first free one."""
    sizes = [n for parts in plan.layout.dims for n in parts]
    lanes = [sizes[part] for part in plan.layout.order[: plan.layout.lanes]]
    known = 1
    for n in lanes:
        known *= n or 1
    free = next((i for i, n in enumerate(lanes) if n is None), None)
    return tuple(max(1, total // known) if i == free else n or 1 for i, n in enumerate(lanes))
