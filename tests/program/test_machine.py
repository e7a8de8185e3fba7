"""What is known about a device: measured, kept, measured again where what was kept cannot be true."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from kvbuffer_compile.codegen import build
from kvbuffer_compile.machine import Machine, Speed, keep, load, machine_for, measured_again, stored
from kvbuffer_compile.machine import measure as measuring
from kvbuffer_compile.machine.measure import measure, sizes
from kvbuffer_compile.machine.numbers import MOST_FORK, Kernels
from kvbuffer_compile.process import disk
from kvbuffer_compile.steps import timing
from tests.support.machines import CPU

needs_compiler = pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler")
KERNELS = Kernels(
    call=3e-6, rows_call=4e-6, fork=0.0, lane=5e-8, rate=3e10, read_lane=6e-8, read=2e10, row=3e-9, walk=1e10,
    gather=1e-10, pack=1e-8, fold=6e10, bfloat16=1e-10, narrow_read=1e-10, narrow_row=3e-9,
    narrow_walk=1e10, exposed=0.25,
)  # fmt: skip
TIMED = replace(CPU, kernels=KERNELS)


def test_measuring_a_cpu_is_quick_and_sane() -> None:
    threads = torch.get_num_threads()
    start = time.perf_counter()
    found = measure(torch.device("cpu"), "here")
    assert time.perf_counter() - start < 10.0  # 0.5 s on an idle machine, three times as long on a busy one
    assert all(1e8 < speed < 1e13 for s in found.speeds for speed in (s.read, s.copy, s.update))
    assert 1e-8 < found.launch < 1e-2 and found.cache >= 1 << 16 and found.last >= found.cache
    assert found.threads == threads == torch.get_num_threads()
    assert found.measured and found.spread >= 0


def test_measuring_under_fake_tensors_measures_real_ones() -> None:
    with FakeTensorMode():
        assert measure(torch.device("cpu"), "here").bandwidth < 1e13


def test_sizes_reach_beyond_the_last_level_of_cache() -> None:
    found = sizes(torch.device("cpu"), 1 << 20, 8 << 20)
    assert found == sorted(found) and found[0] < 1 << 20 and found[-1] == 32 << 20


@pytest.mark.parametrize("spreads", [[0.1], [0.9, 0.1], [0.9, 0.8, 0.7]])
def test_a_busy_machine_is_measured_again(spreads: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    runs = iter([replace(CPU, spread=x) for x in spreads])
    monkeypatch.setattr(measuring, "_measured", lambda device, name: next(runs))
    measure(torch.device("cpu"), "here")
    assert next(runs, None) is None


def test_a_cache_that_is_slower_than_memory_was_measured_while_others_ran() -> None:
    """Each size on its own may look quiet, when all of its few copies were held up alike."""
    copies = [79.2e9, 0.0749e9, 0.6e9, 1.36e9, 2.37e9]
    seen = replace(CPU, speeds=tuple(Speed(1 << n, c, c, c) for n, c in enumerate(copies, 19)), spread=0.12)
    assert seen.busy and 30 < seen.inverted < 33 and "--remeasure" in seen.advice and "--remeasure" in str(seen)
    right = replace(seen, speeds=seen.speeds[:1] + seen.speeds[-1:])
    assert not right.busy and right.inverted < 1 and not right.advice
    assert not replace(seen, device="cuda").busy  # where a small copy is a launch
    rows = [replace(s, kernel_rows=rate) for s, rate in zip(right.speeds, (0.24e9, 4.3e9), strict=True)]
    assert replace(right, speeds=tuple(rows)).busy  # of any kind of traffic


def test_threads_that_waited_for_each_other_were_held_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread whose processor another program holds comes milliseconds late: no such time is believed."""
    took = iter([4e-3, 2e-5])
    monkeypatch.setattr(timing, "_best", lambda step: next(took))
    monkeypatch.setattr(timing, "_step", lambda plan, lanes: None)
    plans = SimpleNamespace(changing={timing.SMALL: None})
    fork = timing._fork(plans, KERNELS, 2)  # type: ignore[arg-type]
    assert fork == MOST_FORK
    assert replace(CPU, kernels=replace(KERNELS, fork=fork)).busy and not TIMED.busy


def test_of_busy_measurements_a_quiet_one_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = replace(CPU, speeds=(replace(CPU.speeds[0], copy=1e9), CPU.speeds[1]), spread=0.0)
    runs = iter([slow, replace(CPU, spread=0.2)])
    monkeypatch.setattr(measuring, "_measured", lambda device, name: next(runs))
    assert measure(torch.device("cpu"), "here").spread == 0.2


def test_speeds_change_gradually_with_what_is_touched() -> None:
    machine = replace(CPU, speeds=(Speed(1 << 20, 8e10, 8e10, 8e10), Speed(1 << 24, 1e10, 1e10, 2e10, kernel_read=5e9)))
    seen = [machine.speed("copy", 1 << n) for n in range(18, 28)]
    assert seen == sorted(seen, reverse=True) and seen[0] == 8e10 and seen[-1] == 1e10
    assert 1e10 < machine.speed("copy", 1 << 22) < 8e10
    assert machine.speed("kernel_read", 1 << 25) == 5e9
    assert machine.speed("kernel_update", 1 << 25) == 2e10  # not timed: what the same traffic takes without arithmetic


def test_what_is_nearer_is_not_much_slower() -> None:
    """As it was measured on two busy cores: 2 MiB at 0.26 GB/s, 128 at 11."""
    sizes, copies = (1 << 19, 1 << 21, 1 << 24, 1 << 25, 1 << 27), (80.9e9, 0.26e9, 2.11e9, 4.23e9, 11.1e9)
    found = replace(CPU, speeds=tuple(Speed(n, c, c, c) for n, c in zip(sizes, copies, strict=True)))
    assert found.busy and all(found.speed("copy", n) >= 11.1e9 for n in sizes)
    some = replace(
        CPU, speeds=(Speed(1 << 19, 9e9, 9e9, 9e9), Speed(1 << 21, 3e9, 3e9, 3e9), Speed(1 << 27, 8e9, 8e9, 8e9))
    )
    assert not some.busy
    assert [some.speed("read", n) for n in (1 << 19, 1 << 21, 1 << 27)] == pytest.approx([9e9, 4e9, 8e9])


@pytest.mark.parametrize(("load", "again"), [(1.0, True), (3.0, False)])
def test_a_machine_that_was_busy_is_measured_again_when_it_is_not(
    file: Path, monkeypatch: pytest.MonkeyPatch, load: float, again: bool
) -> None:
    machine = replace(CPU, name=stored._name(torch.device("cpu")), spread=0.9, load=4.0)
    stored.store(machine, file)
    monkeypatch.setattr(stored, "load_average", lambda: load)
    assert (machine_for("cpu") != machine) is again


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache folder and a machine that is never measured; gives the file of the CPU."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(stored, "measure", lambda device, name: replace(CPU, name=name))
    monkeypatch.setattr(stored, "probe", lambda machine: 1.0)
    monkeypatch.setattr(stored, "_machines", {})
    yield stored.machine_path(torch.device("cpu"), stored._name(torch.device("cpu")))


def test_a_machine_is_kept_on_disk(file: Path, tmp_path: Path) -> None:
    assert disk.folder() == file.parent == tmp_path / "kvbuffer"
    found = machine_for("cpu")
    assert load(file) == found
    assert [p.name for p in file.parent.iterdir()] == [file.name]  # no temporary left
    other = replace(found, launch=1.0)
    stored.store(other, file)
    stored._machines.clear()
    assert machine_for("cpu") == other


def test_what_is_kept_counts_at_once(file: Path) -> None:
    timed = replace(machine_for("cpu"), kernels=TIMED.kernels)
    keep(timed)
    assert machine_for("cpu") == timed == load(file)
    assert measured_again("cpu").kernels is None and machine_for("cpu").kernels is None


@pytest.mark.parametrize(("seen", "again"), [(0.6, False), (1.9, False), (2.5, True), (0.2, True)])
def test_a_file_that_a_quick_look_contradicts_is_measured_again(
    file: Path, monkeypatch: pytest.MonkeyPatch, seen: float, again: bool
) -> None:
    machine = replace(CPU, name=stored._name(torch.device("cpu")), launch=1.0)
    stored.store(machine, file)
    monkeypatch.setattr(stored, "probe", lambda machine: seen)
    assert (machine_for("cpu") != machine) is again


def test_a_look_on_a_busy_machine_is_taken_again(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = replace(CPU, name=stored._name(torch.device("cpu")), launch=1.0)
    stored.store(machine, file)
    looks = iter([0.1, 0.2, 0.9, 0.3])
    monkeypatch.setattr(stored, "probe", lambda machine: next(looks))
    assert machine_for("cpu") == machine


def test_a_quick_look_at_this_machine_agrees_with_a_long_one() -> None:
    assert 0.05 < measuring.probe(measure(torch.device("cpu"), "here")) < 20  # others may use it meanwhile


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", json.dumps({"name": "x"}), "null"])
def test_a_broken_file_is_measured_again(file: Path, text: str) -> None:
    file.write_text(text)
    assert machine_for("cpu").speeds == CPU.speeds
    assert load(file) is not None


NONSENSE = ("x", "1e10", None, True, [1.0], {}, float("nan"), float("inf"), -1.0, 1e-300, 10**400)
PLACES = [
    (part, f.name) for part, kind in (("", Machine), ("speeds", Speed), ("kernels", Kernels)) for f in fields(kind)
]


@pytest.mark.parametrize(("part", "name"), PLACES)
def test_a_field_that_makes_no_sense_is_measured_again(file: Path, part: str, name: str) -> None:
    stored.store(TIMED, file)
    assert load(file) == TIMED
    text = name in ("name", "device", "measured")
    for value in NONSENSE[2:] if text else NONSENSE:
        if name == "kernels" and value is None:
            continue  # none were timed
        data: Any = json.loads(json.dumps(asdict(TIMED)))
        place = data if not part else data["speeds"][0] if part == "speeds" else data["kernels"]
        place[name] = value
        file.write_text(json.dumps(data))
        assert load(file) is None, value


def test_speeds_that_are_out_of_order(file: Path) -> None:
    stored.store(replace(CPU, speeds=CPU.speeds[::-1]), file)
    assert load(file) is None


def test_the_file_of_another_machine_is_measured_again(file: Path) -> None:
    stored.store(replace(CPU, name="another"), file)
    assert machine_for("cpu").name != "another" and load(file) == machine_for("cpu")


@pytest.mark.parametrize("text", ["[" * 200_000, '{"name": ' * 50_000, " " * (1 << 20) + "{}", "\0", "1" * 5000])
def test_a_file_that_is_no_machine_at_all(file: Path, text: str) -> None:
    file.write_text(text)
    assert load(file) is None


def test_a_folder_in_the_place_of_the_file(file: Path) -> None:
    file.mkdir()
    assert machine_for("cpu").speeds == CPU.speeds and file.is_dir()


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    stored.store(CPU, blocked / "machine.json")


# ------------------------------------------------------------------------------------------------- kernels


@needs_compiler
def test_kernels_are_timed_once(file: Path) -> None:
    found = timing.calibrated(torch.device("cpu"), "cpp")
    kernels = found.kernels
    assert kernels is not None and timing.calibrated(torch.device("cpu"), "cpp") is machine_for("cpu")
    assert 1e-7 < kernels.call < 1e-3 and 1e8 < kernels.rate < 1e13 and 1e8 < kernels.read < 1e15
    assert all(s.kernel_read > 1e7 and s.kernel_update > 1e7 for s in found.speeds if s.bytes > found.cache)


def test_composite_steps_need_no_timing(file: Path) -> None:
    assert timing.calibrated(torch.device("cpu"), "aten").kernels is None


def test_without_a_compiler_the_machine_is_what_it_was(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(plan: object) -> None:
        raise timing.EmitError("no compiler")

    monkeypatch.setattr(timing.ops, "use_cpp", fails)
    assert timing.with_kernels(CPU) is CPU
