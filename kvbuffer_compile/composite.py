"""The step ops in plain ATen: the definition that generated kernels are held against, right on every device.

Everything is vectorised over sequences with different cursors; the arithmetic of the current token is
`memory.Buffered` on top of the rows that are already stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvbuffer_compile.ir import Decay, Kind, Update, run
from kvbuffer_compile.memory import Buffered, Dense, Zero, along, widen
from kvbuffer_compile.overlap import has_memory
from kvbuffer_compile.plan import Plan


@dataclass(frozen=True)
class Stored:
    """A base with its owed rows in low-rank form: S = diag(fade) base + left^T right.

    base: [*lanes, K, V], or nothing. fades: the product of all owed decays, by kind. left: [*lanes, n, K], right:
    [*lanes, n, V], decayed to now; zero for slots that hold nothing.
    """

    base: Dense | Zero
    fades: dict[Kind, Tensor]
    left: Tensor | None
    right: Tensor | None

    def read(self, x: Tensor, kind: Kind) -> Tensor:
        other: Kind = "value" if kind == "key" else "key"
        faded = x
        if "scalar" in self.fades:
            faded = faded * self.fades["scalar"][..., None]
        if kind in self.fades:
            faded = faded * self.fades[kind]
        out = self.base.read(faded, kind)
        if other in self.fades:
            out = out * self.fades[other]
        if self.left is None or self.right is None:
            return out
        met, free = (self.left, self.right) if kind == "key" else (self.right, self.left)
        return out + ((x[..., None, :] @ met.transpose(-1, -2)) @ free)[..., 0, :]

    def dense(self) -> Tensor:
        """The state these rows and this base stand for."""
        assert isinstance(self.base, Dense), "a state without memory cannot be made"
        out = self.base.state
        for kind, fade in self.fades.items():
            out = out * along(fade, kind)
        if self.left is None or self.right is None:
            return out
        return out + self.left.transpose(-1, -2) @ self.right


def owed_slots(plan: Plan, owed: Tensor) -> Tensor:
    """Which slots hold owed rows, [N, capacity]. owed: [N]."""
    return torch.arange(plan.capacity, device=owed.device) < owed[:, None]


def condense(plan: Plan, base: Dense | Zero, used: Tensor, rows: Sequence[Tensor]) -> Stored:
    """The rows in low-rank form.

    base: [N, *lanes, K, V]; used: which slots count, [N, capacity]; rows as in the calling convention.
    """
    lanes = len(plan.program.lanes) + (not plan.layout.sequence)
    used = used.view(-1, *[1] * (lanes - 1), plan.capacity)
    log = {
        v.name: (row.to(plan.compute), v.kind) for v, row in zip(plan.program.logged, rows, strict=True)
    }  # garbage in unused slots is masked where it is used: an unused gate is 1, an unused row is 0

    after: dict[Kind, Tensor] = {}  # within a slot: product of the decays behind the event at hand
    pairs: list[tuple[Tensor, Tensor]] = []
    for event in reversed(plan.program.events):
        if isinstance(event, Decay):
            value, kind = log[event.factor.name]
            gate = torch.where(_mask(used, kind), value, 1)
            after[kind] = gate * after[kind] if kind in after else gate
        else:
            pairs.append(_decayed(event, log, used, after, plan.sizes))
    fades: dict[Kind, Tensor] = {}
    if after:
        later, fades = _over_slots(after)
        pairs = [(_shrink(left, later, "key"), _shrink(right, later, "value")) for left, right in pairs]
    if not pairs:
        return Stored(base, fades, None, None)
    left, right = (torch.cat(_common(side), dim=-2) for side in zip(*pairs, strict=True))
    return Stored(base, fades, left, right)


def _mask(used: Tensor, kind: Kind) -> Tensor:
    return used if kind == "scalar" else used[..., None]


def _decayed(
    event: Update,
    log: dict[str, tuple[Tensor, Kind]],
    used: Tensor,
    after: dict[Kind, Tensor],
    sizes: tuple[int, int],
) -> tuple[Tensor, Tensor]:
    """One update's rows in all slots, decayed by what follows within the slot."""
    (left, left_kind), (right, right_kind) = log[event.left.name], log[event.right.name]
    left = torch.where(used[..., None], widen(left, left_kind, sizes[0]), 0)
    right = torch.where(used[..., None], widen(right, right_kind, sizes[1]), 0)
    return _shrink(left, after, "key"), _shrink(right, after, "value")


def _shrink(rows: Tensor, gates: dict[Kind, Tensor], kind: Kind) -> Tensor:
    """Rows times the gates of their own axis; scalar gates go with the value side."""
    if kind == "value" and "scalar" in gates:
        rows = rows * gates["scalar"][..., None]
    return rows * gates[kind] if kind in gates else rows


def _over_slots(gates: dict[Kind, Tensor]) -> tuple[dict[Kind, Tensor], dict[Kind, Tensor]]:
    """For each slot the product of the gates of all later slots; and the product over all slots."""
    later, total = {}, {}
    for kind, gate in gates.items():
        dim = gate.dim() - (1 if kind == "scalar" else 2)
        running = gate.flip(dim).cumprod(dim).flip(dim)
        total[kind] = running.select(dim, 0)
        ones = torch.ones_like(running.narrow(dim, 0, 1))
        later[kind] = torch.cat([running.narrow(dim, 1, running.shape[dim] - 1), ones], dim)
    return later, total


def _common(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The same rows with common lane sizes (a key shared by a group has size 1 there)."""
    lanes = torch.broadcast_shapes(*(t.shape[:-2] for t in tensors))
    return [t.expand(*lanes, *t.shape[-2:]) for t in tensors]


# ------------------------------------------------------------------------------------------------ steps


def recurrent_step(plan: Plan, state: Tensor, operands: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """One plain step: the state is read and written."""
    view = plan.layout.canonical(state)
    memory = Dense(view.to(plan.compute))
    env = run(plan.program, memory, _inputs(plan, operands))
    view.copy_(memory.state)
    return tuple(_full(env[v.name], v.kind, tuple(view.shape)) for v in plan.program.outputs)


def buffered_step(
    plan: Plan, state: Tensor, cursor: Tensor, rows: Sequence[Tensor], operands: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """One buffered step of one token, or of T tokens for the verify variant, as defined in plan.py."""
    tokens = inputs_by_token(plan, operands)
    owed = cursor[0]
    if has_memory(state):  # else its owner knows that nothing overflows
        flush(plan, state, cursor, rows, overflowing(plan, cursor, len(tokens)))
    spread = () if plan.layout.sequence else (None,)  # lane of size 1 for the one cursor
    base = readable(plan, state, cursor)
    memory = Buffered(condense(plan, base, owed_slots(plan, owed), rows), plan.sizes)
    runs = [run(plan.program, memory, {n: x[spread] for n, x in inputs.items()}) for inputs in tokens]

    active = owed >= 0
    for v, row in zip(plan.program.logged, rows, strict=True):
        for t, env in enumerate(runs):
            store(row, env[v.name], owed + t, active, v.kind)
    cursor[0] += len(tokens) * active
    cursor[2] += 1
    shape = plan.layout.sizes(state.shape)
    return tuple(stacked(plan, [env[v.name] for env in runs], v.kind, shape, active) for v in plan.program.outputs)


def overflowing(plan: Plan, cursor: Tensor, tokens: int) -> Tensor:
    """Which sequences must flush before so many tokens."""
    owed, limit = cursor[0], cursor[1]
    return (owed >= 0) & ((owed >= limit) | (owed + tokens > plan.capacity))


def flush(plan: Plan, state: Tensor, cursor: Tensor, rows: Sequence[Tensor], which: Tensor) -> None:
    """Fold the rows of the sequences in `which` (bool [N]) into the state; their cursors become 0, their limits L.

    On a CPU nothing happens when `which` is empty; elsewhere asking would stall the queue, so it is computed anyway.
    """
    if which.device.type == "cpu" and not bool(which.any()):
        return
    view = plan.layout.canonical(state)
    base = view if plan.layout.sequence else view[None]
    used = owed_slots(plan, cursor[0])
    dense = condense(plan, readable(plan, state, cursor), used, rows).dense()
    base.copy_(torch.where(which.view(-1, *[1] * (base.dim() - 1)), dense.to(base.dtype), base))
    cursor[0].masked_fill_(which, 0)
    cursor[1].masked_fill_(which, plan.flush)
    cursor[3].masked_fill_(which, 0)


def readable(plan: Plan, state: Tensor, cursor: Tensor) -> Dense | Zero:
    """The state as it may be read, [N, *lanes, K, V]: zero for sequences that have none yet, whatever memory holds."""
    if not has_memory(state):
        return Zero(plan.sizes)
    view = plan.layout.canonical(state)
    base = (view if plan.layout.sequence else view[None]).to(plan.compute)
    if cursor.device.type == "cpu" and not bool(cursor[3].any()):
        return Dense(base)
    return Dense(torch.where((cursor[3] > 0).view(-1, *[1] * (base.dim() - 1)), 0, base))


def inputs_by_token(plan: Plan, operands: Sequence[Tensor]) -> list[dict[str, Tensor]]:
    """The program's inputs, token by token."""
    inputs = _inputs(plan, operands)
    if not plan.several:
        return [inputs]
    axis = plan.layout.lanes
    return [
        {n: x.select(axis, t if x.shape[axis] > 1 else 0) for n, x in inputs.items()}
        for t in range(token_count(plan, operands))
    ]


def token_count(plan: Plan, operands: Sequence[Tensor]) -> int:
    """How many tokens a step with these operands decodes."""
    return max(x.shape[plan.layout.lanes] for x in operands) if plan.several else 1


def _inputs(plan: Plan, operands: Sequence[Tensor]) -> dict[str, Tensor]:
    return {v.name: x.to(plan.compute) for v, x in zip(plan.program.inputs, operands, strict=True)}


def by_slot(row: Tensor, kind: Kind) -> Tensor:
    """Rows as a view [N, capacity, *lanes(, K or V)]."""
    return row.movedim(row.dim() - (1 if kind == "scalar" else 2), 1)


def store(row: Tensor, value: Tensor, owed: Tensor, active: Tensor, kind: Kind) -> None:
    """row[b, ..., owed[b], ...] = value[b, ...] for active sequences."""
    slots = by_slot(row, kind)
    b = torch.arange(row.shape[0], device=row.device)
    at = owed.clamp(0, slots.shape[1] - 1).long()
    keep = active.view(-1, *[1] * (slots.dim() - 2))
    old = slots[b, at]
    slots[b, at] = torch.where(keep, value.to(row.dtype).expand_as(old), old)


def _full(value: Tensor, kind: Kind, shape: tuple[int, ...]) -> Tensor:
    """An output at full lane sizes, contiguous. shape: [*lanes, K, V]."""
    tail = {"scalar": (), "key": shape[-2:-1], "value": shape[-1:]}[kind]
    return value.expand(*shape[:-2], *tail).contiguous()


def stacked(plan: Plan, values: list[Tensor], kind: Kind, shape: tuple[int, ...], active: Tensor) -> Tensor:
    """One output of all tokens."""
    done = [_finished(plan, value, kind, shape, active) for value in values]
    return torch.stack(done, dim=plan.layout.lanes) if plan.several else done[0]


def _finished(plan: Plan, value: Tensor, kind: Kind, shape: tuple[int, ...], active: Tensor) -> Tensor:
    """An output with zeros for padding sequences."""
    if plan.layout.sequence:
        value = torch.where(active.view(-1, *[1] * (value.dim() - 1)), value, 0)
    else:
        value = torch.where(active[0], value[0], 0)
    return _full(value, kind, shape)
