"""The step ops in plain ATen: the definition that generated kernels are held against, right on every device.

Everything is vectorised over sequences with different cursors. What is stored is put in low-rank form, and the tokens
of the step run on that (read_ahead.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from kvbuffer_compile.guard.overlap import has_memory
from kvbuffer_compile.ir.memory import Dense, Zero, along, widen
from kvbuffer_compile.ir.plan import Plan
from kvbuffer_compile.ir.program import Decay, Kind, Update, Var, run
from kvbuffer_compile.process.at_once import at_once
from kvbuffer_compile.process.surroundings import product
from kvbuffer_compile.steps.read_ahead import OTHER, common_lanes, run_ahead, run_at_once
from kvbuffer_compile.steps.shadows import by_sequence, in_place_of, renewed, shadow_in


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
        return self.read_many(x[..., None, :], kind)[..., 0, :]

    def read_many(self, x: Tensor, kind: Kind) -> Tensor:
        """Reads by n queries, [*lanes, n, K or V]."""
        other, faded = OTHER[kind], x
        if "scalar" in self.fades:
            faded = faded * self.fades["scalar"][..., None, None]
        if kind in self.fades:
            faded = faded * self.fades[kind][..., None, :]
        out = self.base.read_many(faded, kind)
        if other in self.fades:
            out = out * self.fades[other][..., None, :]
        if self.left is None or self.right is None:
            return out
        met, free = (self.left, self.right) if kind == "key" else (self.right, self.left)
        return out + product(product(x, met.transpose(-1, -2)), free)

    def dense(self) -> Tensor:
        """The state these rows and this base stand for."""
        assert isinstance(self.base, Dense), "a state without memory cannot be made"
        out = self.base.state
        for kind, fade in self.fades.items():
            out = out * along(fade, kind)
        if self.left is None or self.right is None:
            return out
        return out + product(self.left.transpose(-1, -2), self.right)


def slots_in_use(plan: Plan, owed: Tensor, more: int = 0) -> Tensor:
    """Numbers of the slots that may hold rows, `more` of them not owed. On a GPU all: asking would stall the queue."""
    most = (
        min(plan.capacity, max(1, int(owed.max()) + more)) if owed.device.type == "cpu" and len(owed) else plan.capacity
    )
    return torch.arange(most, device=owed.device)


def owed_slots(plan: Plan, owed: Tensor) -> Tensor:
    """Which slots hold owed rows, [N, slots]. owed: [N]."""
    return slots_in_use(plan, owed) < owed[:, None]


def condense(plan: Plan, base: Dense | Zero, used: Tensor, rows: Sequence[Tensor]) -> Stored:
    """The rows in low-rank form.

    base: [N, *lanes, K, V]; used: which of the first slots count, [N, slots]; rows as in the calling convention.
    """
    slots = used.shape[1]
    used = used.view(-1, *[1] * (token_dim(plan) - 1), slots)
    log = {
        v.name: (row.narrow(slot_dim(row, v.kind), 0, slots).to(plan.compute), v.kind)
        for v, row in zip(plan.program.logged, rows, strict=True)
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
    left, right = (torch.cat(common_lanes(side), dim=-2) for side in zip(*pairs, strict=True))
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


# ------------------------------------------------------------------------------------------------ steps


def recurrent_step(plan: Plan, state: Tensor, operands: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """One plain step: the state is read, and written at the end."""
    view = plan.layout.canonical(state)
    memory = Dense(view.to(plan.compute))
    env = run(plan.program, memory, _inputs(plan, operands))
    outputs = tuple(_full(env[v.name], v.kind, tuple(view.shape)) for v in plan.program.outputs)
    view.copy_(memory.state)
    return outputs


def buffered_step(
    plan: Plan, state: Tensor, cursor: Tensor, rows: Sequence[Tensor], operands: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """One buffered step of one token, or of T tokens for the verify and block variants, as defined in plan.py.

    rows: and the shadow, where the plan has one. Rows go to free slots, where they are nobody's; the last thing that
    happens is that the cursor counts them.
    """
    count = token_count(plan, operands)
    owed = cursor[0]
    base, rows = flushed_base(plan, state, cursor, rows, count), plan.parted(rows)[0]
    shape = plan.layout.sizes(state.shape)
    stored = condense(plan, base, owed_slots(plan, owed), rows)
    values = run_tokens(plan, stored, inputs_of_tokens(plan, operands), shape)
    active = owed >= 0
    for v, row in zip(plan.program.logged, rows, strict=True):
        store(row, values[v], owed, active, v.kind)
    outputs = tuple(finished(plan, values[v], v.kind, shape, active) for v in plan.program.outputs)
    appended = active.to(cursor.dtype) * count
    cursor[::2].add_(torch.stack([appended, torch.ones_like(appended)]))  # tokens owed and steps, in one write
    return outputs


def token_dim(plan: Plan) -> int:
    """Where the tokens are in values of several: behind the lanes, of which one of size 1 stands for one cursor."""
    return len(plan.program.lanes) + (not plan.layout.sequence)


def inputs_of_tokens(plan: Plan, operands: Sequence[Tensor]) -> dict[str, Tensor]:
    """The program's inputs, [N, *lanes, T(, K or V)]."""
    lanes = plan.layout.lanes
    inputs = {n: x if plan.several else x.unsqueeze(lanes) for n, x in _inputs(plan, operands).items()}
    return inputs if plan.layout.sequence else {n: x[None] for n, x in inputs.items()}


def run_tokens(plan: Plan, stored: Stored, inputs: dict[str, Tensor], shape: tuple[int, ...]) -> dict[Var, Tensor]:
    """Outputs and logged values of some tokens, a dim like in the inputs, on a stored state. shape: [*lanes, K, V]."""
    axis, wanted = token_dim(plan), (*plan.program.outputs, *plan.program.logged)
    if plan.variant == "block":
        return run_at_once(plan.program, stored, inputs, axis, wanted)
    count = max(x.shape[axis] for x in inputs.values())
    rows = count * sum(isinstance(event, Update) for event in plan.program.events)
    lanes = (1, *shape[:-2])[plan.layout.sequence :]
    left, right = (next(iter(inputs.values())).new_zeros(*lanes, rows, n) for n in plan.sizes)
    return run_ahead(plan.program, stored, (left, right), inputs, axis, wanted)


def overflowing(plan: Plan, cursor: Tensor, tokens: int) -> Tensor:
    """Which sequences must flush before so many tokens."""
    owed, limit = cursor[0], cursor[1]
    return (owed >= 0) & ((owed >= limit) | (owed + tokens > plan.capacity))


def flushed_base(plan: Plan, state: Tensor, cursor: Tensor, rows: Sequence[Tensor], tokens: int) -> Dense | Zero:
    """What a step of so many tokens reads, [N, *lanes, K, V], once the sequences that must be are flushed."""
    if not has_memory(state):  # its owner knows that nothing overflows
        return Zero(plan.sizes)
    which = overflowing(plan, cursor, tokens)
    flush(plan, state, cursor, rows, which)
    base, shadow = readable(plan, state, cursor), shadow_in(plan, plan.parted(rows)[1])
    return base if shadow is None or isinstance(base, Zero) else Dense(in_place_of(base.state, shadow, cursor, which))


def flush(plan: Plan, state: Tensor, cursor: Tensor, rows: Sequence[Tensor], which: Tensor) -> None:
    """Fold the rows of the sequences in `which` (bool [N]) into the state; their cursors become 0, their limits L.

    rows: and the shadow, if it is to be made anew. On a CPU nothing happens for none; elsewhere asking would stall.
    """
    if which.device.type == "cpu" and not bool(which.any()):
        return
    view = plan.layout.canonical(state)
    base = view if plan.layout.sequence else view[None]
    used, (rows, sides) = owed_slots(plan, cursor[0]), plan.parted(rows)
    dense = condense(plan, readable(plan, state, cursor), used, rows).dense()
    folded = torch.where(by_sequence(which, base), dense.to(base.dtype), base)
    next_cursor = cursor.clone()
    next_cursor[0].masked_fill_(which, 0)
    next_cursor[1].masked_fill_(which, plan.flush)
    next_cursor[3].masked_fill_(which, 0)
    renewal = renewed(shadow_in(plan, sides), folded, which)
    at_once(partial(base.copy_, folded), *renewal, partial(cursor.copy_, next_cursor))


def readable(plan: Plan, state: Tensor, cursor: Tensor) -> Dense | Zero:
    """The state as it may be read, [N, *lanes, K, V]: zero for sequences that have none yet, whatever memory holds."""
    if not has_memory(state):
        return Zero(plan.sizes)
    view = plan.layout.canonical(state)
    base = (view if plan.layout.sequence else view[None]).to(plan.compute)
    if cursor.device.type == "cpu" and not bool(cursor[3].any()):
        return Dense(base)
    return Dense(torch.where(by_sequence(cursor[3] > 0, base), 0, base))


def token_count(plan: Plan, operands: Sequence[Tensor]) -> int:
    """How many tokens a step with these operands decodes."""
    return max(x.shape[plan.layout.lanes] for x in operands) if plan.several else 1


def _inputs(plan: Plan, operands: Sequence[Tensor]) -> dict[str, Tensor]:
    return {v.name: x.to(plan.compute) for v, x in zip(plan.program.inputs, operands, strict=True)}


def slot_dim(row: Tensor, kind: Kind) -> int:
    """The dim of the slots."""
    return row.dim() - (1 if kind == "scalar" else 2)


def by_slot(row: Tensor, kind: Kind) -> Tensor:
    """Rows as a view [N, capacity, *lanes(, K or V)]."""
    return row.movedim(slot_dim(row, kind), 1)


def store(row: Tensor, values: Tensor, first: Tensor, active: Tensor, kind: Kind) -> None:
    """row[b, ..., first[b] + t, ...] = values[b, ..., t, ...] for active sequences and all tokens."""
    slots, values = by_slot(row, kind), by_slot(values, kind)
    b = torch.arange(row.shape[0], device=row.device)[:, None]
    tokens = torch.arange(values.shape[1], device=row.device)
    at = (first[:, None] + tokens).clamp(0, slots.shape[1] - 1)
    keep = active.view(-1, *[1] * (slots.dim() - 1))
    old = slots[b, at]
    slots[b, at] = torch.where(keep, values.to(row.dtype).expand_as(old), old)


def finished(plan: Plan, value: Tensor, kind: Kind, shape: tuple[int, ...], active: Tensor) -> Tensor:
    """An output of all tokens, contiguous, with zeros for padding sequences. shape: [*lanes, K, V]."""
    if plan.layout.sequence:
        value = torch.where(active.view(-1, *[1] * (value.dim() - 1)), value, 0)
    else:
        value = torch.where(active[0], value[0], 0)
    lanes = plan.layout.lanes
    if not plan.several:
        return _full(value.select(lanes, 0), kind, shape)
    return _full(value, kind, shape, value.shape[lanes])


def _full(value: Tensor, kind: Kind, shape: tuple[int, ...], *tokens: int) -> Tensor:
    tail = {"scalar": (), "key": shape[-2:-1], "value": shape[-1:]}[kind]
    return value.expand(*shape[:-2], *tokens, *tail).contiguous()
