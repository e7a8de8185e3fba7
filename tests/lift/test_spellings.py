"""Random recurrences in random spellings: lifted to the ops of their equations, buffered, and right by the oracle."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, note, settings
from torch import Tensor

from kvbuffer_compile.backend import GraphRecord, compile_graph, observers
from kvbuffer_compile.errors import Declined
from kvbuffer_compile.options import Options
from tests.spelled.lifting import traced
from tests.spelled.near_sketches import MUTATIONS
from tests.spelled.sketches import Spelled, expected, ops_of, spelled, swapped
from tests.support.oracle import check, check_steps

Run = Callable[..., tuple[Tensor, ...]]
FLUSH, TOKENS = 3, 8  # two flushes
OPTIONS = {"inner": "eager", "target": "aten", "flush": FLUSH, "donate": True}
SETTINGS = {
    "deadline": None,
    "database": None,
    "phases": [Phase.generate],  # shrinking takes minutes
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
}


def compiled(step: Spelled, states: list[Tensor], token: list[Tensor]) -> tuple[Run, GraphRecord]:
    """The step as the backend compiles it, and what it decided."""
    records: list[GraphRecord] = []
    observers.listeners.append(records.append)
    try:
        gm = traced(step.function(), (*states, *token), None if step.decomposed else {})
        run = compile_graph(gm, [*states, *token], ours=Options(**OPTIONS), is_inference=True)
        return lambda *args: run(list(args)), records[0]
    finally:
        observers.listeners.remove(records.append)


def run_beside(step: Spelled, seed: int = 0) -> GraphRecord:
    """TOKENS tokens of the compiled, the eager and the float64 step: outputs and final states by the oracle."""
    g = torch.Generator().manual_seed(seed)
    start, token = step.start(g), step.token(g)
    states = [[s.clone() for s in start], [s.clone() for s in start], [s.double() for s in start]]
    fn, record = compiled(step, states[0], token)
    kept: list[list[tuple[Tensor, ...]]] = [[], [], []]
    with torch.no_grad():
        for _ in range(TOKENS):
            for run, mine, out in zip((fn, step.function(), step.function(wide=True)), states, kept, strict=True):
                wide = [x.double() if mine is states[2] and x.is_floating_point() else x for x in token]
                outs = run(*mine, *wide)
                for i, at in step.returned.items():
                    # a donated state is returned itself; other results in its strides, which the graph was made for
                    mine[i] = outs[at] if outs[at] is mine[i] else mine[i].clone().copy_(outs[at])
                out.append(tuple(x for i, x in enumerate(outs) if i not in step.returned.values()))
            token = step.token(g)
    # a mutation may square the state at every token: what eager itself cannot hold proves nothing
    assume(all(bool(x.isfinite().all()) for outs in (*kept[1], states[1]) for x in outs))
    if record.rewritten:
        for i in range(len(kept[0][0])):
            check_steps(*([outs[i] for outs in run] for run in kept), f"output {i}")
        for i, (got, eager, exact) in enumerate(zip(*states, strict=True)):
            check(got + 0, eager, exact, f"state {i}")
    return record


def decided(record: GraphRecord) -> str:
    """What was lifted, and why the rest was not."""
    found = [f"{lifted.state} {ops_of(lifted)}" for lifted, _ in record.states]
    return "\n".join([*found, *(f"{r.state} {r.why}" for r in record.refused if not r.kept)])


def assert_not_saved_by_validation(record: GraphRecord) -> None:
    """A lift that validation has to refuse is wrong."""
    assert not [plan for _, plan in record.states if isinstance(plan, Declined) and plan.rule == "validation"]


def is_buffered(step: Spelled, record: GraphRecord) -> bool:
    """Whether all states are; they must have the ops of their equations."""
    found = [ops_of(lifted) for lifted, _ in record.rewritten]
    if len(found) == len(step.recurrences):
        for one in step.recurrences:
            assert not one.is_plain or {expected(one), swapped(expected(one))} & set(found), f"{expected(one)}: {found}"
    return len(found) == len(step.recurrences)


def sweep(examples: int, derandomize: bool) -> None:
    seen, declined = 0, []

    @settings(max_examples=examples, derandomize=derandomize, **SETTINGS)
    @given(spelled())
    def each(step: Spelled) -> None:
        nonlocal seen
        note(step.text)
        record = run_beside(step)
        note(decided(record))
        assert_not_saved_by_validation(record)
        seen += 1
        if not is_buffered(step, record):
            declined.append(f"{step.text}\n{decided(record)}")

    each()
    assert seen >= examples and len(declined) <= 0.01 * seen, f"{len(declined)} of {seen} declined\n" + "\n".join(
        declined
    )


def sweep_of_near_misses(examples: int, derandomize: bool) -> None:
    kept: list[bool] = []

    @settings(max_examples=examples, derandomize=derandomize, **SETTINGS)
    @given(spelled(MUTATIONS))
    def each(step: Spelled) -> None:
        note(f"{step.mutation}\n{step.text}")
        record = run_beside(step)
        note(decided(record))
        assert_not_saved_by_validation(record)
        kept.append(len(record.rewritten) == len(step.recurrences))

    each()
    assert len(kept) >= examples and sum(kept) <= 0.15 * len(kept), "mutations that change nothing"


def test_spellings_lift_and_run() -> None:
    sweep(100, derandomize=True)


def test_near_misses_are_declined_or_right() -> None:
    sweep_of_near_misses(60, derandomize=True)


@pytest.mark.nightly
def test_many_spellings_lift_and_run() -> None:
    sweep(2000, derandomize=False)


@pytest.mark.nightly
def test_many_near_misses_are_declined_or_right() -> None:
    sweep_of_near_misses(600, derandomize=False)


def shown_as_a_view(S: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    S.mul_(0.9).add_(k[..., None] * v[..., None, :])
    return S[:1], (S * q[..., None]).sum(-2)


def test_a_view_of_the_state_that_escapes_shows_every_later_token() -> None:
    g = torch.Generator().manual_seed(0)
    state = torch.randn(2, 3, 4, 5, generator=g)
    other, run = state.clone(), torch.compile(shown_as_a_view, backend="kvbuffer", fullgraph=True, options=OPTIONS)
    views = []
    for _ in range(TOKENS):
        q, k, v = (torch.randn(2, 3, n, generator=g) for n in (4, 4, 5))
        with torch.no_grad():
            (shown, got), (_, expected) = run(state, q, k, v), shown_as_a_view(other, q, k, v)
        views.append(shown)
        torch.testing.assert_close(got, expected)
        for view in views:
            torch.testing.assert_close(view + 0, other[:1])
