"""Buffered steps that stream the state against the definition, through Triton's interpreter on a CPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings

from kvbuffer_compile.codegen.schedule import schedule
from kvbuffer_compile.codegen.standalone import aot
from kvbuffer_compile.codegen.triton import triton
from kvbuffer_compile.codegen.triton.launch import Config, configure
from kvbuffer_compile.codegen.triton.load import load
from kvbuffer_compile.codegen.triton.stream import SLOTS, streams
from kvbuffer_compile.codegen.triton.tiles import rows as triton_rows
from kvbuffer_compile.errors import EmitError
from kvbuffer_compile.ir.plan import Layout
from kvbuffer_compile.ir.text import parse
from tests.kernels.test_triton import (  # noqa: F401
    CALM,
    EXACT,
    K,
    Session,
    V,
    check_nothing_is_read,
    check_padding,
    composite_in_float64,
    draw,
    draw_numbers,
    elsewhere,
    make_plan,
)
from tests.support.daily import chosen, row
from tests.support.oracle import Oracle
from tests.support.programs import NAMED, random_programs

# All reads contract the value axis; decays of every kind, one of them behind the updates; a query with a sum in it.
COLUMNS = parse("""program over b h tokens 1
  input k: key(b h)
  input v: value(h)
  input x: value(b h)
  input a: key(b h)
  input w: value(b)
  input g: scalar(h)
  s = aten.sum.dim_IntList(x)
  q = aten.mul.Tensor(v, s)
  decay w
  y = read q
  decay g
  d = aten.sub.Tensor(k, y)
  update d, v
  update k, x
  decay a
  o = read x
  return o, s""")
PROGRAMS = {n: p for n, p in EXACT.items() if n not in ("everything", "chained", "oja")} | {"columns": COLUMNS}
DAILY = {"gdn", "kda", "deltaproduct2", "columns"}  # the rest have a part of what these have
TILES = Config(block=4, warps=4, part=2, stages=2)
WHOLE = Config(block=8, warps=4, part=4, stages=2)


@pytest.fixture(autouse=True)
def few_slots(monkeypatch):
    """Products take 16 slots at least; the interpreter, which adds numbers one by one, takes any."""
    monkeypatch.setattr(triton_rows, "LEAST", 4)


def order_of(plan):
    return schedule(plan.program, in_place=False)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        *(row((name, TILES), name in DAILY) for name in PROGRAMS),
        *((name, WHOLE) for name in ("gdn", "kda", "deltaproduct2", "columns")),
    ],
    ids=lambda x: x if isinstance(x, str) else "tiles" if x == TILES else "whole",
)
def test_steps_are_exact(name, config):
    """Sequences flush at different fill levels; both axes are padded, one in tiles or whole, the other in parts."""
    session = Session(make_plan(PROGRAMS[name], "buffered"), [3, 1], config=config)
    for _ in range(4):
        session.check(draw(PROGRAMS[name]))
    assert session.cursor[2].tolist() == [4, 4]


def test_whole_heads_share_only_the_cursor():
    """One program reads and writes all rows of a head, so no ticket is taken for them."""
    plan = make_plan(NAMED["gdn"], "buffered")
    assert triton.emit(plan, TILES).count("= arrive(") == 1 and "if arrive(" in triton.emit(plan, TILES)
    whole = triton.emit(plan, WHOLE)
    assert whole.count("= arrive(") == 1 and "if arrive(" not in whole
    assert "tl.num_stages" not in whole and "num_stages=STAGES" in whole


@settings(max_examples=5, derandomize=True, **CALM)
@given(random_programs(events=5))
def test_random_programs_are_exact(program):
    plan = make_plan(program, "buffered", flush=2)
    if not streams(plan, order_of(plan)):
        return
    session = Session(plan, [1, 2], config=TILES)
    for _ in range(2):
        session.check(draw(program))


@pytest.mark.nightly
@settings(max_examples=300, **CALM)
@given(random_programs(events=8))
def test_many_random_programs_are_exact(program):
    test_random_programs_are_exact.hypothesis.inner_test(program)


def test_random_programs_are_streamed_often():
    found = []

    @settings(max_examples=40, derandomize=True, database=None, **CALM)
    @given(random_programs(events=5))
    def count(program):
        plan = make_plan(program, "buffered")
        found.append(streams(plan, order_of(plan)))

    count()
    assert sum(found) > len(found) // 8, f"{sum(found)} of {len(found)}"


@pytest.mark.parametrize("fill", range(4))
def test_flush_at_every_fill_level(fill):
    session = Session(make_plan(NAMED["kda"], "buffered", flush=4), [4, 4], config=TILES)
    for _ in range(fill):
        session.check(draw(NAMED["kda"]))
    session.cursor[1] = session.expected[1][1] = 0
    session.check(draw(NAMED["kda"]))
    assert session.cursor[:2].tolist() == [[1, 1], [4, 4]]


@pytest.mark.parametrize("name", ["gdn", "kda"])
def test_many_rows(name):
    """More than a chunk of the other form; slots that are no power of two."""
    session = Session(make_plan(NAMED[name], "buffered", flush=6, capacity=7), [6, 4], config=TILES)
    for _ in range(7):
        session.check(draw(NAMED[name]))


def test_padding_sequences_give_zero_and_touch_nothing():
    session = Session(make_plan(NAMED["gdn"], "buffered"), [3, 3], config=WHOLE)
    check_padding(session, [draw(NAMED["gdn"]) for _ in range(2)])
    assert session.cursor[0].tolist() == [2, -1]


@pytest.mark.parametrize("name", ["gdn", "kda"])
def test_a_state_that_holds_nothing_is_not_read(name):
    session = Session(
        make_plan(NAMED[name], "buffered", capacity=4), [3, 3], torch.full((2, 2, K, V), torch.nan), config=TILES
    )
    check_nothing_is_read(session, [draw(NAMED[name]) for _ in range(5)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_short_states_are_exact_on_integers(dtype):
    plan = make_plan(NAMED["gdn"], "buffered", state_dtype=dtype, row_dtypes=(torch.float32, dtype, dtype))
    session = Session(plan, [2, 1], config=WHOLE)
    for _ in range(4):
        session.check([x.to(dtype) for x in draw(NAMED["gdn"])])
    assert session.state.dtype == dtype


def test_what_is_read_after_a_flush_is_what_was_stored():
    """A flush rounds the state; its reads see the rounded one, like those of the definition."""
    plan = make_plan(NAMED["gdn"], "buffered", state_dtype=torch.float16)
    session = Session(plan, [3, 2], torch.randn(2, 2, K, V).half(), config=WHOLE)
    exact, oracle = composite_in_float64(plan, session), Oracle()
    for _ in range(7):
        inputs = [0.5 + 0.3 * x + 0.1 * torch.randn_like(x) for x in draw(NAMED["gdn"])]
        (got,), (eager,) = session.step(inputs)
        oracle.check(got, eager, exact(inputs), "output")
        torch.testing.assert_close(session.state, session.expected[0], rtol=2e-3, atol=1e-3)


def test_maps_in_floats():
    """Mamba-2's step: exp of a decay, a skip, keys shared by heads."""
    plan = make_plan(NAMED["mamba2"], "buffered")
    session = Session(plan, [3, 1], config=TILES)
    exact, oracle = composite_in_float64(plan, session), Oracle()
    for _ in range(5):
        inputs = [torch.randn_like(x) for x in draw(NAMED["mamba2"])]
        inputs[4] = -inputs[4].abs()
        (got,), (eager,) = session.step(inputs)
        oracle.check(got, eager, exact(inputs), "output")


@pytest.mark.parametrize("gate", chosen([0.0, 1e-38, 1e-45], {"0.0", "1e-45"}))
@pytest.mark.parametrize("name", ["gdn", "kda"])
def test_extreme_gates_are_harmless(name, gate):
    session = Session(make_plan(NAMED[name], "buffered", flush=4), [4, 4], config=WHOLE)
    for t in range(5):
        inputs = draw(NAMED[name])
        inputs[3] = torch.full_like(inputs[3], gate if t % 2 else 1.0)
        got, expected = session.step(inputs)
        assert got[0].isfinite().all()
        torch.testing.assert_close(got[0], expected[0])


def test_any_strides():
    """State along the key axis, lanes innermost; rows with gaps; operands transposed, expanded and sliced."""
    program = NAMED["gdn"]
    layout = Layout(((None,), (V,), (K,), (2,)), (0, 3, 2, 1))  # the tensor is [b, V, K, h]
    state = draw_numbers(2, V, 2 * K, 2)[:, :, ::2]
    session = Session(make_plan(program, "buffered", layout=layout), [3, 2], state=state, config=TILES)
    session.rows = [torch.stack([row, row], 2)[:, :, 0] for row in session.rows]
    for _ in range(5):
        inputs = [x.transpose(0, -1).contiguous().transpose(0, -1) for x in draw(program)]
        inputs[1] = inputs[1][:1].expand(2, -1, -1)
        inputs[2] = torch.cat([inputs[2], inputs[2]], -1)[..., ::2]
        session.check(inputs)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("mask=later, other=1.0", "mask=later, other=0.0"),
        ("kept = 0", "kept = owed"),
        (", reverse=True", ""),
        (" * fade_scalar", ""),
        ("later = slot + 1 < kept", "later = slot < kept"),
        ("tl.dot(tl.trans(left_0), right_0, s", "tl.dot(tl.trans(left_0), right_0, s * 0"),
        ("mask=live", "mask=live & (value < 3)[None, :]"),
    ],
)
def test_a_mutant_is_caught(right, wrong):
    plan = make_plan(NAMED["gdn"], "buffered")
    source = triton.emit(plan, WHOLE)
    assert right in source
    session = Session(plan, [3, 2], config=WHOLE)
    session.module = load(source.replace(right, wrong), interpret=True)
    with pytest.raises(AssertionError):
        for _ in range(7):
            inputs = draw(NAMED["gdn"])
            inputs[3] = torch.full_like(inputs[3], -1.0)
            session.check(inputs)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("oja", {}),  # reads contract both axes
        ("chained", {}),  # a query depends on a read
        ("gdn", {"read_dtype": torch.float16}),
        ("gdn", {"capacity": SLOTS + 1}),
        ("gdn", {"compute": torch.float64}),
    ],
    ids=str,
)
def test_what_cannot_be_streamed_is_an_error(name, changes):
    plan = make_plan(EXACT[name], "buffered", **changes)
    assert not streams(plan, order_of(plan))
    with pytest.raises(EmitError, match="streams"):
        triton.emit(plan, TILES)


# Instructions in the machine code for sm_90, float32 states, with 4 % of room: 1,824 and 2,560 with Triton 3.9.
MOST = {"gdn": 1900, "kda": 2660}


@pytest.mark.parametrize("name", MOST)
def test_the_machine_code_asks_ahead_and_stays_short(name, elsewhere):  # noqa: F811
    """Whole parts of the state come by asynchronous copies of 16 bytes, as many as there are stages or more where the
    loop is unrolled; nothing spills, and a flush is a product."""
    layout = Layout(((None,), (32,), (128,), (128,)), (0, 1, 2, 3))
    rows = tuple(torch.float32 if v.kind == "scalar" or v.name == "a" else torch.bfloat16 for v in NAMED[name].logged)
    plan = make_plan(NAMED[name], "buffered", 16, sizes=(128, 128), layout=layout, row_dtypes=rows)
    config = configure(plan, order_of(plan))
    try:
        found = elsewhere.submit(aot.instructions, plan, "sm_90", (128, 32), 1, config).result()
    except FileNotFoundError:
        pytest.skip("this build of Triton bundles no nvdisasm")
    copied = sum(n for op, n in found.items() if op.startswith("LDGSTS") and op.endswith(".128"))
    parts, rest = divmod(copied * 16 * 32 * config.warps, config.part * 128 * 4)
    assert parts >= config.stages and not rest, found
    assert not [op for op in found if op.startswith(("LDL", "STL"))], found
    assert any(op.startswith("HMMA") for op in found), found
    assert found.total() <= MOST[name], found.total()
