"""States stepped without rows, next to others: what is looked up only once stays true."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kvbuffer_compile import materialize
from kvbuffer_compile.runtime.step import Step
from tests.runtime.test_runtime import B, H, K, Pair, V, draw, step

PLAIN = {"flush": 1, "target": "aten"}


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[Step]:
    """The rewritten graphs that were called."""
    called: list[Step] = []
    original = Step.__call__

    def call(self: Step, args: list[Any]) -> Any:
        called.append(self)
        return original(self, args)

    monkeypatch.setattr(Step, "__call__", call)
    return called


def run(pair: Pair, steps: list[Step], times: int = 3) -> bool:
    """Whether the last step was calm from its start."""
    for _ in range(times):
        calm = bool(steps) and steps[-1].calm is not None
        pair.run()
    return calm


def test_a_state_alone_is_calm(steps: list[Step]) -> None:
    pair = Pair(**PLAIN)
    assert run(pair, steps)
    pair.check(pair.state)


def test_another_state_with_rows_does_not_matter(steps: list[Step]) -> None:
    pair, other = Pair(**PLAIN), Pair()
    for _ in range(4):
        assert run(pair, steps)
        other.run(3)
    pair.check(pair.state)
    other.check(other.state)


def test_rows_that_another_graph_owes_to_it_are_folded_in(steps: list[Step]) -> None:
    pair = Pair(**PLAIN)
    assert run(pair, steps)
    with_rows = torch.compile(step, backend="kvbuffer", options={"flush": 8, "inner": "eager", "target": "aten"})
    inputs = draw()
    with torch.no_grad():
        with_rows(pair.state, *inputs)
        step(pair.eager, *inputs)
        step(pair.exact, *(x.double() for x in inputs))
    run(pair, steps)
    pair.check(pair.state)


@pytest.mark.parametrize("first", ["part", "whole"])
def test_rows_that_are_owed_to_memory_around_it(first: str, steps: list[Step]) -> None:
    """A stack whose first layer is stepped without rows, while rows are owed to all of it or to a part of it."""
    stack = torch.randn(2 * B, H, K, V)
    expected = stack.clone()
    with_rows = torch.compile(step, backend="kvbuffer", options={"flush": 8, "inner": "eager", "target": "aten"})
    without = torch.compile(step, backend="kvbuffer", options={**PLAIN, "inner": "eager"})
    part = stack[:B]

    def both(fn: Any, state: Tensor, twin: Tensor) -> None:
        inputs = draw(state.shape[0])
        torch.testing.assert_close(fn(state, *inputs), step(twin, *inputs), atol=1e-3, rtol=1e-3)

    with torch.no_grad():
        for turn in range(6):
            if (turn % 2 == 0) == (first == "part"):
                for _ in range(3):
                    both(without, part, expected[:B])
            else:
                both(with_rows, stack, expected)
        materialize(stack)
    torch.testing.assert_close(stack, expected, atol=1e-3, rtol=1e-3)


def test_another_state_at_the_same_place(steps: list[Step]) -> None:
    """The graph is the same, the state is not: one that owes rows is seen."""
    pair, other = Pair(**PLAIN), Pair()
    run(pair, steps)
    other.run(2)
    inputs = draw()
    with torch.no_grad():
        pair.compiled(other.state, *inputs)
        step(other.eager, *inputs)
        step(other.exact, *(x.double() for x in inputs))
    other.check(other.state)
    run(pair, steps)
    pair.check(pair.state)


def test_a_state_that_came_to_be_an_operand(steps: list[Step]) -> None:
    """What is read beside the state may owe rows at one call and none at another."""

    def mixed(state: Tensor, other: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        state.mul_(0.9).add_(k[..., None] * v[..., None, :])
        return (q[..., None] * state).sum(-2) + other.sum((-1, -2))[..., None]

    fn = torch.compile(mixed, backend="kvbuffer", options={**PLAIN, "inner": "eager"})
    pair, ordinary = Pair(), torch.randn(B, H, K, V)
    state, twin = torch.randn(B, H, K, V), None
    twin = state.clone()
    for turn in range(8):
        pair.run()
        other, known = (pair.state, pair.eager) if turn % 2 else (ordinary, ordinary)
        q, k, v = torch.randn(B, H, K), torch.randn(B, H, K), torch.randn(B, H, V)
        with torch.no_grad():
            torch.testing.assert_close(fn(state, other, q, k, v), mixed(twin, known, q, k, v), atol=1e-3, rtol=1e-3)
    pair.check(pair.state)
