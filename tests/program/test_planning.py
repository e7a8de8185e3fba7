"""Plans that are measured, and what is said of those that lose."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import kvbuffer_compile
from kvbuffer_compile import planning
from kvbuffer_compile.backend import observers
from kvbuffer_compile.codegen import build
from kvbuffer_compile.ir.plan import Plan
from kvbuffer_compile.machine import machine_for
from kvbuffer_compile.options import Options
from kvbuffer_compile.passes.choice import predict
from kvbuffer_compile.passes.lifted import ALONE
from kvbuffer_compile.process import disk
from kvbuffer_compile.records import GraphRecord
from kvbuffer_compile.steps import trial
from kvbuffer_compile.steps.ops import tickets_of
from kvbuffer_compile.steps.timing import filled
from tests.support.machines import H100
from tests.support.programs import NAMED
from tests.support.sessions import make_plan

needs_compiler = pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler")
SHAPE = (4, 8, 64, 64)


def step(state: Tensor, q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    """Linear attention with a gate for each head (Mamba-2)."""
    state.mul_(gate[..., None, None]).add_(k[..., None] * v[..., None, :])
    return (q[..., None] * state).sum(-2)


def operands() -> list[Tensor]:
    return [torch.rand(SHAPE[:-1]) for _ in range(3)] + [torch.rand(SHAPE[:2])]


def compiled_plan(**options: object) -> Plan:
    """The plan that a step of a fresh state gets."""
    records: list[GraphRecord] = []
    torch._dynamo.reset()
    run = torch.compile(step, backend="kvbuffer", options={"inner": "eager", **options})
    state, twin, given = torch.rand(SHAPE), torch.rand(SHAPE), operands()
    twin.copy_(state)
    with observers.also(records.append), torch.no_grad():
        torch.testing.assert_close(run(state, *given), step(twin, *given))
    torch.testing.assert_close(state, twin)
    (plan,) = [plan for record in records for _, plan in record.rewritten]
    return plan


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """The best candidate is taken even where Inductor is predicted to be faster."""
    monkeypatch.setattr(predict, "MIN_GAIN_KERNEL", 0.0)


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))


@needs_compiler
@pytest.mark.parametrize("best", [1, 8])
def test_the_fastest_in_a_measurement_is_taken(eager: None, best: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def measured(plan: Plan, *given: object) -> float:
        seen.append(plan.flush)
        return 1e-7 if plan.flush == best else 1e-4

    monkeypatch.setattr(trial, "_measured", measured)
    monkeypatch.setattr(trial, "_kept", lambda name: None)
    assert compiled_plan(tune=True).flush == best
    assert tuple(seen) == planning.TIMED


@needs_compiler
def test_what_was_measured_is_kept(eager: None, own_cache: None, monkeypatch: pytest.MonkeyPatch) -> None:
    first = compiled_plan(tune=True)
    files = [p for p in disk.folder().iterdir() if p.name.startswith("step-")]
    assert len(files) == len(planning.TIMED)
    assert all(0 < json.loads(p.read_text())["seconds"] < 1 for p in files)
    monkeypatch.setattr(trial, "_measured", lambda *given: pytest.fail("measured again"))
    assert compiled_plan(tune=True) == first
    files[0].write_text("nonsense")
    monkeypatch.setattr(trial, "_measured", lambda *given: 1e-9)
    compiled_plan(tune=True)
    assert json.loads(files[0].read_text())["seconds"] == 1e-9


@needs_compiler
def test_a_report_shows_what_was_measured(eager: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(trial, "_measured", lambda plan, *given: 1e-6 * plan.flush)
    monkeypatch.setattr(trial, "_kept", lambda name: None)
    with torch.no_grad():
        report = kvbuffer_compile.explain(step, torch.rand(SHAPE), *operands(), options={"tune": True})
    (state,) = report.states
    assert state.prediction is not None
    assert [c.measured for c in state.prediction.candidates] == [1e-6 * n for n in planning.TIMED]
    assert "measured at 1 us" in str(report) and "one call touches" in str(report)
    report.to_html(tmp_path / "report.html")
    assert "recurrent (measured)" in (tmp_path / "report.html").read_text()


@needs_compiler
def test_max_autotune_measures_too(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(planning, "timed", lambda *given: asked.append(True) or {})
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(step, backend="kvbuffer", mode="max-autotune-no-cudagraphs")(torch.rand(SHAPE), *operands())
    assert asked


def one_state(*, several: bool = False, slots: bool = False) -> tuple[Any, ...]:
    """What `timed` is asked about a state on a GPU: this machine has none, so nothing is made or run there."""
    node = SimpleNamespace(meta={"val": torch.empty(3, dtype=torch.int32)})
    return SimpleNamespace(several=several, slots=node if slots else None), Options(), H100, "triton", ALONE


def test_on_a_gpu_nothing_is_buffered_that_was_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, ...]] = []
    monkeypatch.setattr(planning, "likely_flush", lambda *given: 16)
    monkeypatch.setattr(planning, "state_tensor", lambda found: torch.empty(64, 2, 4, 4))
    monkeypatch.setattr(planning, "plans_of", lambda *given: asked.append(given[4]) or [])
    monkeypatch.setattr(trial, "times", lambda *given: {1: 2e-4, 16: 1e-4})
    monkeypatch.delenv("KVBUFFER_TUNE", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert planning.timed(*one_state()) == {1: 2e-4, 16: 1e-4} and asked == [(1, 16)]
    with monkeypatch.context() as patch:
        patch.setattr(trial, "times", lambda *given: {16: 1e-4})
        assert planning.timed(*one_state()) == {}, "there is nothing to compare it with"
    assert planning.timed(*one_state(several=True)) == {}
    found, _, *rest = one_state()
    assert planning.timed(found, Options(flush=8), *rest) == {}
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # its times tell nothing of a GPU
    assert planning.timed(*one_state()) == {}
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setenv("KVBUFFER_TUNE", "0")
    assert planning.timed(*one_state()) == {} and len(asked) == 2


def test_on_a_gpu_pools_are_timed_with_as_many_slots_as_a_call_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, ...]] = []
    monkeypatch.setattr(planning, "likely_flush", lambda *given: 16)
    monkeypatch.setattr(planning, "state_tensor", lambda found: torch.empty(64, 2, 4, 4))
    monkeypatch.setattr(planning, "plans_of", lambda *given: [])
    monkeypatch.setattr(trial, "times", lambda plans, state, *_: shapes.append(state.shape) or {1: 2e-4, 16: 1e-4})
    monkeypatch.delenv("KVBUFFER_TUNE", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert planning.timed(*one_state(slots=True)) == {1: 2e-4, 16: 1e-4}
    assert planning.timed(*one_state()) and shapes == [(3, 2, 4, 4), (64, 2, 4, 4)]
    found, _, machine, _, call = one_state(slots=True)
    assert planning.timed(found, Options(tune=True), machine, "cpp", call) == {}


@needs_compiler
def test_steps_that_cannot_be_timed_are_no_candidates(own_cache: None, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = trial._measured

    def scarce(plan: Plan, *given: Any) -> float:
        if plan.flush > 4:
            raise torch.OutOfMemoryError("no memory left on the device")
        return measured(plan, *given)

    monkeypatch.setattr(trial, "_measured", scarce)
    monkeypatch.setattr(predict, "MIN_GAIN_KERNEL", 0.0)
    assert compiled_plan(tune=True).flush in (1, 4)


@needs_compiler
def test_a_large_state_is_timed_in_part(own_cache: None, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, machine = compiled_plan(flush=4), machine_for("cpu")
    whole = trial._measured(plan, SHAPE[:2], 1, machine, torch.device("cpu"))
    made: list[tuple[int, ...]] = []
    arguments = trial._arguments
    monkeypatch.setattr(trial, "_arguments", lambda p, lanes, *given: made.append(lanes) or arguments(p, lanes, *given))
    monkeypatch.setattr(trial, "LARGEST", 8 * 64 * 64 * 4 * 2)
    part = trial._measured(plan, SHAPE[:2], 1, machine, torch.device("cpu"))
    assert made == [(2, 8)] and whole / 10 < part < whole * 10  # twice what was timed; a busy machine adds to either


def test_timed_cursors_have_tickets_behind_them() -> None:
    """Triton kernels count with what lies behind a cursor in its storage."""
    plan = make_plan(NAMED["gdn"], flush=16)
    _, cursor, _, _ = filled(plan, (2, 3))
    assert tickets_of(cursor).shape[0] == 2 and tickets_of(cursor).shape[1] > 0
    assert cursor[1].tolist() == [16, 16] and int(tickets_of(cursor).abs().sum()) == 0


def test_a_flush_length_that_loses_is_warned_of_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "_told_of_loss", False)
    with pytest.warns(UserWarning, match=r"flush=16 is predicted to take .* a step, Inductor alone"):
        assert compiled_plan(flush=16, target="aten").flush == 16
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled_plan(flush=16, target="aten")


def test_room_for_drafts_is_not_asked_for_to_gain_by_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """enable_speculation chooses a flush length and room itself: a warning of flush=16 is of nothing the user asked."""
    monkeypatch.setattr(planning, "_told_of_loss", False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert compiled_plan(flush=16, capacity=20, target="aten").flush == 16


def test_auto_warns_of_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "_told_of_loss", False)
    torch._dynamo.reset()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        torch.compile(step, backend="kvbuffer", options={"inner": "eager", "target": "aten"})(
            torch.rand(SHAPE), *operands()
        )
