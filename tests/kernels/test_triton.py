"""Generated Triton kernels against the definition: through the interpreter on a CPU, and compiled ahead of time.

A program costs the interpreter 10 to 40 ms, so shapes are as small as can be.
"""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from torch import Tensor

from benchmarks import triton_aot
from kvbuffer_compile.codegen.schedule import schedule
from kvbuffer_compile.codegen.standalone import aot
from kvbuffer_compile.codegen.triton import triton
from kvbuffer_compile.codegen.triton.launch import Config, configure
from kvbuffer_compile.codegen.triton.load import load
from kvbuffer_compile.codegen.triton.tiles import matrix
from kvbuffer_compile.codegen.triton.tiles import rows as triton_rows
from kvbuffer_compile.errors import EmitError
from kvbuffer_compile.ir.plan import Layout, Plan
from kvbuffer_compile.ir.program import Program
from kvbuffer_compile.ir.text import parse
from kvbuffer_compile.steps import composite
from tests.support.daily import chosen, diagonal
from tests.support.oracle import Oracle
from tests.support.programs import EVERY_OP, NAMED, random_programs, vocabulary

LANES = {"b": 2, "h": 2, "g": 2}
K, V = 4, 5
EVERYTHING = parse(EVERY_OP + "  return o, y, beta, k")
# a query that depends on a read; rows shared by heads, by batch, by nobody; a reduction
CHAINED = parse("""program over b h tokens 1
  input k: key(b)
  input p: key(h)
  input v: value(b)
  input g: scalar(h)
  decay g
  y = read k
  s = aten.sum.dim_IntList(y)
  q = aten.mul.Tensor(p, s)
  update p, v
  decay g
  update k, y
  o = read q
  return o""")
EXACT = {n: p for n, p in NAMED.items() if n != "mamba2"} | {"everything": EVERYTHING, "chained": CHAINED}
DAILY = {"gdn", "kda", "deltaproduct2", "oja", "everything", "chained"}  # the rest have a part of what these have


def make_plan(program: Program, variant: str, flush: int = 3, capacity: int = 0, **changes) -> Plan:
    dims = ((None,), *((LANES[x],) for x in program.lanes[1:]), (K,), (V,))
    plan = dict(
        program=program,
        layout=Layout(dims, tuple(range(len(dims)))),
        variant=variant,
        sizes=(K, V),
        flush=flush,
        capacity=capacity or flush,
        state_dtype=torch.float32,
        row_dtypes=(torch.float32,) * len(program.logged),
    )
    return Plan(**(plan | changes))


class Session:
    """A generated step and the definition, side by side on equal buffers. Unused slots hold NaN.

    Steps of several tokens take turns between matrix products and vectors.
    """

    def __init__(
        self, plan: Plan, limits: list[int], state: Tensor | None = None, block: int = 4, config: Config | None = None
    ) -> None:
        block = config.block if config else block
        self.streamed = (config or configure(plan, schedule(plan.program, plan.variant != "buffered"))).part > 0
        self.plan, self.options, self.steps = plan, {"block": block}, 0
        self.lanes = tuple(LANES[x] for x in plan.program.lanes)
        self.module = load(triton.emit(plan, config), interpret=True)
        self.state = draw_numbers(*self.lanes, K, V).to(plan.state_dtype) if state is None else state
        self.cursor = torch.zeros(4, len(limits), dtype=torch.int32)
        self.cursor[1] = torch.tensor(limits)
        logged = list(zip(plan.program.logged, plan.row_dtypes, strict=True))
        self.rows = [torch.full(plan.row_shape(v, self.lanes), torch.nan, dtype=d) for v, d in logged]
        if plan.read_dtype is not None:
            shadow = torch.full_like(self.state, torch.nan, dtype=plan.read_dtype)
            self.rows += [shadow, torch.zeros(plan.scale_shape(self.lanes))]
        self.expected = (self.state.clone(), self.cursor.clone(), [r.clone() for r in self.rows])
        self.tickets = None
        if plan.variant != "recurrent":
            count = self.module.ticket_count(self.lanes, block)
            self.tickets = torch.zeros(len(limits), count, dtype=torch.int32)

    def step(self, inputs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """One step of both: (got, expected) outputs."""
        if self.plan.several and not self.streamed:
            self.options["matrix"] = self.steps % 2 == 0
            self.steps += 1
        got = self.module.launch(self.state, self.cursor, self.tickets, self.rows, inputs, **self.options)
        state, cursor, rows = self.expected
        if self.plan.variant == "recurrent":
            return got, list(composite.recurrent_step(self.plan, state, inputs))
        return got, list(composite.buffered_step(self.plan, state, cursor, rows, inputs))

    def drop(self, count: Tensor) -> None:
        self.cursor[0] -= count
        self.expected[1][0] -= count

    def check(self, inputs: list[Tensor]) -> list[Tensor]:
        """One step, equal to the definition in every bit of everything it touches."""
        got, expected = self.step(inputs)
        for v, a, b in zip(self.plan.program.outputs, got, expected, strict=True):
            assert torch.equal(a, b), f"{v}: {a} instead of {b}\n{self.plan.program}"
        state, cursor, rows = self.expected
        assert torch.equal(self.state.nan_to_num(99), state.nan_to_num(99)), self.plan.program
        assert torch.equal(self.cursor, cursor), self.plan.program
        names = [*self.plan.program.logged, *["shadow", "scale"] * self.plan.shadowed]
        for v, a, b in zip(names, self.rows, rows, strict=True):
            assert torch.equal(a.nan_to_num(99), b.nan_to_num(99)), f"rows of {v}\n{self.plan.program}"
        assert self.tickets is None or not self.tickets.any(), "tickets are zero between launches"
        return got


def draw_numbers(*shape: int) -> Tensor:
    """Small integers, on which sums and products of float32 are exact."""
    return torch.randint(-1, 2, shape).float()


def draw(program: Program, *tokens: int) -> list[Tensor]:
    """One operand for each input, [*lanes, *tokens(, K or V)]."""
    tails = {"scalar": (), "key": (K,), "value": (V,)}
    lanes = program.lanes
    return [
        draw_numbers(*(LANES[x] if x in v.lanes else 1 for x in lanes), *tokens, *tails[v.kind]) for v in program.inputs
    ]


# ------------------------------------------------------------------------------------------- the interpreter


@pytest.mark.parametrize("name", chosen(EXACT, DAILY))
def test_buffered_steps_are_exact(name):
    """Cursors differ from the start, so sequences flush at different fill levels."""
    session = Session(make_plan(EXACT[name], "buffered"), [3, 1])
    for _ in range(5):
        session.check(draw(EXACT[name]))
    assert session.cursor[2].tolist() == [5, 5]


@pytest.mark.parametrize("name", chosen(EXACT, DAILY))
def test_verify_is_exact_and_can_be_taken_back(name):
    session = Session(make_plan(EXACT[name], "verify", flush=3, capacity=5), [3, 2])
    for tokens, dropped in [(3, [0, 2]), (3, [1, 0]), (3, [2, 1]), (1, [0, 1])]:
        session.check(draw(EXACT[name], tokens))
        session.drop(torch.tensor(dropped))


@pytest.mark.parametrize(("name", "variant"), diagonal(["kda", "everything", "chained"], ["buffered", "verify"]))
def test_rows_that_do_not_fit_at_once(name, variant, monkeypatch):
    """Rows are gone through in chunks, here of 2; what decays leave is carried from one to the next. Matrix products
    take an axis in parts, here of 2 too."""
    monkeypatch.setattr(triton_rows, "CHUNK", 2)
    monkeypatch.setattr(matrix, "PART", 2)
    session = Session(make_plan(EXACT[name], variant, flush=5, capacity=6), [5, 4], block=8)
    assert "for chunk in range" in triton.emit(session.plan)
    for _ in range(7 if variant == "buffered" else 4):
        session.check(draw(EXACT[name], *((2,) if variant == "verify" else ())))


@pytest.mark.parametrize(("name", "variant"), [("kda", "buffered"), ("gdn", "verify"), ("chained", "buffered")])
def test_shadows_are_read_and_made(name, variant):
    """A sequence begins with a state that holds nothing; numbers are small enough for a shadow that rounds nothing."""
    capacity = 5 if variant == "verify" else 3
    session = Session(make_plan(EXACT[name], variant, capacity=capacity, read_dtype=torch.float16), [3, 2])
    session.cursor[3, 1] = session.expected[1][3, 1] = 1
    for n in range(4):
        session.check(draw(EXACT[name], *((2,) if variant == "verify" else ())))
        assert (session.rows[-1][0] > 0).all(), "the first sequence has a shadow from its first step on"
        assert bool((session.rows[-1][1] > 0).all()) == (int(session.cursor[3, 1]) == 0)
        if n == 1:  # as after a write from outside
            for rows in (session.rows, session.expected[2]):
                rows[-1].zero_()
    session.rows[-2].add_(1)  # what is read is not the state
    for cursor in (session.cursor, session.expected[1]):
        cursor[0], cursor[1] = 0, 9
    ones = [torch.ones_like(x) for x in draw(EXACT[name], *((1,) if variant == "verify" else ()))]
    assert not all(map(torch.equal, *session.step(ones)))


def test_a_shadow_needs_reads_over_one_axis():
    with pytest.raises(EmitError, match="shadow"):
        triton.emit(make_plan(EXACT["oja"], "buffered", read_dtype=torch.float16))


@pytest.mark.parametrize("name", EXACT)
def test_recurrent_steps_are_exact(name):
    session = Session(make_plan(EXACT[name], "recurrent"), [0, 0])
    for _ in range(2):
        session.check(draw(EXACT[name]))


def test_reads_by_matrix_products_where_they_apply():
    """Not for a query that depends on a read, reads over both axes, or more rows than a tile should hold."""
    for name in ("gdn", "kda", "rwkv7", "deltaproduct2", "oja", "chained"):
        source = triton.emit(make_plan(EXACT[name], "verify"))
        assert ("tl.dot(" in source) == (name not in ("oja", "chained")), name
    assert "tl.dot(" not in triton.emit(make_plan(EXACT["gdn"], "verify", capacity=65))
    assert "gram_0" in triton.emit(make_plan(EXACT["gdn"], "verify")), "no gate along the axis that is read"
    assert "gram_0" not in triton.emit(make_plan(EXACT["kda"], "verify"))


CALM = dict(deadline=None, phases=[Phase.explicit, Phase.generate], suppress_health_check=list(HealthCheck))


@settings(max_examples=6, derandomize=True, **CALM)
@given(random_programs(events=5))
def test_random_programs_are_exact(program):
    session = Session(make_plan(program, "buffered", flush=2), [2, 1], block=8)
    for _ in range(3):
        session.check(draw(program))
    verify = Session(make_plan(program, "verify", flush=2, capacity=4), [2, 1], block=8)
    for _ in range(2):
        verify.check(draw(program, 2))


@pytest.mark.nightly
@settings(max_examples=300, **CALM)
@given(random_programs(events=8))
def test_many_random_programs_are_exact(program):
    test_random_programs_are_exact.hypothesis.inner_test(program)


@pytest.mark.parametrize("fill", range(4))
def test_flush_at_every_fill_level(fill):
    session = Session(make_plan(EVERYTHING, "buffered", flush=4), [4, 4], block=8)
    for _ in range(fill):
        session.check(draw(EVERYTHING))
    session.cursor[1] = session.expected[1][1] = 0
    session.check(draw(EVERYTHING))
    assert session.cursor[:2].tolist() == [[1, 1], [4, 4]]


def check_padding(session: Session, tokens: list[list[Tensor]]) -> None:
    """Step over tokens whose second sequence is padding and NaN."""
    session.cursor[0, 1] = session.expected[1][0, 1] = -1
    for inputs in tokens:
        for x in inputs:
            x[1] = torch.nan
        (out,) = session.check(inputs)
        assert (out[1] == 0).all()


def check_nothing_is_read(session: Session, tokens: list[list[Tensor]]) -> None:
    """Step over tokens whose first sequence has a state that is known to be zero, and NaN in its memory."""
    session.cursor[3, 0] = session.expected[1][3, 0] = 1
    session.state[1] = session.expected[0][1] = 2.0
    for t, inputs in enumerate(tokens):
        session.check(inputs)
        assert bool(session.state[0].isnan().all()) == (session.cursor[3, 0].item() == 1), t
    assert session.cursor[3].tolist() == [0, 0]


def test_padding_sequences_give_zero_and_touch_nothing():
    program = NAMED["gdn"]
    session = Session(make_plan(program, "verify", capacity=5), [3, 3])
    check_padding(session, [draw(program, tokens) for tokens in (1, 3)])
    assert session.cursor[0].tolist() == [4, -1]


@pytest.mark.parametrize("variant", ["buffered", "verify"])
def test_a_state_that_holds_nothing_is_not_read(variant):
    program = NAMED["kda"]
    nothing = torch.full((2, 2, K, V), torch.nan)
    session = Session(make_plan(program, variant, capacity=4), [3, 3], state=nothing)
    tokens = (2,) if variant == "verify" else ()
    check_nothing_is_read(session, [draw(program, *tokens) for _ in range(4)])


DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OTHERS = (torch.bfloat16, torch.float16, torch.float32)
STORED = [("recurrent", s, s) for s in DTYPES] + diagonal(["buffered", "verify"], DTYPES, OTHERS)


@pytest.mark.parametrize(("variant", "state", "row"), STORED, ids=str)
def test_every_way_to_store_is_exact_on_integers(variant, state, row):
    """State and rows of each dtype, operands of the rows' dtype."""
    program = NAMED["gdn"]
    plan = make_plan(program, variant, capacity=4, state_dtype=state, row_dtypes=(torch.float32, row, row))
    session = Session(plan, [2, 1], block=8)
    for _ in range(3):
        inputs = draw(program, *((2,) if variant == "verify" else ()))
        (out,) = session.check([x.to(row) for x in inputs])
        assert out.dtype == torch.float32
    assert session.state.dtype == state and [r.dtype for r in session.rows[1:]] == [row] * 2


def test_low_precision_is_only_for_storing():
    """Arithmetic is float32 on what was loaded. (The interpreter truncates to bfloat16, so float16 stands for both.)"""
    program, dtype = NAMED["gdn"], torch.float16
    plan = make_plan(program, "buffered", state_dtype=dtype, row_dtypes=(torch.float32, dtype, dtype))
    session = Session(plan, [3, 2], state=torch.randn(2, 2, K, V).to(dtype), block=8)
    exact, oracle = composite_in_float64(plan, session), Oracle()
    for _ in range(7):
        inputs = [0.5 + 0.3 * x + 0.1 * torch.randn_like(x) for x in draw(program)]
        (got,), (eager,) = session.step(inputs)
        oracle.check(got, eager, exact(inputs), "output")
    assert torch.equal(session.cursor, session.expected[1])


def composite_in_float64(plan: Plan, session: Session):
    """The same steps with nothing rounded, from the same state."""
    fine = make_plan(plan.program, plan.variant, plan.flush, compute=torch.float64, state_dtype=torch.float64)
    state, cursor = session.state.double(), session.cursor.clone()
    rows = [row.double() for row in session.rows]
    return lambda inputs: composite.buffered_step(fine, state, cursor, rows, [x.double() for x in inputs])[0]


def test_maps_in_floats():
    """Mamba-2's step: exp of a decay, a skip, keys shared by heads."""
    program = NAMED["mamba2"]
    plan = make_plan(program, "buffered")
    session = Session(plan, [3, 1])
    exact, oracle = composite_in_float64(plan, session), Oracle()
    for _ in range(5):
        inputs = [torch.randn_like(x) for x in draw(program)]
        inputs[4] = -inputs[4].abs()
        (got,), (eager,) = session.step(inputs)
        oracle.check(got, eager, exact(inputs), "output")


@pytest.mark.parametrize("gate", chosen([0.0, 1.0, 1e-38, 1e-45], {"0.0", "1e-45"}))
def test_extreme_gates_are_harmless(gate):
    for name, n in (("gdn", 3), ("kda", 3)):
        program = NAMED[name]
        session = Session(make_plan(program, "buffered", flush=4), [4, 4], block=8)
        for t in range(5):
            inputs = draw(program)
            inputs[n] = torch.full_like(inputs[n], gate if t % 2 else 1.0)
            got, expected = session.step(inputs)
            assert got[0].isfinite().all()
            torch.testing.assert_close(got[0], expected[0])


def test_any_strides():
    """State along the key axis, lanes innermost; rows with gaps; operands transposed, expanded and sliced."""
    program = NAMED["gdn"]
    layout = Layout(((None,), (V,), (K,), (2,)), (0, 3, 2, 1))  # the tensor is [b, V, K, h]
    plan = make_plan(program, "buffered", layout=layout)
    state = draw_numbers(2, V, 2 * K, 2)[:, :, ::2]
    session = Session(plan, [3, 2], state=state)
    session.rows = [torch.stack([row, row], 2)[:, :, 0] for row in session.rows]
    for _ in range(5):
        inputs = [x.transpose(0, -1).contiguous().transpose(0, -1) for x in draw(program)]
        inputs[1] = inputs[1][:1].expand(2, -1, -1)
        inputs[2] = torch.cat([inputs[2], inputs[2]], -1)[..., ::2]
        session.check(inputs)


def test_addresses_beyond_two_billion_elements():
    """Sequences that lie further apart than an int32 can say; the memory between them is never touched."""
    program = NAMED["gdn"]
    far = torch.empty(2**31 + 2**10, dtype=torch.bfloat16).as_strided((2, 2, K, V), (2**31 + 2**6, K * V, V, 1))
    far.copy_(draw_numbers(2, 2, K, V))
    session = Session(make_plan(program, "buffered", state_dtype=torch.bfloat16), [2, 1], state=far)
    for _ in range(4):
        session.check(draw(program))


def test_a_state_without_a_sequence_lane_has_one_cursor():
    text = str(NAMED["gdn"]).replace("over b h", "over h").replace("(b h)", "(h)")
    program = parse(text)
    layout = Layout(((K,), (2,), (V,)), (1, 0, 2))  # [K, H, V]: dim 0 is no batch
    session = Session(make_plan(program, "buffered", layout=layout), [2], state=draw_numbers(K, 2, V))
    for _ in range(5):
        session.check(draw(program))


def test_an_empty_batch_launches_nothing():
    session = Session(make_plan(NAMED["gdn"], "buffered"), [3, 3])
    empty = [x[:0] for x in draw(NAMED["gdn"])]
    (out,) = session.module.launch(session.state[:0], session.cursor[:, :0], session.tickets[:0], session.rows, empty)
    assert out.shape == (0, 2, V)


# ------------------------------------------------------------------------------ the tests above must be able to fail


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("last_h = arrive(", "last_h = (tile == 0) | arrive("),  # rows are written too early
        ("mask=later, other=1.0", "mask=later, other=0.0"),
        ("kept = 0", "kept = owed"),
        ("(kept - 1 - age)", "age"),
        (" * fade_scalar", ""),
    ],
)
def test_a_mutant_is_caught(right, wrong):
    plan = make_plan(NAMED["gdn"], "buffered")
    source = triton.emit(plan)
    assert right in source
    session = Session(plan, [3, 2])
    session.module = load(source.replace(right, wrong), interpret=True)
    with pytest.raises(AssertionError):
        for _ in range(7):
            inputs = draw(NAMED["gdn"])
            inputs[3] = torch.full_like(inputs[3], -1.0)
            session.check(inputs)


def test_what_has_no_spelling_is_an_error():
    with pytest.raises(EmitError, match="int64"):
        triton.emit(make_plan(NAMED["gdn"], "buffered", state_dtype=torch.int64))
    with pytest.raises(EmitError, match="bfloat16"):
        triton.emit(make_plan(NAMED["gdn"], "buffered", compute=torch.bfloat16))


@pytest.mark.parametrize("sizes", [(128, 128), (100, 96), (64, 48), (4, 5), (256, 512)])
@pytest.mark.parametrize("name", ["gdn", "kda", "oja"])
def test_launches_take_no_more_than_there_is(name, sizes):
    """A tile of a power of two that is not longer than its axis, cut evenly for a flush."""
    for variant in ("recurrent", "buffered", "verify"):
        plan = make_plan(NAMED[name], variant, flush=16, sizes=sizes)
        order = schedule(plan.program, in_place=variant != "buffered")
        config = configure(plan, order)
        axis = max(sizes) if order.split is None else sizes[("key", "value").index(order.split)]
        assert config.block & (config.block - 1) == 0 and config.block < 2 * axis
        assert config.block % min(config.fold, config.block) == 0 and config.warps in (1, 2, 4, 8, 16)


# ----------------------------------------------------------------------------------------- ahead of time

SHAPES = {"gdn": (128, 128), "kda": (128, 128), "mamba2": (128, 64)}


@pytest.fixture(scope="module")
def elsewhere():
    """A process in which nothing was interpreted: the interpreter leaves traces in Triton's own functions."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        yield pool


@pytest.mark.parametrize(("name", "variant", "target"), diagonal(SHAPES, ["buffered", "verify"], ["sm_90", "gfx942"]))
def test_nothing_spills(name, variant, target, elsewhere):
    k, v = SHAPES[name]
    layout = Layout(((None,), (32,), (k,), (v,)), (0, 1, 2, 3))
    capacity = 24 if variant == "verify" else 16
    plan = make_plan(NAMED[name], variant, 16, capacity, sizes=(k, v), layout=layout)
    found = elsewhere.submit(aot.usage, plan, target, (8, 32), 8).result()
    assert found.spills == 0, found
    assert found.shared <= 65536, found


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_every_call_of_the_vocabulary_compiles(target, elsewhere):
    program, _ = vocabulary()
    layout = Layout(((None,), (1,), (16,)), (0, 1, 2))
    plan = make_plan(program, "recurrent", sizes=(1, 16), layout=layout)
    assert elsewhere.submit(aot.usage, plan, target, (8,)).result().registers


@pytest.mark.nightly
@pytest.mark.parametrize("target", list(aot.TARGETS))
@pytest.mark.parametrize("name", [s.name for s in triton_aot.SHAPES])
def test_nothing_spills_in_any_kernel_of_a_real_model(name, target, elsewhere):
    for row in elsewhere.submit(triton_aot.measured, name, target).result():
        assert row["spills"] == 0 and row["seconds"] < 10, row
