"""results/gpu_predicted.json: what steps of real models would take on an H100."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import triton

from benchmarks.static_gpu.cases import DRAFTS, FLUSH, NAMES, STATES, VARIANTS, Case, cases
from benchmarks.static_gpu.machine import Machine
from benchmarks.static_gpu.predict import predict
from kvbuffer_compile.codegen.triton.launch import Config

OUT = Path(__file__).parents[1] / "results" / "gpu_predicted.json"
BATCHES = (128, 32, 8)
HEAD = {
    "PREDICTED": "nothing here was measured: machine code for sm_90 run on a model of one H100 multiprocessor; 15 to "
    "25 % from what was measured where decode could be compared, and 15 to 20 % too fast where memory binds; verify "
    "steps are not calibrated",
    "command": "python -m benchmarks.static_gpu --table",
    "model": "benchmarks/static_gpu",
    "us": "of a step, mean over a flush period",
    "flush_length": FLUSH,
    "tokens_of_verify": DRAFTS,
}


def write(path: Path = OUT) -> None:
    """All rows anew, written after each of them."""
    rows: list[dict[str, Any]] = []
    for case in cases(NAMES, STATES, VARIANTS):
        for row in predicted(case, BATCHES, Machine()):
            print(row, flush=True)
            rows.append(row)
            head = json.dumps({**HEAD, "triton": triton.__version__}, indent=1).removesuffix("\n}")
            lines = ",\n".join("  " + json.dumps(r) for r in rows)
            path.write_text(f'{head},\n "rows": [\n{lines}\n ]\n}}\n', encoding="utf-8")


def predicted(case: Case, batches: Sequence[int], m: Machine) -> Iterator[dict[str, Any]]:
    """A row for each form of its kernel and batch."""
    for form, config in case.forms().items():
        for batch in batches:
            p = predict(case.kernel(batch, config), m)
            row = {"case": case.name, "state": case.state, "batch": batch, "form": form, "us": _us(p.seconds)}
            if p.flush:
                row |= {"steady_us": _us(p.steady.seconds), "flush_us": _us(p.flush.seconds)}
            row |= {
                "registers": p.kernel.registers,
                "spills": p.kernel.spills,
                "instructions_of_a_warp": p.counts["all"],
            }
            yield row | ({"launch": _launch(config)} if config else {})


def _launch(config: Config) -> dict[str, Any]:
    plain = asdict(Config(0, 0))
    return {name: value for name, value in asdict(config).items() if value != plain[name]}


def _us(seconds: float) -> float:
    return round(seconds * 1e6, 1)
