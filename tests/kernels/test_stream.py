"""Buffered steps that stream the state against the definition, through Triton's interpreter on a CPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings

from kvbuffer_compile.codegen.schedule import schedule
from kvbuffer_compile.codegen.triton import triton
from kvbuffer_compile.codegen.triton.launch import Config, configure, space
from kvbuffer_compile.codegen.triton.load import load
from kvbuffer_compile.codegen.triton.stream import SLOTS, streams
from kvbuffer_compile.errors import EmitError
from kvbuffer_compile.ir.plan import Layout
from tests.kernels.test_triton import CALM, DTYPES, EXACT, K, Session, V, composite_in_float64, draw, make_plan
from tests.support.oracle import Oracle
from tests.support.programs import NAMED, random_programs

STREAMED = [name for name in EXACT if name not in ("everything", "chained")]
TILES = Config(block=4, warps=4, part=2, stages=2)
WHOLE = Config(block=8, warps=4, part=2, stages=2)


def order_of(plan):
    return schedule(plan.program, in_place=False)


@pytest.mark.parametrize("config", [TILES, WHOLE], ids=["tiles", "whole"])
@pytest.mark.parametrize("name", STREAMED)
def test_steps_are_exact(name, config):
    """Sequences flush at different fill levels; both axes are padded, one in tiles, the other in parts."""
    session = Session(make_plan(EXACT[name], "buffered", sizes=(K, V)), [3, 1], config=config)
    for _ in range(5):
        session.check(draw(EXACT[name]))
    assert session.cursor[2].tolist() == [5, 5]
