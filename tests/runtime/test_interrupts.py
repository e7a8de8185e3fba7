"""An exception at any bytecode leaves every state true: unchanged, or changed as a whole."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from kvbuffer_compile.accounts import rollback
from kvbuffer_compile.codegen import build
from kvbuffer_compile.ir.plan import Plan
from kvbuffer_compile.process.at_once import at_once
from kvbuffer_compile.runtime import drafts
from kvbuffer_compile.steps import composite, ops, slots, tree
from tests.kernels.test_cut import CUT
from tests.support.daily import row
from tests.support.exact import Exact
from tests.support.interrupts import everywhere
from tests.support.programs import NAMED
from tests.support.sessions import Session, make_plan

FLUSH, MOST = 3, 3
TREE = torch.tensor([[-1, 0, 0], [-1, -1, 1], [-1, 0, 1]])


@dataclass
class Held:
    """What an op works on; a copy for each interrupt."""

    plan: Plan
    state: Tensor
    cursor: Tensor
    rows: list[Tensor]

    def copy(self) -> Held:
        return Held(self.plan, self.state.clone(), self.cursor.clone(), [row.clone() for row in self.rows])

    def stands_for(self) -> Tensor:
        """The state that base and rows stand for."""
        copy = self.copy()
        owing = (copy.cursor[0] > 0) | ((copy.cursor[3] > 0) & (copy.cursor[0] >= 0))
        composite.flush(copy.plan, copy.state, copy.cursor, copy.rows, owing)
        return copy.state

    @property
    def steps(self) -> Tensor:
        return self.cursor[2].clone()


def held(owed: int, name: str = "gdn") -> tuple[Held, Exact]:
    """A state that owes some rows; sequences flush at 3, 2 and 1."""
    run = Exact(NAMED[name], FLUSH, MOST, seed=owed)
    for _ in range(owed):
        run.step("buffered", [run.draw()])
    return Held(run.plan, run.state, run.cursor, run.rows), run


def stacked(run: Exact, tokens: int | None) -> list[Tensor]:
    """Operands of a step of some tokens; None: of one, without a dim of tokens."""
    drawn = [run.draw() for _ in range(tokens or 1)]
    found = [torch.stack([t[v.name] for t in drawn], len(run.lanes)) for v in run.program.inputs]
    return [x.squeeze(len(run.lanes)) for x in found] if tokens is None else found


def check_steps(held: Held, act: Callable[[Held], Any]) -> None:
    """Wherever a step is interrupted: it is counted and done, or neither, and then it can be done again."""
    done = held.copy()
    expected = act(done)
    before, after = held.stands_for(), done.stands_for()
    assert not torch.equal(before, after) or "tree" in held.plan.variant
    now = held.copy()

    def start() -> Callable[[], Any]:
        nonlocal now
        now = held.copy()
        return partial(act, now)

    def check(where: str) -> None:
        counted = not torch.equal(now.steps, held.steps)
        assert torch.equal(now.stands_for(), after if counted else before), f"interrupted at {where}"
        if not counted:
            again = act(now)
            assert torch.equal(now.stands_for(), after), f"done again after {where}"
            assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True)), f"done again after {where}"
        assert torch.equal(now.steps, done.steps)

    everywhere(start, check)


# ------------------------------------------------------------------------------------------------ composite ops


@pytest.mark.parametrize("name", ["gdn", "gla", "deltaproduct2"])
def test_a_flush(name: str) -> None:
    start, _ = held(2, name)
    true = start.stands_for()
    assert not torch.equal(start.state, true)
    now = start.copy()

    def begin() -> Callable[[], Any]:
        nonlocal now
        now = start.copy()
        return lambda: composite.flush(now.plan, now.state, now.cursor, now.rows, now.cursor[0] > 0)

    def check(where: str) -> None:
        assert torch.equal(now.stands_for(), true), f"interrupted at {where}"

    everywhere(begin, check)
    assert torch.equal(now.state, true)


STEPS = {
    "buffered": (None, lambda h, x: composite.buffered_step(h.plan, h.state, h.cursor, h.rows, x)),
    "verify": (MOST, lambda h, x: composite.buffered_step(h.plan, h.state, h.cursor, h.rows, x)),
    "tree": (MOST, lambda h, x: tree.tree_step(h.plan, h.state, h.cursor, h.rows, TREE.int(), x)),
}


@pytest.mark.parametrize(
    ("variant", "owed"),
    [
        ("buffered", 3),
        ("verify", 2),
        pytest.param("buffered", 2, marks=pytest.mark.nightly),
        pytest.param("verify", 3, marks=pytest.mark.nightly),
        pytest.param("tree", 2, marks=pytest.mark.nightly),
        pytest.param("tree", 3, marks=pytest.mark.nightly),
    ],
)
def test_a_step(variant: str, owed: int) -> None:
    """Of sequences that flush at 3, 2 and 1: some are full, or all are."""
    start, run = held(owed)
    tokens, step = STEPS[variant]
    start.plan = replace(start.plan, variant=variant)
    operands = stacked(run, tokens)
    check_steps(start, lambda h: step(h, operands))


@pytest.mark.parametrize("pool", [False, True], ids=["batch", "pool"])
def test_a_recurrent_step(pool: bool) -> None:
    start, run = held(0)
    operands, index = stacked(run, None), torch.tensor([2, 0, -2])
    start.plan = replace(start.plan, variant="recurrent", slots=pool)

    def act(h: Held) -> Any:
        if pool:
            return slots.recurrent_step(h.plan, h.state, index, operands)
        return composite.recurrent_step(h.plan, h.state, operands)

    done, now = start.copy(), start.copy()
    act(done)
    assert not torch.equal(done.state, start.state)

    def begin() -> Callable[[], Any]:
        nonlocal now
        now = start.copy()
        return partial(act, now)

    def check(where: str) -> None:  # whether it is done, nobody counts: as with an eager step
        assert torch.equal(now.state, start.state) or torch.equal(now.state, done.state), where

    everywhere(begin, check)


SLOTS = {"two slots": [2, 0], "one slot twice": [1, -2]}


@pytest.mark.parametrize(
    ("index", "tokens"),
    [row((at, tokens), (at, tokens) == ("one slot twice", None)) for tokens in (None, MOST) for at in SLOTS],
)
def test_a_step_on_a_pool(index: str, tokens: int | None) -> None:
    """Slots flush and have their rows written over in the same step."""
    start, run = held(3)
    start.cursor[1] = torch.tensor([3, 1, 9])
    start.plan = replace(start.plan, slots=True, variant="verify" if tokens else "buffered")
    operands = [x[:2] for x in stacked(run, tokens)]
    at = torch.tensor(SLOTS[index])
    check_steps(start, lambda h: slots.buffered_step(h.plan, h.state, h.cursor, h.rows, at, operands))


def test_the_op_itself() -> None:
    """With the dispatcher and what leads from it to the step."""
    start, run = held(2)
    operands = stacked(run, None)
    check_steps(start, lambda h: [ops.step_op(h.plan)(h.state, h.cursor, *h.rows, *operands)])


@pytest.mark.skipif(build.compiler() is None, reason="no compiler")
@pytest.mark.parametrize("variant", ["buffered", "verify"])
def test_a_step_that_is_cut(variant: str) -> None:
    plan = make_plan(CUT["error"], variant, capacity=7)
    ops.use_cpp(plan)
    session = Session(plan, ops.step_op(plan), limits=(2, 3, 4))
    while session.steps < 2:
        assert session.step()
    drawn = [session.draw() for _ in range(MOST)]
    lanes = len(session.lanes)
    operands = [torch.stack([d[v.name] for d in drawn], lanes) for v in plan.program.inputs]
    operands = operands if variant == "verify" else [x.select(lanes, 0) for x in operands]
    start = Held(plan, session.state, session.cursor, session.rows)
    assert bool((start.cursor[0] > 0).any())
    check_steps(start, lambda h: list(ops.step_op(plan)(h.state, h.cursor, *h.rows, *operands)))


# ------------------------------------------------------------------------------------- several states at once


def account(h: Held, parents: Tensor | None) -> SimpleNamespace:
    return SimpleNamespace(plan=h.plan, cursor=h.cursor, rows=h.rows, drafts=parents, most=5)


def check_together(starts: list[Held], act: Callable[[list[Any]], Any], parents: Tensor | None) -> None:
    """All states are as before, or all are as after the call."""
    accounts = [account(h.copy(), parents) for h in starts]
    act(accounts)
    now: list[Held] = []
    told: list[SimpleNamespace] = []

    def values(held: list[Held]) -> list[Tensor]:
        return [h.stands_for() for h in held]

    def whole(got: list[Tensor], want: list[Tensor]) -> bool:
        return all(torch.equal(a, b) for a, b in zip(got, want, strict=True))

    before = values(starts)
    after = values([replace(h, cursor=a.cursor, rows=a.rows) for h, a in zip(starts, accounts, strict=True)])
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))

    def begin() -> Callable[[], Any]:
        now[:] = [h.copy() for h in starts]
        told[:] = [account(h, parents) for h in now]
        return lambda: act(told)

    def check(where: str) -> None:
        done = whole(values(now), after)
        assert done or whole(values(now), before), f"interrupted at {where}"
        told_of = accounts if done else [account(h, parents) for h in starts]
        assert [(a.drafts is None, a.most) for a in told] == [(a.drafts is None, a.most) for a in told_of], where

    everywhere(begin, check)


def test_taking_tokens_back() -> None:
    starts = [held(2)[0], held(2, "gla")[0], held(2)[0]]
    for h in starts:
        h.cursor[0] = 2
    check_together(starts, lambda accounts: rollback.take_back(accounts, [2, 1, 1]), TREE)


def test_accepting_a_path() -> None:
    starts = []
    for name in ("gdn", "gla"):
        h, run = held(1, name)
        h.plan = replace(h.plan, variant="tree")
        tree.tree_step(h.plan, h.state, h.cursor, h.rows, TREE.int(), stacked(run, MOST))
        starts.append(h)
    paths = torch.tensor([[0, 2], [1, 2], [0, 1]])  # the first and the second move rows over others
    check_together(starts, lambda accounts: drafts._keep(accounts, paths), TREE)


# --------------------------------------------------------------------------------------------- the one call


def test_no_python_runs_between_writes_that_belong_together() -> None:
    """Whatever is handed to at_once, everywhere above: no frame of Python is entered from it."""
    entered: list[str] = []

    def profile(frame: Any, event: str, arg: Any) -> None:
        back = frame.f_back
        if event == "call" and back is not None and back.f_code is at_once.__code__:
            entered.append(frame.f_code.co_qualname)

    def all_of_them() -> None:
        start, run = held(3)
        composite.flush(start.plan, start.state, start.cursor, start.rows, start.cursor[0] > 0)
        pool = replace(start.plan, slots=True)
        slots.buffered_step(
            pool, start.state, start.cursor, start.rows, torch.tensor([0, 1, 2]), stacked(run, None)
        )  # fmt: skip
        rollback.take_back([account(start, None)], 1)  # type: ignore[list-item]
        drafts._keep([account(start, TREE)], torch.tensor([[0]]))  # type: ignore[list-item]

    sys.setprofile(profile)
    try:
        all_of_them()
        assert not entered
        at_once(lambda: None)
    finally:
        sys.setprofile(None)
    assert len(entered) == 1, "this would have been seen"
