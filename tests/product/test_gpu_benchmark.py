"""benchmarks.gpu runs to its end where there is no GPU, so that no time on one is lost to a slip."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu

ROOT = Path(__file__).resolve().parents[2]
SIDES = ("recurrent", "buffered", "verify_2", "verify_4", "verify_8", "snapshots_4", "bare_16", "bare_32", "bare_64",
         "inductor", "buffered_streamed", "buffered_held")  # fmt: skip


def dry_run(path: Path, *arguments: str) -> dict:
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry-run", "--out", str(path), *arguments]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(path.read_text())


def complete(found: dict, names: tuple[str, ...], dtypes: tuple[str, ...] = ("float32", "bfloat16")) -> None:
    assert {(r["case"], r["dtype"]) for r in found["cases"]} == {(n, d) for n in names for d in dtypes}
    for row in found["cases"]:
        assert all(row[side] > 0 for side in SIDES) and row["fla"].startswith("skipped: ")
    (model,) = found["model"]
    assert model["plans"] == ["buffered L=4 triton"] and model["error"] < 1e-4
    assert found["dry_run"] and not found["left_out"] and found["targets"]


@pytest.mark.nightly
def test_a_dry_run_runs_to_its_end(tmp_path):
    complete(dry_run(tmp_path / "found.json", "--only", "gdn", "--dtypes", "bfloat16"), ("gdn",), ("bfloat16",))


@pytest.mark.nightly
def test_a_dry_run_of_everything(tmp_path):
    complete(dry_run(tmp_path / "found.json"), gpu.NAMES)


def test_what_there_is_no_time_for_is_listed(tmp_path):
    found = dry_run(tmp_path / "found.json", "--only", "gla", "--seconds", "0")
    assert not found["cases"] and not found["model"]
    assert [r["case"] for r in found["left_out"]] == ["gla", "gla", "model"]


def test_targets_take_the_worst_case():
    def row(dtype: str, batch: int, buffered: float, fla: float | str) -> dict:
        other = {"verify_4": 1.0, "snapshots_4": 3.0, "bare_32": 0.5, "recurrent_of_copy": 1.0, "buffered_of_copy": 1.0}
        return {
            "dtype": dtype,
            "batch": batch,
            "recurrent": 2.0,
            "buffered": buffered,
            "inductor": 3.0,
            "fla": fla,
            **other,
        }

    rows = [row("float32", 128, 1.0, "skipped"), row("float32", 512, 1.25, 2.5), row("bfloat16", 1, 4.0, 1.0)]
    found = {r["target"]: r for r in gpu.targets({"cases": rows, "model": [{"batch": 256, "gain": 1.3}]})}
    assert found["buffered over recurrent, B >= 128 float32"]["value"] == 1.6
    assert not found["buffered over recurrent, B >= 128 float32"]["met"]
    assert found["the better of recurrent and buffered over the others, B <= 8"]["value"] == 0.5
    assert found["whole model over Inductor, B = 256"]["met"]
    assert "whole model over Inductor, B = 1" not in found
