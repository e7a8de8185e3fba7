"""Launches that are measured once and kept on disk, with timers that need no GPU."""

from __future__ import annotations

import json
import math
import multiprocessing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from kvbuffer_compile.codegen.example import example, typical_lanes
from kvbuffer_compile.codegen.schedule import schedule
from kvbuffer_compile.codegen.standalone import aot
from kvbuffer_compile.codegen.triton import load as triton_load
from kvbuffer_compile.codegen.triton import triton, tune
from kvbuffer_compile.codegen.triton.launch import configure, fits, held, space
from kvbuffer_compile.errors import EmitError
from kvbuffer_compile.ir.plan import Layout
from kvbuffer_compile.process import disk
from kvbuffer_compile.steps import ops
from tests.kernels.test_triton import make_plan
from tests.support.programs import NAMED


def plan_of(variant: str = "buffered", name: str = "gdn"):
    layout = Layout(((None,), (32,), (128,), (128,)), (0, 1, 2, 3))
    return make_plan(NAMED[name], variant, 16, 24, sizes=(128, 128), layout=layout)


def model(plan):
    return configure(plan, schedule(plan.program, in_place=plan.variant != "buffered"))


class Timer:
    """Says that launches with `warps` warps are fast, and counts what it was asked."""

    def __init__(self, warps: int = 4) -> None:
        self.warps, self.asked = warps, 0

    def __call__(self, plan, config) -> float:
        self.asked += 1
        return 1.0 if config.warps == self.warps else 2.0


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("KVBUFFER_TUNE", raising=False)
    return disk.folder()


@pytest.mark.parametrize("variant", ["recurrent", "buffered", "verify"])
@pytest.mark.parametrize("name", ["gdn", "kda", "oja"])
def test_the_space_is_small_and_begins_with_the_model(name, variant):
    plan = plan_of(variant, name)
    order = schedule(plan.program, in_place=variant != "buffered")
    found = space(plan, order)
    assert found[0] == configure(plan, order) and len(found) == len(set(found)) <= 36
    assert all(fits(plan, order, config) for config in found[1:])
    assert all(config.fold <= config.block for config in found)


def test_a_launch_is_measured_once(cache):
    timer = Timer()
    first = tune.tuned(plan_of(), "some GPU", timer)
    assert first.warps == 4 and timer.asked > 1
    asked = timer.asked
    assert tune.tuned(plan_of(), "some GPU", timer) == first and timer.asked == asked
    tune.tuned(plan_of(), "another GPU", timer)
    assert timer.asked == 2 * asked
    assert {p.suffix for p in cache.iterdir()} == {".json"}, "no temporary files stay behind"


@pytest.mark.parametrize(
    "content", ["", "{}", "[1]", "[" * 100_000, '{"best": {"block": 7, "warps": 3}}', '{"best": {"tile": 1}}']
)
def test_a_broken_entry_is_ignored_and_rewritten(cache, content):
    best = tune.tuned(plan_of(), "some GPU", Timer())
    (path,) = cache.iterdir()
    whole = path.read_text()
    path.write_text(content)
    timer = Timer()
    assert tune.tuned(plan_of(), "some GPU", timer) == best and timer.asked
    assert path.read_text() == whole


def test_a_launch_that_cannot_run_is_never_chosen(cache):
    plan = plan_of()
    with pytest.raises(EmitError, match="no launch of its Triton kernel runs on some GPU"):
        tune.tuned(plan, "some GPU", lambda plan, config: math.inf)
    assert not list(cache.iterdir()), "what failed everywhere is tried again"
    default = model(plan)
    best = tune.tuned(plan, "some GPU", lambda plan, config: math.inf if config == default else 1.0)
    assert best != default


def test_the_models_own_launch_is_left_for_a_gain_only():
    plan, default = plan_of(), model(plan_of())
    assert tune.tuned(plan, "one GPU", lambda plan, config: 1.02 if config == default else 1.0) == default
    assert tune.tuned(plan, "another GPU", lambda plan, config: 1.1 if config == default else 1.0) != default


def test_measuring_can_be_turned_off(monkeypatch):
    monkeypatch.setenv("KVBUFFER_TUNE", "0")
    timer = Timer()
    assert tune.tuned(plan_of(), "some GPU", timer) == model(plan_of()) and not timer.asked


def test_a_cache_that_cannot_be_written_is_no_error(cache, monkeypatch):
    monkeypatch.setattr(disk, "_told", set())
    cache.rmdir()
    cache.write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="is a link or a file"):
        assert tune.tuned(plan_of(), "some GPU", Timer()).warps == 4


def _tune(warps: int, ready, found) -> None:
    ready.wait()
    for _ in range(20):
        found.put(tune.tuned(plan_of(), "some GPU", Timer(warps)).warps)
        for path in disk.folder().glob("launch_*.json"):
            path.unlink(missing_ok=True)


def test_processes_may_tune_at_once(cache):
    context = multiprocessing.get_context("fork")
    ready, found = context.Barrier(2), context.Queue()
    workers = [context.Process(target=_tune, args=(warps, ready, found)) for warps in (2, 4)]
    for worker in workers:
        worker.start()
    answers = {found.get(timeout=60) for _ in range(40)}
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert answers <= {2, 4}
    for path in cache.glob("launch_*.json"):
        json.loads(path.read_text())


def test_the_op_is_launched_as_was_found_best(monkeypatch):
    plan, sources = plan_of(name="kda"), []

    def load(source, interpret):
        sources.append(source)
        return SimpleNamespace(launch=None)

    monkeypatch.setattr(triton_load, "load", load)
    monkeypatch.setattr(tune, "on_gpu", Timer(warps=8))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "some GPU")
    ops.use_triton(plan)
    assert "warps=8," in sources[-1].split("def launch(")[1].splitlines()[0]


@pytest.mark.parametrize(
    ("name", "form", "most"), [("gdn", held, 168), ("gdn", configure, None), ("kda", configure, 255)]
)
def test_registers_are_asked_for_where_ptxas_would_spill(name, form, most, monkeypatch):
    """For matrix products, no more than a multiprocessor has; AMD's compiler knows no such option."""
    verify = plan_of("verify", name)
    config = form(verify, schedule(verify.program, in_place=True))

    def asked(plan, config):
        return aot.launched(triton_load.load(triton.emit(plan, config)), plan, (2, 32), 4)[1].get("maxnreg")

    assert asked(verify, config) == most
    assert asked(verify, replace(config, warps=16)) == (most and 128)
    for plan in (plan_of("buffered", name), verify):
        assert asked(plan, replace(model(plan), registers=0)) is None
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert asked(verify, config) is None


def test_arguments_to_time_a_launch_with():
    plan = plan_of("verify")
    lanes = typical_lanes(plan, tune.LANES)
    assert lanes == (32, 32)
    state, cursor, tickets, rows, operands = example(plan, lanes, 4, "meta")
    assert state.shape == (32, 32, 128, 128) and cursor.shape == (4, 32) and len(tickets) == 32
    assert [r.shape[2] for r in rows] == [24] * 3 and all(x.shape[2] == 4 for x in operands)
