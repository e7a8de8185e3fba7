"""results/gpu_predicted.json: what steps of real models would take on an H100."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import triton

from benchmarks.static_gpu.cases import DRAFTS, FLUSH, NAMES, STATES, VARIANTS, Case
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


def write(chosen: Iterable[Case], path: Path = OUT) -> None:
    """The rows of these cases anew, written after each of them; those of others stay."""
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    for case in chosen:
        found = list(predicted(case, BATCHES, Machine()))
        print(*found, sep="\n", flush=True)
        rows = sorted([row for row in rows if _place(row) != _place(found[0])] + found, key=_place)
        head = json.dumps({**HEAD, "triton": triton.__version__}, indent=1).removesuffix("\n}")
        lines = ",\n".join("  " + json.dumps(r) for r in rows)
        path.write_text(f'{head},\n "rows": [\n{lines}\n ]\n}}\n', encoding="utf-8")


def _place(row: dict[str, Any]) -> tuple[int, int, int]:
    """Of a row's case among all of them."""
    variant = next((v for v in VARIANTS if row["form"].startswith(v)), "buffered")
    return NAMES.index(row["case"]), STATES.index(row["state"]), VARIANTS.index(variant)


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
