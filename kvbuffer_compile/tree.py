"""The tree step in plain ATen: drafts that branch, each seeing the state, the owed rows and its own ancestors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvbuffer_compile import composite
from kvbuffer_compile.ir import run
from kvbuffer_compile.memory import Buffered
from kvbuffer_compile.overlap import has_memory
from kvbuffer_compile.plan import Plan


def tree_step(
    plan: Plan, state: Tensor, cursor: Tensor, rows: Sequence[Tensor], parents: Tensor, operands: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """One tree step as defined in plan.py. Node by node: parents come first, so their rows are there to be read."""
    tokens = composite.inputs_by_token(plan, operands)
    if len(tokens) > plan.capacity or parents.shape[1] != len(tokens):
        raise ValueError(f"{len(tokens)} drafts, {parents.shape[1]} parents, a buffer of {plan.capacity} rows")
    if has_memory(state):
        composite.flush(plan, state, cursor, rows, composite.overflowing(plan, cursor, len(tokens)))
    spread = () if plan.layout.sequence else (None,)
    base = composite.readable(plan, state, cursor)
    owed = cursor[0]
    active = owed >= 0
    outputs = []
    for j, used in enumerate(_visible(plan, owed, parents.expand(len(owed), -1))):
        memory = Buffered(composite.condense(plan, base, used, rows), plan.sizes)
        env = run(plan.program, memory, {name: x[spread] for name, x in tokens[j].items()})
        for v, row in zip(plan.program.logged, rows, strict=True):
            composite.store(row, env[v.name], owed + j, active, v.kind)
        outputs.append([env[v.name] for v in plan.program.outputs])
    cursor[2] += 1
    shape = plan.layout.sizes(state.shape)
    by_output = zip(plan.program.outputs, zip(*outputs, strict=True), strict=True)
    return tuple(composite.stacked(plan, list(values), v.kind, shape, active) for v, values in by_output)


def _visible(plan: Plan, owed: Tensor, parents: Tensor) -> list[Tensor]:
    """For each node the slots it sees, [N, capacity]."""
    node = torch.arange(plan.capacity, device=owed.device) - owed[:, None]  # that lies in a slot; < 0: an owed row
    count = parents.shape[1]
    inside, at = (node >= 0) & (node < count), node.clamp(0, count - 1)
    return [(node < 0) | (inside & above.gather(1, at)) for above in ancestors(parents).unbind(1)]


def ancestors(parents: Tensor) -> Tensor:
    """Whether node i is above node j, at [:, j, i]. parents: [N, T]."""
    n, count = parents.shape
    each, itself = torch.arange(n, device=parents.device), torch.eye(count, dtype=torch.bool, device=parents.device)
    found = torch.zeros(n, count, count, dtype=torch.bool, device=parents.device)
    for j in range(1, count):
        parent = parents[:, j].clamp(min=0).long()
        found[:, j] = (found[each, parent] | itself[parent]) & (parents[:, j] >= 0)[:, None]
    return found
