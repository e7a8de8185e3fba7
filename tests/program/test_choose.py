"""Choosing a plan: what is fast enough, what is declined with numbers, what an integer flush and dtypes do."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from kvbuffer_compile.errors import Declined
from kvbuffer_compile.ir.plan import Layout, Plan
from kvbuffer_compile.ir.program import Program
from kvbuffer_compile.machine import Machine, Speed
from kvbuffer_compile.machine.numbers import Kernels
from kvbuffer_compile.options import Options
from kvbuffer_compile.passes.choice import choose as choose_module
from kvbuffer_compile.passes.choice import kernels, predict
from kvbuffer_compile.passes.choice.choose import choose, explain_choice, lane_sizes, likely_flush, row_dtypes
from kvbuffer_compile.passes.choice.dtypes import exact_dtype, holds
from kvbuffer_compile.passes.choice.predict import Prediction
from kvbuffer_compile.passes.choice.working_set import call_of
from kvbuffer_compile.passes.lifted import Call, Lifted
from tests.support.machines import CPU, H100, machine
from tests.support.programs import GLA, gated_deltanet

aten = torch.ops.aten
GDN = gated_deltanet()
# Where an array is changed in place in the time it takes to read it, and where that takes three times as long.
KERNELS = Kernels(
    call=3.5e-6, rows_call=5e-6, fork=5e-6, lane=5e-8, rate=29e9, read_lane=6e-8, read=8e9, row=1e-9, walk=15e9,
    gather=1e-10, pack=1e-8, fold=58e9, bfloat16=1.2e-10, narrow_read=2e-10, narrow_row=2e-9,
    narrow_walk=12e9, exposed=0.2,
)  # fmt: skip
NEAR, FAR = Speed(4 << 20, 80e9, 80e9, 80e9, 60e9, 200e9, 200e9), Speed(128 << 20, 12e9, 12e9, 24e9, 10e9, 20e9)
TIMED = Machine("timed", "cpu", 1, (NEAR, FAR), 1 << 20, 32 << 20, 2.5e-6, 15e9, KERNELS)
READS = replace(TIMED, speeds=(NEAR, replace(FAR, kernel_update=6e9, kernel_twice=6e9)))


def lifted(
    program: Program = GDN,
    lanes: tuple[int, int] = (32, 32),
    sizes: tuple[int, int] = (128, 128),
    state: torch.dtype = torch.float32,
    operand: torch.dtype = torch.float32,
    transposed: bool = False,
    tokens: int = 1,
) -> Lifted:
    """A lifted state of these sizes, its operands plain placeholders."""
    graph, fake = Graph(), FakeTensorMode()
    shape = (*lanes, *reversed(sizes)) if transposed else (*lanes, *sizes)
    with fake:
        node = placeholder(graph, "state", torch.empty(shape, dtype=state))
        tails = {"scalar": (), "key": sizes[:1], "value": sizes[1:]}
        axis = (tokens,) if tokens > 1 else ()
        operands = [
            placeholder(graph, v.name, torch.empty(*lanes, *axis, *tails[v.kind], dtype=operand))
            for v in program.inputs
        ]
    order = (0, 1, 3, 2) if transposed else (0, 1, 2, 3)
    layout = Layout(tuple((None if i == 0 else x,) for i, x in enumerate(shape)), order)
    return Lifted(node, program, layout, sizes, tuple(operands), (), node, source="model.py:7", several=tokens > 1)


def placeholder(graph: Graph, name: str, value: torch.Tensor) -> Node:
    node = graph.placeholder(name)
    node.meta["val"] = value
    return node


def planned(outcome: Plan | Declined) -> Plan:
    assert isinstance(outcome, Plan), outcome
    return outcome


# ------------------------------------------------------------------------------------------------ choosing


def test_a_large_state_is_buffered_by_a_kernel() -> None:
    plan, prediction = explain_choice(lifted(), Options(), CPU, "cpp")
    assert planned(plan).variant == "buffered"
    assert planned(plan).flush == planned(plan).capacity == prediction.candidates[prediction.chosen or 0].flush
    assert prediction.best_flush == pytest.approx((2 * 4 * 128 * 128 / (4 + 4 * 256)) ** 0.5)
    assert planned(plan).flush in (8, 12, 16)  # float32 rows: L* = 11.3
    assert prediction.choice is not None and prediction.choice.gain > 2


def test_where_writing_in_place_is_free_the_recurrent_kernel_wins() -> None:
    """Seen on Xeons: an array is changed in place in the time it takes to read it."""
    assert planned(choose(lifted(), Options(), TIMED, "cpp")).variant == "recurrent"
    assert planned(choose(lifted(), Options(flush=16), TIMED, "cpp")).variant == "buffered"


def test_where_others_push_the_state_out_of_the_caches_it_is_buffered() -> None:
    """A state that fits, in a model that does not: between two visits everything else is touched."""
    small = lifted(lanes=(1, 32))
    alone = explain_choice(small, Options(), READS, "cpp")[1]
    assert min(alone.candidates, key=lambda c: c.seconds).variant == "recurrent"
    among = explain_choice(small, Options(), READS, "cpp", Call(1 << 30, 24))[1]
    assert among.plain.seconds > 1.2 * alone.plain.seconds
    assert planned(choose(small, Options(), READS, "cpp", Call(1 << 30, 24))).variant == "buffered"


def test_the_host_is_shared_by_the_states_of_a_graph() -> None:
    tiny = lifted(lanes=(1, 4), sizes=(32, 32))
    one, many = (explain_choice(tiny, Options(flush=1), TIMED, "cpp", Call(0, n))[1] for n in (1, 24))
    assert one.choice is not None and many.choice is not None
    assert one.choice.seconds - many.choice.seconds == pytest.approx(kernels.CALL_LAUNCHES * TIMED.launch * 23 / 24)


def seconds(machine: Machine, flush: int = 16, **more: Any) -> float:
    """What the candidate with this flush length is predicted to take."""
    prediction = explain_choice(lifted(**more), Options(flush=flush), machine, "cpp")[1]
    assert prediction.choice is not None
    return prediction.choice.seconds


def test_rows_have_a_speed_of_their_own() -> None:
    """From memory they come more slowly than a state, in whose place many of them are read."""
    slow = replace(TIMED, speeds=(NEAR, replace(FAR, kernel_rows=3e9)))
    assert seconds(slow) > 1.1 * seconds(TIMED)
    assert seconds(slow, flush=1) == seconds(TIMED, flush=1)


def test_a_lane_is_met_again_where_there_is_room_for_it() -> None:
    """As many bytes in lanes of 64 KB, two of which fit in the core's cache of 512 KB, and of 256 KB."""
    core = replace(TIMED, cache=1 << 19)
    small, large = seconds(core, 1), seconds(core, 1, lanes=(16, 16), sizes=(256, 256))
    assert large > 1.1 * small
    half, roomy = (seconds(replace(core, cache=1 << n), 1, lanes=(16, 16), sizes=(256, 256)) for n in (20, 21))
    assert 1.01 * roomy < half < 0.95 * large and roomy < 1.02 * small
    once = [
        seconds(core, 1, lanes=n, sizes=k, program=GLA) for n, k in (((32, 32), (128, 128)), ((16, 16), (256, 256)))
    ]
    assert once[1] < 1.05 * once[0]  # nothing is met twice


def test_equal_candidates_are_equal_without_the_host() -> None:
    """Of kernels that take 10 and 11 us the faster one is taken, whatever the host takes around either."""
    found = explain_choice(lifted(lanes=(1, 4)), Options(), TIMED, "cpp")[1]
    assert all(c.around > 50e-6 for c in found.candidates if c.flush > 1)
    host = max(c.around for c in found.candidates)
    fast = [replace(c, around=host, seconds=host + (10e-6 if c.flush == 16 else 11e-6)) for c in found.candidates]
    order = choose_module._order(replace(found, candidates=tuple(fast)))
    assert found.candidates[order[0]].flush == 16


def test_a_step_without_rows_costs_the_host_less() -> None:
    """Of kernels that take as long the one without rows is taken."""
    found = explain_choice(lifted(lanes=(1, 4)), Options(), TIMED, "cpp")[1]
    around = {c.flush: c.around for c in found.candidates}
    assert around[1] < 0.7 * around[16] == 0.7 * around[2]
    alike = tuple(replace(c, seconds=c.around + 10e-6) for c in found.candidates)
    assert found.candidates[choose_module._order(replace(found, candidates=alike))[0]].flush == 1


def test_a_busy_machine_must_promise_more() -> None:
    """What was measured beside others says little of small differences; the reason says so."""
    state = lifted(lanes=(1, 14))
    prediction = explain_choice(state, Options(), TIMED, "cpp")[1]
    gain = max(c.gain for c in prediction.candidates)
    assert prediction.needed < gain < 2 * prediction.needed and prediction.chosen is not None, gain
    busy = replace(TIMED, spread=0.9)
    declined = choose(state, Options(), busy, "cpp")
    assert isinstance(declined, Declined) and "2.2x is needed (this machine was measured while it was busy" in str(
        declined
    )
    assert planned(choose(state, Options(flush=16), busy, "cpp")).flush == 16


def test_measured_times_are_believed() -> None:
    times = {1: 9e-3, 8: 1e-3, 16: 2e-3}
    plan, prediction = explain_choice(lifted(), Options(), TIMED, "cpp", times=times)
    assert planned(plan).flush == 8
    assert {c.flush: c.measured for c in prediction.candidates} == times


def test_what_a_call_touches() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.weight = torch.nn.Embedding(1000, 8), torch.nn.Linear(8, 8, bias=False)

        def forward(self, token: torch.Tensor, unused: torch.Tensor) -> torch.Tensor:
            return self.weight(self.table(token))

    gm = make_fx(Model(), tracing_mode="fake", _allow_non_fake_inputs=True)(torch.tensor([3, 4]), torch.ones(1000))
    seen = call_of(gm, 3)
    assert seen.states == 3
    assert seen.bytes == 2 * 8 + 2 * 8 * 4 + 8 * 8 * 4  # the tokens, two rows of the table, the weight


def test_the_flush_length_of_the_field_is_chosen() -> None:
    """bf16 rows under a float32 state: 16 with a sequence of keys and values taken as they are."""
    plan = planned(choose(lifted(GLA, operand=torch.bfloat16), Options(row_dtype=torch.bfloat16), CPU, "cpp"))
    assert plan.variant == "buffered" and plan.flush in (8, 12, 16)
    delta = planned(choose(lifted(operand=torch.bfloat16), Options(row_dtype=torch.bfloat16), CPU, "cpp"))
    assert delta.flush in (8, 12, 16)


@pytest.mark.parametrize("target", ["aten", "cpp"])
def test_a_tiny_state_is_declined_with_numbers(target: str) -> None:
    found = choose(lifted(lanes=(1, 4), sizes=(32, 32)), Options(), CPU, target)
    assert isinstance(found, Declined)
    assert (found.node, found.rule, found.source) == ("state", "no-gain", "model.py:7")
    assert " a step" in found.reason and "0.0164 MB" in found.reason and "L* =" in found.reason


@pytest.mark.parametrize("batch", [1, 64])
def test_a_gpu_gets_the_recurrent_kernel_where_nothing_was_timed(batch: int) -> None:
    """Measured on an H100: 1.2 to 3.1 times Inductor at every batch size; an integer flush is obeyed all the same."""
    assert planned(choose(lifted(lanes=(batch, 32)), Options(), H100, "triton")).variant == "recurrent"
    asked = planned(choose(lifted(lanes=(batch, 32)), Options(flush=16), H100, "triton"))
    assert (asked.variant, asked.flush) == ("buffered", 16)


def test_a_gpu_buffers_what_was_timed_to_be_faster() -> None:
    large = lifted(lanes=(128, 32))
    flush = likely_flush(large, Options(), H100, "triton")
    faster, prediction = explain_choice(large, Options(), H100, "triton", times={1: 190e-6, flush: 120e-6})
    assert (planned(faster).variant, planned(faster).flush) == ("buffered", flush)
    launch = predict.KERNEL_LAUNCHES.get("cuda", 1.0) * H100.launch
    assert [c.seconds for c in prediction.candidates] == pytest.approx([190e-6 + launch, 120e-6 + launch])
    equal = choose(large, Options(), H100, "triton", times={1: 190e-6, flush: 186e-6})
    assert planned(equal).variant == "recurrent"
    both_slow = choose(large, Options(), H100, "triton", times={1: 1.0, flush: 1.0})
    assert isinstance(both_slow, Declined) and both_slow.rule == "no-gain"


@pytest.mark.parametrize("target", ["triton", "cpp"])
def test_several_tokens_take_the_flush_length_of_one(target: str) -> None:
    """Or their rows would have to be folded in whenever one graph follows the other."""
    one, several = (lifted(lanes=(128, 32), tokens=n) for n in (1, 4))
    device = H100 if target == "triton" else READS
    flush = planned(choose(several, Options(), device, target)).flush
    assert flush == likely_flush(one, Options(), device, target)
    times = {1: 1.0, flush: 1e-6} if target == "triton" else None
    assert planned(choose(one, Options(), device, target, times=times)).flush == flush


def test_composite_steps_pay_off_only_for_large_states_on_a_cpu() -> None:
    large = planned(choose(lifted(), Options(), CPU, "aten"))
    assert large.variant == "buffered"
    for lanes in [(1, 16), (4, 16)]:  # measured: 0.9 ms against 0.15 ms, 1.5 against 0.8
        assert isinstance(choose(lifted(lanes=lanes), Options(), CPU, "aten"), Declined)
    assert isinstance(choose(lifted(lanes=(128, 32)), Options(), H100, "aten"), Declined)  # flushes at every step


def test_composite_predictions_stay_near_the_measurements() -> None:
    """Milliseconds of buffered composite steps (L = 8, then 16), one busy core at 12 GB/s; within a factor of 2."""
    measured = {(8, 32): (4.9, 7.4), (32, 32): (27.6, 50.7), (4, 16): (1.5, 1.8)}
    for lanes, times in measured.items():
        _, prediction = explain_choice(lifted(lanes=lanes), Options(), CPU, "aten")
        at = {c.flush: c.seconds * 1e3 for c in prediction.candidates}
        for flush, expected in zip((8, 16), times, strict=True):
            assert expected / 2 < at[flush] < expected * 2, (lanes, flush)


def test_kernel_predictions_stay_near_the_measurements() -> None:
    """A generated C++ step on an idle CPU (read floor 0.93 ms) took 1.53 to 1.66 ms, the mean over L = 16."""
    idle = machine("idle", "cpu", 72e9, 170e9, 2 << 20, 1.5e-6, 146e9)
    _, prediction = explain_choice(lifted(), Options(), idle, "cpp")
    at = {c.flush: c.seconds for c in prediction.candidates}
    assert 1.3e-3 < at[16] < 2.0e-3


def test_composite_steps_work_on_the_whole_capacity() -> None:
    """With 64 slots in any case, rows cost the same at every L: on a CPU only the flush becomes rarer, on a GPU it is
    computed at every step."""
    bytes_at = {}
    for device in (CPU, H100):
        _, prediction = explain_choice(lifted(), Options(capacity=64), device, "aten")
        bytes_at[device.device] = [c.bytes for c in prediction.candidates if c.variant == "buffered"]
    assert bytes_at["cpu"] == sorted(bytes_at["cpu"], reverse=True) and bytes_at["cpu"][0] > bytes_at["cpu"][-1]
    assert len(set(bytes_at["cuda"])) == 1


def test_composite_steps_copy_states_of_another_dtype() -> None:
    """bf16 states are half the bytes, but are copied to float32 at every step: 1 + 4 passes over them."""
    _, narrow = explain_choice(lifted(state=torch.bfloat16), Options(flush=2), CPU, "aten")
    _, wide = explain_choice(lifted(), Options(flush=2), CPU, "aten")
    assert narrow.choice is not None and wide.choice is not None
    assert narrow.choice.bytes > 0.9 * wide.choice.bytes


def test_a_contiguous_read_makes_inductor_faster() -> None:
    """Mamba-2 keeps the key axis innermost: its reads are contiguous, and buffering must win against less."""
    strided = explain_choice(lifted(GLA), Options(), CPU, "cpp")[1]
    contiguous = explain_choice(lifted(GLA, transposed=True), Options(), CPU, "cpp")[1]
    assert contiguous.plain.seconds < strided.plain.seconds


@pytest.mark.parametrize(("flush", "variant"), [(1, "recurrent"), (2, "buffered"), (7, "buffered"), (100, "buffered")])
@pytest.mark.parametrize("lanes", [(1, 4), (32, 32)])
def test_an_integer_is_obeyed(flush: int, variant: str, lanes: tuple[int, int]) -> None:
    plan, prediction = explain_choice(lifted(lanes=lanes), Options(flush=flush), CPU, "aten")
    plan = planned(plan)
    assert (plan.variant, plan.flush, plan.capacity) == (variant, flush, flush)
    assert f"flush={flush} as asked" in plan.why
    assert prediction.choice is not None and prediction.choice.flush == flush


def test_capacity_is_at_least_the_flush_length() -> None:
    assert planned(choose(lifted(), Options(flush=4, capacity=20), CPU, "cpp")).capacity == 20
    assert planned(choose(lifted(), Options(flush=16, capacity=5), CPU, "cpp")).capacity == 16


def test_candidates_are_complete_and_ordered() -> None:
    _, prediction = explain_choice(lifted(), Options(), CPU, "cpp")
    assert [c.flush for c in prediction.candidates] == [1, 2, 4, 8, 12, 16, 24, 32, 48, 64]
    assert [c.variant for c in prediction.candidates] == ["recurrent"] + ["buffered"] * 9
    assert all(c.gain == pytest.approx(prediction.plain.seconds / c.seconds) for c in prediction.candidates)
    assert prediction.state_bytes == 32 * 32 * 128 * 128 * 4
    assert prediction.slot_bytes == 32 * 32 * (4 + 4 * 256)


def test_why_is_one_line_with_formula_and_numbers() -> None:
    why = planned(choose(lifted(), Options(), CPU, "cpp")).why
    assert "\n" not in why
    assert "L* = sqrt(2*s*K*V/slot) = sqrt(2*4*128*128/1028) = 11.3" in why and "67.1 MB" in why


def test_equal_layers_get_equal_plans_quickly() -> None:
    first = planned(choose(lifted(), Options(), CPU, "cpp"))
    start = time.perf_counter()
    others = [planned(choose(lifted(), Options(), CPU, "cpp")) for _ in range(10)]
    assert all(plan == first and plan.op_name == first.op_name for plan in others)
    assert time.perf_counter() - start < 1.0


def test_a_symbolic_batch_goes_by_its_hint_and_adds_no_guard() -> None:
    env = ShapeEnv()
    fake = FakeTensorMode(shape_env=env)
    state = fake.from_tensor(torch.empty(6, 4, 8, 8), static_shapes=False)
    guards = len(env.guards)
    assert lane_sizes(Layout(((None,), (2, None), (8,), (8,)), (0, 1, 2, 3, 4)), state) == (6, 2, 2)
    assert len(env.guards) == guards


# ------------------------------------------------------------------------------------------------- dtypes


def test_gates_are_never_rounded() -> None:
    for options in (Options(), Options(row_dtype=torch.bfloat16)):
        by_name = dict(zip("gku", row_dtypes(lifted(operand=torch.bfloat16), options, torch.float32), strict=True))
        assert by_name["g"] == torch.float32
        assert by_name["k"] == torch.bfloat16
    key_gates = row_dtypes(lifted(GLA, operand=torch.bfloat16), Options(), torch.float32)
    assert key_gates == (torch.float32, torch.bfloat16, torch.bfloat16)


@pytest.mark.parametrize(
    ("state", "computed"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float8_e5m2, torch.bfloat16)],
)
def test_computed_rows_follow_the_state(state: torch.dtype, computed: torch.dtype) -> None:
    assert row_dtypes(lifted(state=state), Options(), torch.float32)[2] == computed


def test_double_states_compute_in_double() -> None:
    plan = planned(choose(lifted(state=torch.float64, operand=torch.float64), Options(flush=4), CPU, "aten"))
    assert plan.compute == torch.float64
    assert set(plan.row_dtypes) == {torch.float64}


def cast_chain(*dtypes: torch.dtype) -> Node:
    """A placeholder of the first dtype, cast to each of the others in turn, with views between."""
    graph, fake = Graph(), FakeTensorMode()
    with fake:
        node = placeholder(graph, "x", torch.empty(2, 4, dtype=dtypes[0]))
        for dtype in dtypes[1:]:
            view = graph.call_function(aten.unsqueeze.default, (node, 0))
            view.meta["val"] = node.meta["val"].unsqueeze(0)
            node = graph.call_function(aten._to_copy.default, (view,), {"dtype": dtype})
            node.meta["val"] = view.meta["val"].to(dtype)
    return node


BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


@pytest.mark.parametrize(
    ("chain", "expected"),
    [
        ((F32,), F32),
        ((BF16, F32), BF16),  # a widening cast: the narrow values are all there is
        ((F16, F32, F64), F16),
        ((F32, BF16, F32), BF16),  # rounded on the way: bf16 holds what is left
        ((F16, BF16), BF16),  # not exact: keep what the graph computes
        ((F64,), F32),  # more than the arithmetic keeps
        ((torch.int32, F32), F32),
    ],
)
def test_the_narrowest_exact_dtype(chain: tuple[torch.dtype, ...], expected: torch.dtype) -> None:
    assert exact_dtype(cast_chain(*chain), torch.float32) == expected


def test_arithmetic_ends_the_walk() -> None:
    node = cast_chain(BF16, F32)
    scaled = node.graph.call_function(aten.mul.Tensor, (node, 0.5))
    scaled.meta["val"] = node.meta["val"]
    assert exact_dtype(scaled, torch.float32) == F32


def test_holds() -> None:
    assert holds(F32, BF16) and holds(F32, F16) and holds(F64, F32) and holds(BF16, BF16)
    assert not holds(BF16, F16) and not holds(F16, BF16) and not holds(F32, torch.int32)


def test_predictions_print() -> None:
    _, prediction = explain_choice(lifted(), Options(), CPU, "cpp")
    assert isinstance(prediction, Prediction)
    assert "GB/s" in str(prediction.machine)
