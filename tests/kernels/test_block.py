"""Block steps: T tokens that all read the state as it was before the call. The definition (ir/memory.run_block), the
composite step, C++ and Triton, on integers, exactly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kvbuffer_compile.codegen import build
from kvbuffer_compile.ir.memory import Dense, run_block
from kvbuffer_compile.ir.plan import Plan
from kvbuffer_compile.ir.program import Program
from kvbuffer_compile.ir.text import parse
from kvbuffer_compile.steps import ops
from tests.kernels import test_triton as interpreted
from tests.kernels.test_cpp import built
from tests.support.daily import diagonal
from tests.support.sessions import LANES, make_plan, same

PROGRAMS = {
    "linear": parse("""program over b h tokens 1
      input q: key(b h)
      input k: key(b h)
      input v: value(b h)
      o = read q
      update k, v
      return o"""),
    "gated": parse("""program over b h tokens 1
      input q: key(b h)
      input g: scalar(b h)
      input a: key(h)
      input k: key(b)
      input v: value(b h)
      o = read q
      decay g
      decay a
      update k, v
      return o"""),
    "delta": parse("""program over b h tokens 1
      input w: key(b h)
      input u: value(b h)
      input q: key(b h)
      input k: key(b h)
      input g: scalar(b h)
      y = read w
      d = aten.sub.Tensor(u, y)
      o = read q
      decay g
      update k, d
      return y, o"""),
    "both axes": parse("""program over b h tokens 1
      input q: key(b h)
      input p: value(b h)
      input k: key(b h)
      input v: value(b h)
      input a: value(b h)
      y = read p
      x = aten.add.Tensor(q, y)
      o = read x
      decay a
      update k, v
      update y, v
      return o"""),
}
Step = Callable[[Plan, list[Tensor], list[Tensor]], list[Tensor]]


def draw(plan: Plan, tokens: int) -> list[Tensor]:
    """Small integers, on which sums and products of float32 are exact."""
    tails = {"scalar": (), "key": plan.sizes[:1], "value": plan.sizes[1:]}
    lanes = plan.program.lanes
    shapes = [(*(LANES[x] if x in v.lanes else 1 for x in lanes), tokens, *tails[v.kind]) for v in plan.program.inputs]
    return [torch.randint(-1, 2, shape).float() for shape in shapes]


def start(plan: Plan, limits: tuple[int, ...]) -> list[Tensor]:
    """A state, its cursor, and rows that hold NaN."""
    lanes = tuple(LANES[x] for x in plan.program.lanes)
    state = plan.layout.canonical(torch.randint(-1, 2, (*lanes, *plan.sizes)).float()).contiguous()
    cursor = torch.zeros(4, lanes[0], dtype=torch.int32)
    cursor[1] = torch.tensor(limits)
    rows = [torch.full(plan.row_shape(v, lanes), torch.nan, dtype=torch.float32) for v in plan.program.logged]
    return [state, cursor, *rows]


def call(op: Any, memory: list[Tensor], operands: list[Tensor]) -> list[Tensor]:
    out = op(*memory, *operands)
    return [out] if isinstance(out, Tensor) else list(out)


def plan_of(program: Program, **more: Any) -> Plan:
    return make_plan(program, "block", sizes=(4, 19), flush=4, capacity=7, **more)


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_composite_step_is_the_definition(name: str) -> None:
    """Sequences flush at different fill levels; at the end everything owed is folded in."""
    torch.manual_seed(0)
    plan = replace(plan_of(PROGRAMS[name]), target="aten")
    memory, op = start(plan, (4, 1, 2)), ops.step_op(plan)
    dense = Dense(memory[0].double())
    for tokens in (3, 2, 1, 3):
        given = draw(plan, tokens)
        want = run_block(plan.program, dense, [x.double() for x in given], len(plan.program.lanes))
        for got, expected in zip(call(op, memory, given), want, strict=True):
            assert torch.equal(got.double(), expected.expand_as(got))
    memory[1][1] = 0
    call(op, memory, [torch.zeros_like(x) for x in draw(plan, 1)])
    memory[1][0] = 0  # the last token is taken back
    assert torch.equal(memory[0].double(), dense.state)
    assert memory[1][2].tolist() == [5, 5, 5]


@pytest.mark.skipif(build.compiler() is None, reason="needs a C++ compiler")
@pytest.mark.parametrize(("name", "inner"), diagonal(["gated", "delta", "both axes"], ["value", "key"]))
def test_cpp(name: str, inner: str) -> None:
    torch.manual_seed(0)
    plan = plan_of(PROGRAMS[name], inner=inner)
    ours = start(plan, (4, 1, 2))
    if inner == "key":
        ours[0] = ours[0].reshape(*ours[0].shape[:-2], *plan.sizes[::-1])
    ours[1][0, 1] = -1  # a padding sequence
    ours[1][3, 2] = 1  # one whose state holds nothing
    theirs = [x.clone() for x in ours]
    kernel, composite = built(plan), ops.step_op(replace(plan, target="aten"))
    for tokens in (3, 2, 1, 3, 7):
        given = draw(plan, tokens)
        for got, want in zip(call(kernel, ours, given), call(composite, theirs, given), strict=True):
            assert torch.equal(got, want)
        for a, b in zip(ours, theirs, strict=True):
            assert same(a, b), plan.program


@pytest.mark.parametrize("name", PROGRAMS)
def test_triton(name: str) -> None:
    """In turns by matrix products, where they apply, and by vectors."""
    torch.manual_seed(0)
    program = PROGRAMS[name]
    session = interpreted.Session(interpreted.make_plan(program, "block", flush=4, capacity=6), [4, 1])
    for tokens in (3, 2, 3, 3):
        session.check(interpreted.draw(program, tokens))
