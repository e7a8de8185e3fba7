"""Steps of several tokens that stream the state against the definition, through Triton's interpreter on a CPU."""

from __future__ import annotations

import pytest
import torch

from kvbuffer_compile.codegen.schedule import schedule
from kvbuffer_compile.codegen.triton.drafts import drafts
from kvbuffer_compile.codegen.triton.launch import Config
from kvbuffer_compile.codegen.triton.tiles import rows as triton_rows
from tests.kernels.test_stream import PROGRAMS
from tests.kernels.test_triton import Session, draw, make_plan
from tests.support.daily import row

TILES = Config(block=4, warps=4, stages=2, matrix=True, part=2)
WHOLE = Config(block=8, warps=4, stages=2, matrix=True, part=4)
DAILY = {"gdn", "kda", "deltaproduct2", "columns"}


def order_of(plan):
    return schedule(plan.program, in_place=True)


STREAMED = [n for n in PROGRAMS if drafts(p := make_plan(PROGRAMS[n], "verify"), order_of(p))]


@pytest.fixture(autouse=True)
def few_slots(monkeypatch):
    """Products take 16 slots at least; the interpreter, which adds numbers one by one, takes any."""
    monkeypatch.setattr(triton_rows, "LEAST", 4)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        *(row((name, TILES), name in DAILY) for name in STREAMED),
        *(row((name, WHOLE), name in DAILY) for name in STREAMED),
    ],
    ids=lambda x: x if isinstance(x, str) else "tiles" if x == TILES else "whole",
)
def test_steps_are_exact_and_can_be_taken_back(name, config):
    session = Session(make_plan(PROGRAMS[name], "verify", flush=3, capacity=6), [3, 2], config=config)
    for tokens, dropped in [(3, [0, 2]), (4, [1, 0]), (2, [2, 1]), (1, [0, 1])]:
        session.check(draw(PROGRAMS[name], tokens))
        session.drop(torch.tensor(dropped))
