"""Runs a step op of any target beside the definition, and compares everything that the convention of plan.py fixes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kvbuffer_compile.ir.memory import Buffered, Dense
from kvbuffer_compile.ir.plan import Layout, Plan
from kvbuffer_compile.ir.program import Decay, Program, run
from kvbuffer_compile.ir.shadow import scale_kind, shadow_of
from tests.support.oracle import Oracle

LANES = {"b": 3, "h": 2, "g": 2}
EXACT_LIMIT = 2**22  # integers beyond are not safe in float32 sums
FLOAT_LIMIT = 1e4  # random feedback may grow without end, and float16 ends at 65504


def layout(program: Program, inner: str = "value", merged: bool = False) -> Layout:
    """[b, h, ..., K, V] or [..., V, K]; merged: the last lane shares a dim with the key, [b, h K, V]."""
    count = len(program.lanes)
    sizes: list[tuple[int | None, ...]] = [(None,) if n == 0 else (LANES[x],) for n, x in enumerate(program.lanes)]
    if merged and count > 1 and inner == "value":
        dims = (*sizes[:-1], (LANES[program.lanes[-1]], None), (None,))
    else:
        dims = (*sizes, (None,), (None,))
    order = tuple(range(count + 2))
    return Layout(dims, order if inner == "value" else (*order[:-2], order[-1], order[-2]))


def make_plan(
    program: Program,
    variant: str = "buffered",
    sizes: tuple[int, int] = (5, 19),
    flush: int = 4,
    capacity: int | None = None,
    state: torch.dtype = torch.float32,
    rows: torch.dtype | None = None,
    inner: str = "value",
    merged: bool = False,
    read: torch.dtype | None = None,
) -> Plan:
    """A plan for the C++ target; rows in the state's dtype unless given."""
    compute = torch.float64 if state == torch.float64 else torch.float32
    row_dtypes = (rows or state,) * len(program.logged)
    where = layout(program, inner, merged)
    slots = capacity or flush
    return Plan(program, where, variant, sizes, flush, slots, state, row_dtypes, compute, "cpp", read_dtype=read)  # type: ignore[arg-type]


@dataclass
class Session:
    """A state stepped by `op` beside Dense runs. exact: integers, compared for equality; else the oracle judges.

    limits: cursor[1] at the start, one a sequence. padded: sequences with cursor -1. strided: no tensor is contiguous.
    bare: the state starts as nothing, cursor[3] = 1, and its memory holds NaN.
    """

    plan: Plan
    op: Callable[..., Any]
    exact: bool = True
    operands: torch.dtype = torch.float32
    limits: tuple[int, ...] = ()
    padded: tuple[int, ...] = ()
    strided: bool = False
    bare: bool = False
    steps: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        plan = self.plan
        self.oracle = Oracle()
        self.generator = torch.Generator().manual_seed(0)
        self.lanes = tuple(LANES[x] for x in plan.program.lanes)
        start = self.random((*self.lanes, *plan.sizes)) * (0 if self.bare else 1)
        self.state = self.physical(start.to(plan.state_dtype))
        start = plan.layout.canonical(self.state).to(torch.float64, copy=True)
        self.dense = Dense(start)
        stored = (
            plan.state_dtype,
            *plan.row_dtypes,
            *([plan.read_dtype] if plan.read_dtype and not self.exact else []),
        )
        self.working = min((*stored, self.operands), key=lambda d: d.itemsize)
        self.eager = Dense(start.to(self.working))
        count = plan.sequences(self.lanes)
        self.cursor = self.spread(torch.zeros(4, count, dtype=torch.int32))
        self.cursor[1] = torch.tensor((self.limits or (plan.flush,) * count)[:count])
        self.cursor[0, list(self.padded)] = -1
        self.cursor[3] = int(self.bare)
        if self.bare:
            self.state.fill_(float("nan"))
        shapes = [plan.row_shape(v, self.lanes) for v in plan.program.logged]
        self.rows = [
            self.spread(torch.full(s, float("nan"), dtype=d)) for s, d in zip(shapes, plan.row_dtypes, strict=True)
        ]
        self.shadow: list[Tensor] = []
        if plan.read_dtype is not None:
            values = torch.full_like(plan.layout.canonical(self.state), torch.nan, dtype=plan.read_dtype)
            self.shadow = [self.physical(values), torch.zeros(plan.scale_shape(self.lanes))]

    # ------------------------------------------------------------------------------------------ tensors

    def random(self, shape: tuple[int, ...]) -> Tensor:
        if self.exact:
            return (self.integers(-1, 2, shape) * self.integers(0, 2, shape)).double()
        return torch.randn(shape, dtype=torch.float64, generator=self.generator)

    def integers(self, low: int, high: int, shape: tuple[int, ...] = ()) -> Tensor:
        return torch.randint(low, high, shape, generator=self.generator)

    def spread(self, x: Tensor) -> Tensor:
        """The same values, with gaps between all elements if the session is strided."""
        if not self.strided or x.dim() == 0:
            return x.clone()
        room = torch.full([2 * n for n in x.shape], 77, dtype=x.dtype)
        view = room[tuple(slice(None, None, 2) for _ in x.shape)]
        return view.copy_(x)

    def physical(self, canonical: Tensor) -> Tensor:
        """A tensor that the plan's layout sees as `canonical`."""
        order = self.plan.layout.order
        parts = canonical.permute([order.index(n) for n in range(len(order))])
        sizes, at = [], 0
        for dim in self.plan.layout.dims:
            sizes.append(int(torch.tensor(parts.shape[at : at + len(dim)]).prod()))
            at += len(dim)
        return self.spread(parts.reshape(sizes))

    def draw(self) -> dict[str, Tensor]:
        """Operands of one step, rounded to their dtype; NaN for padding sequences."""
        tails = {"scalar": (), "key": self.plan.sizes[:1], "value": self.plan.sizes[1:]}
        decays = {op.factor.name for op in self.plan.program.ops if isinstance(op, Decay)}
        found = {}
        for v in self.plan.program.inputs:
            pairs = zip(self.plan.program.lanes, self.lanes, strict=True)
            shape = tuple(n if name in v.lanes else 1 for name, n in pairs)
            x = self.random((*shape, *tails[v.kind]))
            if not self.exact:
                x = x.sigmoid() if v.name in decays else x / max(1, x.shape[-1] if tails[v.kind] else 1) ** 0.5
            if self.padded and "b" in v.lanes:
                x[list(self.padded)] = float("nan")
            found[v.name] = self.spread(x.to(self.operands))
        return found

    # ----------------------------------------------------------------------------------------- checking

    def step(self) -> bool:
        """One step and all checks. False, and nothing compared, when the numbers have grown too large."""
        tokens = int(self.integers(1, self.plan.capacity + 1)) if self.plan.variant == "verify" else 1
        drafts = [self.draw() for _ in range(tokens)]
        before = self.state.clone(), self.cursor.clone(), [r.clone() for r in self.rows]
        shadow = [x.clone() for x in self.shadow]
        got = self.call(drafts)
        first = self.dense.state, self.eager.state
        exact = [self.advance(self.dense, d) for d in drafts]
        eager = [self.advance(self.eager, d) for d in drafts]
        self.steps += 1
        values = [x for outs in exact for x in outs.values()]
        if max(x.abs().max() for x in values) > (self.exact_limit if self.exact else FLOAT_LIMIT):
            return False
        for t in range(tokens):
            for name, out in got.items():
                now = out.select(len(self.lanes), t) if self.plan.variant == "verify" else out
                self.compare(now, eager[t][name], exact[t][name], name)
        if self.plan.variant == "recurrent":
            self.compare(self.plan.layout.canonical(self.state), self.eager.state, self.dense.state, "state")
        else:
            self.check_memory(tokens, *before)
            self.check_shadow(tokens, before[1], shadow)
        if self.plan.variant == "verify":
            self.roll_back([first[0], *(d["state"] for d in exact)], [first[1], *(d["state"] for d in eager)])
        return True

    @property
    def exact_limit(self) -> float:
        """Integers up to here are exact wherever they are held."""
        return EXACT_LIMIT if self.plan.read_dtype is None else 2 / torch.finfo(self.plan.read_dtype).eps

    def check_shadow(self, tokens: int, cursor: Tensor, before: list[Tensor]) -> None:
        """Made anew by a flush, made where there was none, and else not touched (arguments: before the step)."""
        kind = scale_kind(self.plan.program)
        if not self.shadow or kind is None:
            return
        (values, scale), (old_values, old_scale) = self.shadow, before
        expected = shadow_of(self.plan.layout.canonical(self.state), kind, values.dtype)
        flushed = (cursor[0] >= 0) & ((cursor[0] >= cursor[1]) | (cursor[0] + tokens > self.plan.capacity))
        for b in range(cursor.shape[1]):
            at = (b,) if self.plan.layout.sequence else ()
            lacking = bool((old_scale[at] == 0).any()) and int(cursor[0, b]) >= 0 and not int(cursor[3, b])
            made = bool(flushed[b]) or lacking
            got = self.plan.layout.canonical(values)[at], scale[at]
            want = expected.values[at], expected.scale[at]
            kept = self.plan.layout.canonical(old_values)[at], old_scale[at]
            for new, right in zip(got, want if made else kept, strict=True):
                assert same(new, right), f"the shadow of sequence {b} at step {self.steps}"

    def call(self, drafts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Run the op on one token, or on several stacked behind the lanes."""
        inputs = drafts[0]
        if self.plan.variant == "verify":
            inputs = {n: self.spread(torch.stack([d[n] for d in drafts], dim=len(self.lanes))) for n in drafts[0]}
        side = [] if self.plan.variant == "recurrent" else [self.cursor, *self.rows, *self.shadow]
        got = self.op(self.state, *side, *inputs.values())
        names = [v.name for v in self.plan.program.outputs]
        return dict(zip(names, [got] if len(names) == 1 else got or [], strict=True))

    def roll_back(self, exact: list[Tensor], eager: list[Tensor]) -> None:
        """Take back some of the tokens just run, another number for each sequence (exact, eager: the states before them
        and after each)."""
        if not self.plan.layout.sequence:
            return
        for b in range(self.cursor.shape[1]):
            if self.cursor[0, b] >= 0:
                kept = int(self.integers(0, len(exact)))
                self.cursor[0, b] -= len(exact) - 1 - kept
                self.dense.state[b], self.eager.state[b] = exact[kept][b], eager[kept][b]
        self.compare(self.materialized(), self.eager.state, self.dense.state, "state after rolling back")

    def advance(self, dense: Dense, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Dense's step: its outputs, and the state after it. Padding sequences keep their state and give zero."""
        keep, padded = dense.state, list(self.padded)
        env = run(self.plan.program, dense, {n: x.to(keep.dtype) for n, x in inputs.items()})
        dense.state = dense.state.clone()
        dense.state[padded] = keep[padded]
        outs = {}
        for v in self.plan.program.outputs:
            tail = env[v.name].shape[len(self.lanes) :]
            outs[v.name] = env[v.name].expand(*self.lanes, *tail).clone()
            outs[v.name][padded] = 0
        return {**outs, "state": dense.state.clone()}

    def compare(self, got: Tensor, eager: Tensor, exact: Tensor, what: str) -> None:
        if not self.exact:
            self.oracle.check(got, eager, exact, what)
            return
        what = f"{what} at step {self.steps}"
        assert got.shape == exact.shape and not got.isnan().any(), f"{what}: {got}"
        assert torch.equal(got.double(), exact), f"{what}\n{self.plan.program}"

    def check_memory(self, tokens: int, state: Tensor, cursor: Tensor, rows: list[Tensor]) -> None:
        """Cursors, the state that base and rows stand for, and that nothing else was written (arguments: before)."""
        owed, limit = cursor[0], cursor[1]
        flushed = (owed >= 0) & ((owed >= limit) | (owed + tokens > self.plan.capacity))
        expected = cursor.clone()
        expected[0] = torch.where(owed < 0, -1, torch.where(flushed, 0, owed) + tokens)
        expected[1] = torch.where(flushed, self.plan.flush, limit)
        expected[2] += 1
        expected[3] = torch.where(flushed, 0, cursor[3])
        assert torch.equal(self.cursor, expected), f"cursor {self.cursor} at step {self.steps}, not {expected}"
        if self.plan.layout.sequence:
            kept = (~flushed).nonzero().flatten()
            new, old = (self.plan.layout.canonical(x)[kept] for x in (self.state, state))
            assert same(new, old), "the state was written without a flush"
        for new, old in zip(self.rows, rows, strict=True):
            for b in range(cursor.shape[1]):
                end = int(expected[0, b])
                self.check_slots(new[b], old[b], range(end - tokens, end))
        self.compare(self.materialized(), self.eager.state, self.dense.state, "state and rows")

    def check_slots(self, new: Tensor, old: Tensor, slots: range) -> None:
        """Only these slots of a sequence's rows may change."""
        dim = len(self.lanes) - (1 if self.plan.layout.sequence else 0)
        for j in range(self.plan.capacity):
            if j not in slots:
                assert same(new.select(dim, j), old.select(dim, j)), f"slot {j} was written at step {self.steps}"

    def materialized(self) -> Tensor:
        """The dense state by the definition: memory.Buffered with the rows that the cursor says are owed."""
        view = self.plan.layout.canonical(self.state).double()
        if not self.plan.layout.sequence:
            return self.replay(view, [r[0] for r in self.rows], 0)
        return torch.stack([self.replay(view[b], [r[b] for r in self.rows], b) for b in range(view.shape[0])])

    def replay(self, base: Tensor, rows: list[Tensor], b: int) -> Tensor:
        memory = Buffered(Dense(base), self.plan.sizes)
        for slot in range(int(self.cursor[0, b])):
            slots = (r.select(base.dim() - 2, slot).double() for r in rows)
            log = dict(zip(self.plan.program.logged, slots, strict=True))
            for event in self.plan.program.events:
                if isinstance(event, Decay):
                    memory.decay(log[event.factor], event.factor.kind)
                else:
                    memory.update(log[event.left], log[event.right], (event.left.kind, event.right.kind))
        return memory.flushed(torch.zeros_like(base) if self.cursor[3, b] else base)


def same(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit, but for kinds of NaN."""
    return torch.equal(a.nan_to_num(nan=12345.0), b.nan_to_num(nan=12345.0))
