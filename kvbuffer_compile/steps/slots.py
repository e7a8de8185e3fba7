"""Steps on some slots of a pool, in plain ATen: their rows are taken out, stepped as a batch, and put back.

Indices are those of `pool[slots]`: int32 or int64, negative ones count from the end, and one beyond either end is an
error before anything is written. Of equal indices each reads the same old state, and the last one's is stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from kvbuffer_compile.ir.plan import Plan
from kvbuffer_compile.process.at_once import at_once
from kvbuffer_compile.steps import composite


def recurrent_step(plan: Plan, state: Tensor, slots: Tensor, operands: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """composite.recurrent_step on the rows of `state` at `slots`."""
    index, last = _index(slots, state.shape[0])
    rows = state.index_select(0, index)
    outputs = composite.recurrent_step(plan, rows, operands)
    state.index_copy_(0, index, rows.index_select(0, last))
    return outputs


def buffered_step(
    plan: Plan, state: Tensor, cursor: Tensor, rows: Sequence[Tensor], slots: Tensor, operands: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """composite.buffered_step on the sequences at `slots`: their states, cursors and owed rows."""
    index, last = _index(slots, state.shape[0])
    mine, marks = state.index_select(0, index), cursor.index_select(1, index)
    log = [row.index_select(0, index) for row in rows]
    unflushed = marks[0] + composite.token_count(plan, operands)
    outputs = composite.buffered_step(plan, mine, marks, log, operands)
    changed = list(zip(rows, log, strict=True))
    if marks.device.type != "cpu" or not torch.equal(marks[0], unflushed):  # elsewhere asking would stall the queue
        changed.append((state, mine))
    writes = [partial(pool.index_copy_, 0, index, stepped.index_select(0, last)) for pool, stepped in changed]
    # a flush has made room in slots that still held owed rows: all is put back, or nothing
    at_once(*writes, partial(cursor.index_copy_, 1, index, marks.index_select(1, last)))
    return outputs


def _index(slots: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The positions of the slots in the pool, and for each entry the last one of the same slot."""
    slots = slots.long()
    index = torch.where(slots < 0, slots + count, slots)
    order = torch.arange(index.shape[0], device=index.device)
    last = torch.where(index[:, None] == index, order, 0).amax(1) if index.numel() else order
    return index, last
