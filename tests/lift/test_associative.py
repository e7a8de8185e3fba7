"""Associative scans over several tokens whose carry is the state: one program of T tokens."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kvbuffer_compile.backend import GraphRecord
from kvbuffer_compile.runtime import by_hand
from tests.lift.test_forms import FAST, assert_served, run_beside
from tests.spelled.forms import SIZES, outer, read
from tests.spelled.lifting import capture, lifted_and_right
from tests.spelled.scan_forms import (
    CAPTURED,
    NEAR,
    STEPS,
    as_an_op,
    form,
    gated,
    gla,
    several,
    state_in_front,
    unrolled,
)
from tests.support.daily import chosen
from tests.support.oracle import Oracle
from tests.support.steps import Sizes

NAMED = {"ids": lambda x: getattr(x, "__name__", str(x))}
FEW = (gated, gla, state_in_front, as_an_op)
Step = Callable[..., Tensor]


def runs_buffered(step: Step, tokens: int, records: list[GraphRecord]) -> None:
    one = form(step, tokens)
    run_beside(one, SIZES)
    assert_served(one, records, "verify")


@pytest.mark.parametrize("step", FEW, **NAMED)
def test_scans_run_buffered(step: Step, records: list[GraphRecord]) -> None:
    runs_buffered(step, 3, records)


@pytest.mark.nightly
@pytest.mark.parametrize("tokens", [2, 5, 8])
@pytest.mark.parametrize("step", STEPS, **NAMED)
def test_all_scans_run_buffered(step: Step, tokens: int, records: list[GraphRecord]) -> None:
    runs_buffered(step, tokens, records)


def lifts(step: Step, tokens: int, sizes: Sizes) -> None:
    one = form(step, tokens)
    g = torch.Generator().manual_seed(0)
    (gm,) = capture(step, *one.start(g, sizes), *one.inputs(sizes, g))
    found = lifted_and_right(gm).found
    assert [(x.program.signature, x.tokens) for x in found] == [(one.kept[0], tokens)]


# Carries added, multiplied, normalised and in logarithms; in front of the tokens, and into the first of them.
DAILY = {"gated", "gla", "logarithms", "state_in_front", "running_products", "no_decay"}


@pytest.mark.parametrize("step", chosen(CAPTURED, DAILY, NAMED["ids"]))
def test_scans_lift(step: Step) -> None:
    lifts(step, 4, SIZES)


@pytest.mark.nightly
@pytest.mark.parametrize("sizes", [SIZES, Sizes(1, 2, 3, 3), Sizes(3, 3, 3, 3)], **NAMED)
@pytest.mark.parametrize("tokens", [2, 3, 7, 15])
@pytest.mark.parametrize("step", CAPTURED, **NAMED)
def test_scans_of_any_length_lift(step: Step, tokens: int, sizes: Sizes) -> None:
    lifts(step, tokens, sizes)


@pytest.mark.parametrize(("step", "rule"), NEAR.items(), **NAMED)
def test_near_misses_are_declined(step: Step, rule: str) -> None:
    one = form(step, 3)
    g = torch.Generator().manual_seed(0)
    (gm,) = capture(step, *one.start(g), *one.inputs(SIZES, g))
    graph = lifted_and_right(gm)
    assert not graph.found
    assert [r.why.rule for r in graph.refused if not r.kept] == rule.split()


def test_a_scan_of_many_tokens_is_declined() -> None:
    g = torch.Generator().manual_seed(0)
    (gm,) = capture(gated, *form(gated, 17).start(g), *several(17)(SIZES, g))
    assert not lifted_and_right(gm).found


def decode(S: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    S.copy_(S * g[:, 0].exp()[..., None, None] + outer(k[:, 0], v[:, 0]))
    return read(S, q[:, 0])[:, None]


def test_a_scan_and_a_decode_step_share_their_rows(records: list[GraphRecord]) -> None:
    """One program, one plan but for its variant: a scan after a decode step settles nothing."""
    g = torch.Generator().manual_seed(0)
    state = torch.randn(2, 3, 4, 5, generator=g)
    eager, exact = state.clone(), state.double()
    options = {**FAST, "flush": 16, "capacity": 24}
    steps = [(step, torch.compile(step, backend="kvbuffer", options=options)) for step in (decode, gated, unrolled)]
    with torch.no_grad(), Oracle() as oracle:
        for tokens, (step, compiled) in zip((1, 4, 2), steps, strict=True):
            given = several(tokens)(SIZES, g)
            out = compiled(state, *given)
            oracle.add(out, step(eager, *given), step(exact, *(x.double() for x in given)))
    (account,) = by_hand.accounts_of(state)
    assert account.cursor[0].tolist() == [7, 7]
    assert len({plan.program for record in records for _, plan in record.rewritten}) == 1
