"""The composite steps against the definition (memory.Buffered), exactly on integers and by the oracle on floats."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kvbuffer_compile.ir.memory import Dense
from kvbuffer_compile.ir.plan import Layout, Plan
from kvbuffer_compile.ir.program import Program, run
from kvbuffer_compile.ir.text import parse
from kvbuffer_compile.steps import composite, ops
from tests.support.programs import EVERY_OP

GDN = """program over b h tokens 1
  input q: key(b h)
  input k: key(b)
  input v: value(b h)
  input g: scalar(b h)
  input beta: scalar(b h)
  decay g
  y = read k
  d = aten.sub.Tensor(v, y)
  u = aten.mul.Tensor(d, beta)
  update k, u
  o = read q
  return o"""
EVERYTHING = EVERY_OP + "  return o, y"
SIZES = dict(b=3, h=2)
K, V = 4, 5


def make_plan(program: Program, flush: int, dtype: torch.dtype, variant: str = "buffered", capacity: int = 0) -> Plan:
    dims = ((None,), (SIZES["h"],), (K,), (V,))
    row_dtypes = (dtype,) * len(program.logged)
    layout = Layout(dims, (0, 1, 2, 3))
    return Plan(program, layout, variant, (K, V), flush, capacity or flush, dtype, row_dtypes, dtype)


def make_buffers(plan: Plan, limits: list[int]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Cursor and rows; unused slots hold NaN, or a large number where the dtype has none."""
    garbage = float("nan") if plan.compute.is_floating_point else 10**9
    cursor = torch.zeros(4, len(limits), dtype=torch.int32)
    cursor[1] = torch.tensor(limits)
    lanes = tuple(SIZES.values())
    return cursor, [torch.full(plan.row_shape(v, lanes), garbage, dtype=plan.compute) for v in plan.program.logged]


def draw(program: Program, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    tails = {"scalar": (), "key": (K,), "value": (V,)}
    values = {}
    for v in program.inputs:
        shape = [n if name in v.lanes else 1 for name, n in SIZES.items()]
        x = torch.randint(-3, 4, (*shape, *tails[v.kind]))
        values[v.name] = x if dtype == torch.int64 else x.to(dtype) * 0.25
    return values


@pytest.mark.parametrize("text", [GDN, EVERYTHING], ids=["gdn", "everything"])
@pytest.mark.parametrize("limits", [[4, 4, 4], [1, 2, 3]], ids=["together", "staggered"])
def test_buffered_steps_are_exact_on_integers(text, limits):
    program = parse(text)
    plan = make_plan(program, 4, torch.int64)
    state = torch.randint(-3, 4, (*SIZES.values(), K, V))
    dense = Dense(state.clone())
    cursor, rows = make_buffers(plan, limits)
    op = ops.step_op(plan)
    for t in range(14):
        inputs = draw(program, torch.int64)
        expected = run(program, dense, inputs)
        out = op(state, cursor, *rows, *inputs.values())
        for v, got in zip(program.outputs, [out] if len(program.outputs) == 1 else out, strict=True):
            assert torch.equal(got, expected[v.name].expand_as(got)), f"step {t}, {v}"
        view = state.clone()
        composite.flush(plan, view, cursor.clone(), rows, cursor[0] > 0)
        assert torch.equal(view, dense.state), f"state after step {t}"
    assert cursor[2].tolist() == [14] * 3


@pytest.mark.parametrize("fill", range(5))
def test_flush_at_every_fill_level(fill):
    program = parse(EVERYTHING)
    plan = make_plan(program, 5, torch.float64)
    state = torch.randn(*SIZES.values(), K, V, dtype=torch.float64)
    dense = Dense(state.clone())
    cursor, rows = make_buffers(plan, [5, 5, 5])
    for _ in range(fill):
        inputs = draw(program, torch.float64)
        run(program, dense, inputs)
        composite.buffered_step(plan, state, cursor, rows, list(inputs.values()))
    composite.flush(plan, state, cursor, rows, cursor[0] > 0)
    assert cursor[0].tolist() == [0, 0, 0]
    torch.testing.assert_close(state, dense.state, rtol=1e-12, atol=1e-12)


def test_padding_sequences_give_zero_and_touch_nothing():
    program = parse(GDN)
    plan = make_plan(program, 2, torch.float64)
    state = torch.randn(*SIZES.values(), K, V, dtype=torch.float64)
    before = state.clone()
    cursor, rows = make_buffers(plan, [2, 2, 2])
    cursor[0, 1] = -1
    for _ in range(5):
        inputs = draw(program, torch.float64)
        inputs["v"][1] = float("nan")
        out = composite.buffered_step(plan, state, cursor, rows, list(inputs.values()))[0]
        assert (out[1] == 0).all() and out[0].isfinite().all()
    assert torch.equal(state[1], before[1]) and cursor[0, 1] == -1
    assert all(row[1].isnan().all() for row in rows)


@pytest.mark.parametrize("text", [GDN, EVERYTHING], ids=["gdn", "everything"])
def test_verify_is_many_steps_in_one(text):
    """T varies every round, some tokens are taken back, the state never leaves the definition."""
    program = parse(text)
    plan = make_plan(program, 4, torch.int64, variant="verify", capacity=9)
    state = torch.randint(-3, 4, (*SIZES.values(), K, V))
    dense = Dense(state.clone())
    cursor, rows = make_buffers(plan, [4, 2, 4])
    op = ops.step_op(plan)
    for tokens, dropped in [(3, 1), (5, 0), (1, 1), (4, 4), (2, 0), (5, 2), (4, 0)]:
        drafts = [draw(program, torch.int64) for _ in range(tokens)]
        stacked = [torch.stack([d[v.name] for d in drafts], dim=2) for v in program.inputs]
        out = op(state, cursor, *rows, *stacked)
        outs = [out] if len(program.outputs) == 1 else out
        ahead = Dense(dense.state.clone())
        for t, inputs in enumerate(drafts):
            if t == tokens - dropped:
                dense = Dense(ahead.state.clone())
            expected = run(program, ahead, inputs)
            for v, got in zip(program.outputs, outs, strict=True):
                assert torch.equal(got[:, :, t], expected[v.name].expand_as(got[:, :, t]))
        if dropped == 0:
            dense = ahead
        cursor[0] -= dropped
        view = state.clone()
        composite.flush(plan, view, cursor.clone(), rows, cursor[0] > 0)
        assert torch.equal(view, dense.state)


def test_a_state_that_holds_nothing_is_not_read():
    program = parse(GDN)
    plan = make_plan(program, 6, torch.float64)
    state = torch.full((*SIZES.values(), K, V), float("nan"), dtype=torch.float64)
    dense = Dense(torch.zeros_like(state))
    cursor, rows = make_buffers(plan, [6, 6, 6])
    cursor[3] = 1
    for t in range(10):
        inputs = draw(program, torch.float64)
        expected = run(program, dense, inputs)
        (out,) = composite.buffered_step(plan, state, cursor, rows, list(inputs.values()))
        torch.testing.assert_close(out, expected["o"].expand_as(out), rtol=1e-12, atol=1e-12)
        assert bool(state.isnan().all()) == (t < 6), "the state is made by the first flush, not before"
    assert cursor[3].tolist() == [0, 0, 0]


def test_recurrent_is_the_plain_step():
    program = parse(EVERYTHING)
    plan = make_plan(program, 1, torch.int64, variant="recurrent")
    state = torch.randint(-3, 4, (*SIZES.values(), K, V))
    dense = Dense(state.clone())
    op = ops.step_op(plan)
    for _ in range(4):
        inputs = draw(program, torch.int64)
        expected = run(program, dense, inputs)
        out, y = op(state, *inputs.values())
        assert torch.equal(out, expected["o"].expand_as(out)) and torch.equal(y, expected["y"].expand_as(y))
        assert torch.equal(state, dense.state)


def test_a_state_without_a_sequence_lane_has_one_cursor():
    program = parse(GDN.replace("over b h", "over h").replace("(b h)", "(h)").replace("(b)", "()"))
    layout = Layout(((K,), (SIZES["h"],), (V,)), (1, 0, 2))  # [K, H, V]: dim 0 is no batch
    plan = Plan(program, layout, "buffered", (K, V), 3, 3, torch.int64, (torch.int64,) * 3, torch.int64)
    state = torch.randint(-3, 4, (K, SIZES["h"], V))
    dense = Dense(layout.canonical(state).clone())
    rows = [torch.full(plan.row_shape(v, (SIZES["h"],)), 10**9) for v in program.logged]
    cursor = torch.tensor([[0], [2], [0], [0]], dtype=torch.int32)
    for _ in range(7):
        inputs = {n: x[0] for n, x in draw(parse(GDN), torch.int64).items()}
        expected = run(program, dense, inputs)
        (out,) = composite.buffered_step(plan, state, cursor, rows, list(inputs.values()))
        assert torch.equal(out, expected["o"].expand_as(out))
    composite.flush(plan, state, cursor, rows, cursor[0] > 0)
    assert torch.equal(layout.canonical(state), dense.state)


@pytest.mark.parametrize("variant", ["buffered", "recurrent"])
def test_opcheck(variant):
    program = parse(EVERYTHING)
    plan = make_plan(program, 3, torch.float32, variant=variant)
    cursor, rows = make_buffers(plan, [3, 3, 3])
    inputs = list(draw(program, torch.float32).values())
    state = torch.randn(*SIZES.values(), K, V)
    side = [cursor, *(r.nan_to_num() for r in rows)] if variant == "buffered" else []
    torch.library.opcheck(ops.step_op(plan), (state, *side, *inputs))


@pytest.mark.parametrize("variant", ["recurrent", "buffered"])
def test_opcheck_of_a_pool(variant):
    program = parse(EVERYTHING)
    plan = replace(make_plan(program, 3, torch.float32, variant=variant), slots=True)
    cursor, rows = make_buffers(plan, [3, 3, 3])
    inputs = [x[:2] if x.shape[0] > 1 else x for x in draw(program, torch.float32).values()]
    state = torch.randn(*SIZES.values(), K, V)
    side = [cursor, *(r.nan_to_num() for r in rows)] if variant == "buffered" else []
    torch.library.opcheck(ops.step_op(plan), (state, *side, torch.tensor([2, 0]), *inputs))


def test_a_layout_leaves_sizes_to_run_time():
    layout = Layout(((3,), (2, 4), (8,), (16,)), (0, 1, 2, 3, 4))
    assert layout.at_run_time() == Layout(((None,), (None, 4), (8,), (16,)), (0, 1, 2, 3, 4))
    assert layout.at_run_time().at_run_time() == layout.at_run_time()
    state = torch.randn(5, 12, 8, 16)
    assert layout.at_run_time().canonical(state).shape == (5, 3, 4, 8, 16)
    transposed = Layout(((16,), (3, 8)), (1, 2, 0))  # [V, H K]
    assert transposed.at_run_time() == Layout(((16,), (None, 8)), (1, 2, 0))
