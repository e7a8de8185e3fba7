"""The tree step in plain ATen: drafts that branch, each seeing the state, the owed rows and its own ancestors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvbuffer_compile.ir.plan import Plan
from kvbuffer_compile.steps import composite


def tree_step(
    plan: Plan, state: Tensor, cursor: Tensor, rows: Sequence[Tensor], parents: Tensor, operands: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """One tree step as defined in plan.py. Node by node: parents come first, so their rows are there to be read."""
    count = composite.token_count(plan, operands)
    if count > plan.capacity or parents.shape[1] != count:
        raise ValueError(f"{count} drafts, {parents.shape[1]} parents, a buffer of {plan.capacity} rows")
    base, rows = composite.flushed_base(plan, state, cursor, rows, count), plan.parted(rows)[0]
    shape = plan.layout.sizes(state.shape)
    inputs, axis = composite.inputs_of_tokens(plan, operands), composite.token_dim(plan)
    owed = cursor[0]
    active = owed >= 0
    nodes = []
    for j, used in enumerate(_visible(plan, owed, parents.expand(len(owed), -1))):
        node = {n: x.narrow(axis, j if x.shape[axis] > 1 else 0, 1) for n, x in inputs.items()}
        values = composite.run_tokens(plan, composite.condense(plan, base, used, rows), node, shape)
        for v, row in zip(plan.program.logged, rows, strict=True):
            composite.store(row, values[v], owed + j, active, v.kind)
        nodes.append(values)
    together = {v: torch.cat([values[v] for values in nodes], axis) for v in plan.program.outputs}
    outputs = tuple(composite.finished(plan, x, v.kind, shape, active) for v, x in together.items())
    cursor[2].add_(1)
    return outputs


def _visible(plan: Plan, owed: Tensor, parents: Tensor) -> list[Tensor]:
    """For each node the slots it sees, [N, slots]."""
    count = parents.shape[1]
    node = composite.slots_in_use(plan, owed, count) - owed[:, None]  # that lies in a slot; < 0: an owed row
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
