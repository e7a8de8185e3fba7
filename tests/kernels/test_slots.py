"""Step ops on slots of a pool, composite and generated: what the convention of plan.py says, in any strides."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kvbuffer_compile.codegen import build
from kvbuffer_compile.ir.plan import Plan
from kvbuffer_compile.steps import ops
from tests.support.daily import row
from tests.support.programs import NAMED
from tests.support.sessions import LANES, Session, make_plan

SLOTS = 7
KERNELS = ["triton", *(["cpp"] if build.compiler() else [])]
TARGETS = ["aten", *KERNELS]


class Embedded:
    """A step op on slots as one on a batch: the batch is put anywhere in a pool of garbage, which must not change.

    Some entries of the slots are negative; the integers are of 32 and of 64 bits.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = replace(plan, slots=True)
        self.op = ops.step_op(self.plan)
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, state: Tensor, *rest: Tensor) -> Any:
        count = 0 if self.plan.variant == "recurrent" else 1 + len(self.plan.program.logged)
        written, dims = [state, *rest[:count]], [0, *([1] if count else []), *([0] * (count - 1))]
        chosen = torch.randperm(SLOTS, generator=self.generator)[: state.shape[0]]
        pools = [self._pool(x, dim, chosen) for x, dim in zip(written, dims, strict=True)]
        pools[1:2] = [with_tickets(self.plan, pool) for pool in pools[1:2]]
        before = [pool.clone() for pool in pools]
        signs = torch.randint(0, 2, chosen.shape, generator=self.generator)
        dtype = (torch.int64, torch.int32)[int(signs[0])]
        tickets = [ops.tickets_of(cursor) for cursor in pools[1:2] if self.plan.target == "triton"]
        out = self.op(*pools, (chosen - SLOTS * signs).to(dtype), *rest[count:])
        assert not any(t.any() for t in tickets), "a ticket was left"
        others = torch.tensor([i for i in range(SLOTS) if i not in chosen.tolist()])
        for x, pool, old, dim in zip(written, pools, before, dims, strict=True):
            x.copy_(pool.index_select(dim, chosen))
            new, was = (t.index_select(dim, others).nan_to_num(nan=1234) for t in (pool, old))
            assert torch.equal(new, was), "another slot was written"
        return out

    def _pool(self, x: Tensor, dim: int, chosen: Tensor) -> Tensor:
        sizes = list(x.shape)
        sizes[dim] = SLOTS
        gaps = 1 if x.is_contiguous() else 2
        room = torch.full([gaps * n for n in sizes], float("nan") if x.dtype.is_floating_point else 99, dtype=x.dtype)
        return room[tuple(slice(None, None, gaps) for _ in sizes)].index_copy_(dim, chosen, x)


def with_tickets(plan: Plan, cursor: Tensor) -> Tensor:
    """The same cursor; for Triton with tickets behind it, as the runtime makes it."""
    if plan.target != "triton":
        return cursor
    lanes = (cursor.shape[1], *(LANES[x] for x in plan.program.lanes[1:]))
    return ops.new_cursor(plan, lanes, cursor.device).copy_(cursor)


def built(plan: Plan, target: str) -> Callable[..., Any]:
    embedded = Embedded(replace(plan, target=target))
    implement(embedded.plan)
    return embedded


def implement(plan: Plan) -> None:
    """Have the plan's op done by its kernel; Triton's is interpreted."""
    ops.step_op(plan)
    if plan.target == "aten":
        return
    build.load(plan) if plan.target == "cpp" else ops.use_triton(plan, interpret=True)
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"kvbuffer::{plan.op_name}", "CPU")


def play(plan: Plan, target: str, **options: Any) -> None:
    session = Session(plan, built(plan, target), **options)
    while session.steps < 11 and session.step():
        pass
    assert session.steps > 1


VARIANTS = ("recurrent", "buffered", "verify")
TRITON = {("gla", "recurrent"), ("kda", "buffered")}  # of the default run: a step takes 0.3 to 1 s
DAILY = {("gdn", "buffered"), ("gdn", "verify"), ("gla", "recurrent"), ("gla", "buffered")}
PROGRAMS = ("gdn", "gla", "kda", "mamba2", "deltaproduct2", "oja", "rwkv6")


CASES = [(n, v, t) for n in PROGRAMS for v in VARIANTS for t in TARGETS]


@pytest.mark.parametrize(
    ("name", "variant", "target"), [row(c, c[:2] in (TRITON if c[2] == "triton" else DAILY)) for c in CASES]
)
def test_steps_on_slots(name: str, variant: str, target: str) -> None:
    """Ragged cursors, padding, states that hold nothing yet, NaN in unused rows, any strides."""
    plan = make_plan(NAMED[name], variant=variant, sizes=(5, 19), inner="key" if name == "gla" else "value")
    side = {"limits": (1, 3, 2), "padded": (1,)} if variant != "recurrent" else {}
    play(plan, target, exact=False, strided=name in ("gdn", "oja"), **side)
    if variant == "buffered":
        play(plan, target, exact=False, bare=True)


@pytest.mark.parametrize(
    ("state", "target"),
    [row((d, t), (d, t) != (torch.float64, "triton")) for d in (torch.float64, torch.bfloat16) for t in TARGETS],
)
def test_other_dtypes(state: torch.dtype, target: str) -> None:
    operands = state if state == torch.float64 else torch.float32
    play(make_plan(NAMED["gdn"], state=state, sizes=(8, 16)), target, exact=False, operands=operands)


EQUAL = [
    row((v, strided, t), t == "cpp" or (t == "triton" and not strided))
    for v in VARIANTS
    for strided in (False, True)
    for t in KERNELS
]


@pytest.mark.parametrize(("variant", "strided", "target"), EQUAL)
def test_kernels_store_the_last_of_equal_slots(variant: str, strided: bool, target: str) -> None:
    """As the composite does, flush or none, and with a padding sequence among them."""
    plan = replace(make_plan(NAMED["gdn"], variant=variant, sizes=(5, 19)), slots=True)
    session = Session(plan, lambda *_: None, exact=False, strided=strided)
    kernel = replace(plan, target=target)
    implement(kernel)
    buffers = [session.state, *([session.cursor, *session.rows] if variant != "recurrent" else [])]
    mine, theirs = ([session.spread(x) for x in buffers] for _ in range(2))
    mine[1:2] = [with_tickets(kernel, x) for x in mine[1:2]]
    for step in range(9):
        if step == 7 and variant != "recurrent":
            mine[1][0, 1] = theirs[1][0, 1] = -1
        slots = torch.tensor([[2, 0, 2], [1, 1, -2], [0, 2, 1]][step % 3])
        drafts = [session.draw() for _ in range(2)]
        inputs = list(drafts[0].values())
        if variant == "verify":
            inputs = [torch.stack([d[n] for d in drafts], dim=len(session.lanes)) for n in drafts[0]]
        got = ops.step_op(kernel)(*mine, slots, *inputs)
        want = ops.step_op(replace(plan, target="aten"))(*theirs, slots, *inputs)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        assert target == "cpp" or variant == "recurrent" or not ops.tickets_of(mine[1]).any(), "a ticket was left"
        for x, y in zip(mine, theirs, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5, equal_nan=True)
