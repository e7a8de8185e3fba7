"""Interrupts anywhere between a user's call and the ops: reads, steps, rollback and accept of a cache of two states.

Everything is a small integer, so that float32 is exact and "the same" means equal.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kvbuffer_compile import accept, draft_tree, materialize, rollback
from kvbuffer_compile.codegen import build
from kvbuffer_compile.runtime import by_hand
from tests.support.daily import chosen, row
from tests.support.interrupts import everywhere

B, H, K, V = 2, 2, 4, 4
FLUSH, DRAFTS = 3, 3
needs_compiler = pytest.mark.skipif(build.compiler() is None, reason="no compiler")
TARGETS = ["aten", pytest.param("cpp", marks=[needs_compiler, pytest.mark.nightly])]
PARENTS = [-1, 0, 0]
# Where a step has been when it is interrupted: on its way back, and in a guard of Dynamo, which drops the interrupt.
WAY_BACK = ("step.py", "locks.py", "entry.py", "aliases.py")


def token(state: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    new = state * g[..., None, None]
    new = new + k[..., None] * (v - (new * k[..., None]).sum(-2))[..., None, :]
    return new, (new * q[..., None]).sum(-2)


def decode(a: Tensor, b: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    """One token through two layers."""
    outs = []
    for state, query in ((a, q), (b, -q)):
        new, out = token(state, query, k, v, g)
        state.copy_(new)
        outs.append(out)
    return tuple(outs)


def verify(a: Tensor, b: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    """Several tokens, at dim 2."""
    outs = []
    for state, query in ((a, q), (b, -q)):
        new, found = state, []
        for t in range(q.shape[2]):
            new, out = token(new, query[:, :, t], k[:, :, t], v[:, :, t], g[:, :, t])
            found.append(out)
        state.copy_(new)
        outs.append(torch.stack(found, 2))
    return tuple(outs)


def pooled(a: Tensor, b: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    """Two slots of a pool for each layer."""
    slots, outs = torch.tensor([1, 0]), []
    for state, query in ((a, q), (b, -q)):
        new, out = token(state[slots], query, k, v, g)
        state[slots] = new
        outs.append(out)
    return tuple(outs)


class Model:
    """A compiled step with the states it is called on, made anew for every interrupt."""

    def __init__(self, step: Callable[..., Any], target: str, owed: int) -> None:
        """owed: tokens decoded before the call that is looked at."""
        options = {"inner": "eager", "target": target, "flush": FLUSH, "capacity": FLUSH + DRAFTS}
        self.compiled = torch.compile(step, backend="kvbuffer", options=options, fullgraph=True)
        self.g, self.owed, self.fresh = torch.Generator().manual_seed(0), owed, False
        self.shape = (B, H, DRAFTS) if step is verify else (B, H)
        self.first = [self.draw() for _ in range(owed)]
        self.next = self.draw()
        self.starts = [self.integers(B, H, K, V) for _ in range(2)]
        self.cache: list[Tensor] = []

    def integers(self, *shape: int) -> Tensor:
        return torch.randint(-1, 2, shape, generator=self.g).float()

    def draw(self) -> list[Tensor]:
        return [self.integers(*self.shape, *tail) for tail in ((K,), (K,), (V,), ())]

    def begin(self) -> None:
        if self.fresh:
            self.cache = [by_hand.zero_state((B, H, K, V), torch.float32, torch.device("cpu")) for _ in range(2)]
        else:
            self.cache = [start.clone() for start in self.starts]
        for inputs in self.first:
            self.step(inputs)

    @torch.no_grad()
    def step(self, inputs: list[Tensor] | None = None) -> Any:
        return self.compiled(*self.cache, *(inputs or self.next))

    @torch.no_grad()
    def draft(self) -> None:
        with draft_tree(PARENTS):
            self.step()

    def values(self) -> list[Tensor]:
        return [state.clone().as_subclass(Tensor) for state in self.cache]


def same(got: list[Tensor], want: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def check_changes(model: Model, act: Callable[[], Any], prepare: Callable[[], Any] = lambda: None) -> None:
    """Wherever a call is interrupted, both states are as before it, or both as after it."""
    model.begin()
    prepare()
    before = model.values()
    model.begin()
    prepare()
    act()
    after = model.values()

    def start() -> Callable[[], Any]:
        model.begin()
        prepare()
        assert any(a.dirty for a in by_hand.accounts_of(model.cache)), "nothing is owed"
        return act

    def check(where: str) -> None:
        got = model.values()
        assert same(got, before) or same(got, after), f"interrupted at {where}"

    everywhere(start, check, fine=False)


def check_steps(model: Model) -> None:
    """Wherever a step is interrupted, it has not been, whether one looks at the states then or not; tried again, it
    gives what it gives. On the way back to the caller it has been, for both states."""
    model.begin()
    before = model.values()
    model.begin()
    expected = list(model.step())
    after = model.values()
    assert by_hand.accounts_of(model.cache) and not same(before, after)
    turn = 0

    def start() -> Callable[[], Any]:
        model.begin()
        return model.step

    def check(where: str) -> None:
        nonlocal turn
        turn += 1
        if turn % 2 or where.startswith(WAY_BACK):
            got = model.values()
            if same(got, after) and where.startswith(WAY_BACK):
                return
            assert same(got, before), f"interrupted at {where}"
        assert same(list(model.step()), expected), f"done again after {where}"
        assert same(model.values(), after), f"done again after {where}"

    everywhere(start, check, fine=False)


# In every run too are a step of one token below, which flushes, and of several `test_accept` and `test_a_tree`.
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("step", "owed"), [row((decode, 1), False), row((decode, FLUSH), False), row((verify, 1), False), (pooled, FLUSH)]
)
def test_a_step(step: Callable[..., Any], owed: int, target: str) -> None:
    check_steps(Model(step, target, owed))


@pytest.mark.parametrize("target", TARGETS)
def test_the_step_that_makes_fresh_states(target: str) -> None:
    model = Model(decode, target, FLUSH + DRAFTS)
    model.fresh = True
    check_steps(model)


ACTS: dict[str, Callable[[Model], Any]] = {
    "read": lambda model: model.cache[0] + 0,
    "materialize": lambda model: materialize(model.cache),
    "rollback": lambda model: rollback(model.cache, 1),
    "rollback each": lambda model: rollback(model.cache, torch.tensor([1, 0])),
    "overwrite": lambda model: model.cache[1].zero_(),
    "write": lambda model: model.cache[0].add_(1),
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("act", chosen(ACTS, ACTS.keys() - {"materialize", "rollback"}))  # as "read" and "each"
def test_a_call(act: str, target: str) -> None:
    model = Model(decode, target, 2)
    check_changes(model, lambda: ACTS[act](model))


@pytest.mark.parametrize("target", TARGETS)
def test_accept(target: str) -> None:
    model = Model(verify, target, 1)
    check_changes(model, lambda: accept(model.cache, [0, 2]), model.draft)


@pytest.mark.parametrize("target", TARGETS)
def test_a_tree(target: str) -> None:
    """It commits nothing, however it ends; the next step is as if it had not been."""
    model = Model(verify, target, 1)
    check_changes(model, model.draft)
