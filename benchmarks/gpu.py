"""Generated Triton kernels on a GPU: correctness against float64, then bandwidth and ratios, then a whole model.

    python -m benchmarks.gpu [--out FILE.json] [--batches 1 8 32 128 512] [--only gdn ...] [--dtypes float32 bfloat16]
                             [--seconds 460] [--tune]
    python -m benchmarks.gpu --dry-run      all of it in little on a CPU, kernels in Triton's interpreter

Every side runs as CUDA graphs over several states in turn, so that none is in the L2 cache when its turn comes; the
median of several replays counts. All sides are held against the reference before anything is timed. Cases that come
first decide most: large batches and float32 states. What there was no time for is listed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_sides import ROOM, Place, Side, error, fla, forms, inductor, plan_of
from kvbuffer_compile.commands.recurrences import RECURRENCES, Recurrence

NAMES = ("gdn", "kda", "mamba2", "gla", "rwkv7")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
DRAFTS = (2, 4, 8)
CONTEXTS = (16, 32, 64)
COLD_BYTES = 400e6  # states that are walked through before one comes again: several times any L2
MODEL_SHARE = 0.4  # of the time is kept for the whole model


def main() -> None:
    args = _arguments()
    os.environ.setdefault("KVBUFFER_TUNE", "1" if args.tune else "0")
    if args.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"
    place = Place(args.dry_run, 4 if args.dry_run else 16)
    results: dict[str, Any] = {
        "dry_run": place.dry,
        "machine": machine(place),
        "cases": [],
        "model": [],
        "left_out": [],
    }
    print(results["machine"], flush=True)
    if args.sanitize:
        results["sanitizer"] = sanitize()
    start = time.monotonic()
    for kind, share, name, run in jobs(place, args, results["machine"]["copy_bytes_per_s"]):
        if time.monotonic() - start > args.seconds * share:
            kind, row = "left_out", name
        else:
            row = name | run()
        results[kind].append(row)
        print(row, flush=True)
        write(args.out, results)
    results["targets"] = list(targets(results))
    for row in results["targets"]:
        print(row)
    write(args.out, results)


def jobs(
    place: Place, args: argparse.Namespace, copy: float
) -> Iterator[tuple[str, float, dict[str, Any], Callable[[], dict[str, Any]]]]:
    """(list of the results, share of the time after which it is left out, what it is, what measures it)."""
    for r, batch, dtype in cases(place, args.only, args.batches, [DTYPES[name] for name in args.dtypes]):
        name = {"case": r.name, "batch": batch, "dtype": str(dtype).split(".")[1]}
        yield "cases", 1 - MODEL_SHARE, name, partial(measure, place, r, batch, dtype, copy)
    for batch in args.model_batches:
        from benchmarks.gpu_model import measure as measure_model

        yield "model", 1.0, {"case": "model", "batch": batch}, partial(measure_model, place, batch, args.layers)


def write(path: Path | None, results: dict[str, Any]) -> None:
    if path:
        path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def _arguments() -> argparse.Namespace:
    dry = "--dry-run" in sys.argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--batches", type=int, nargs="*", default=[2] if dry else [1, 8, 32, 128, 512])
    parser.add_argument("--only", nargs="+", default=list(NAMES), choices=list(RECURRENCES))
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES), help="of the states")
    parser.add_argument("--model-batches", type=int, nargs="*", default=[2] if dry else [256, 1, 128, 32])
    parser.add_argument("--layers", type=int, default=4, help="of the whole model; every fourth is full attention")
    parser.add_argument("--seconds", type=float, default=460.0, help="begin nothing after this time")
    parser.add_argument("--tune", action="store_true", help="measure first which launch of a kernel is best")
    parser.add_argument("--sanitize", action="store_true", help="run compute-sanitizer on emitted kernels")
    return parser.parse_args()


def cases(
    place: Place, names: list[str], batches: list[int], dtypes: list[torch.dtype]
) -> Iterator[tuple[Recurrence, int, torch.dtype]]:
    for dtype in dtypes:
        for batch in sorted(batches, reverse=True):
            for name in names:
                r = RECURRENCES[name]
                yield (replace(r, sizes=(8, 8), heads=1) if place.dry else r), batch, dtype


def machine(place: Place) -> dict[str, Any]:
    """Name, versions, measured copy bandwidth (read and written bytes) and the cost of one launch in a graph."""
    import triton

    x = torch.empty(2**16 if place.dry else 2**28, device=place.device)
    y = torch.empty_like(x)
    small = torch.zeros(1, device=place.device)
    return {
        "gpu": "none" if place.dry else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "copy_bytes_per_s": 2 * x.nbytes / place.seconds([lambda: y.copy_(x)]),
        "launch_s": place.seconds([lambda: small.add_(1)] * 100) / 100,
    }


def measure(place: Place, r: Recurrence, batch: int, dtype: torch.dtype, copy: float) -> dict[str, Any]:
    """Seconds a step takes on every side, after all generated kernels were found right."""
    L, state_bytes = place.flush, batch * r.heads * r.sizes[0] * r.sizes[1] * dtype.itemsize
    copies = 2 if place.dry else int(min(64, max(2, -(-COLD_BYTES // state_bytes))))
    recurrent = plan_of(r, "recurrent", dtype, 1, 1)
    buffered = plan_of(r, "buffered", dtype, L, L)
    verify = plan_of(r, "verify", dtype, L, L + max(DRAFTS))
    bare = plan_of(r, "buffered", dtype, max(CONTEXTS) + ROOM, max(CONTEXTS) + ROOM)
    few = 2 if place.dry else 3
    row: dict[str, Any] = {"state_bytes": state_bytes}
    row["error"] = max(error(place, r, recurrent, few), error(place, r, buffered, few), error(place, r, verify, few, 4))
    row["recurrent"] = Side(place, r, recurrent, batch, copies).seconds(place, 1 if place.dry else 4)
    row["buffered"] = Side(place, r, buffered, batch, copies).seconds(place, L)
    for form, config in forms(buffered).items():
        row[f"error_{form}"] = error(place, r, buffered, few, config=config)
        row[f"buffered_{form}"] = Side(place, r, buffered, batch, copies, config=config).seconds(place, L)
    for tokens in DRAFTS:
        side = Side(place, r, verify, batch, copies, tokens)
        row[f"verify_{tokens}"] = side.seconds(place, 1 if place.dry else 4)
        row[f"snapshots_{tokens}"] = (1 + tokens) * state_bytes / copy
    bare_side = Side(place, r, bare, batch, copies)
    for context in CONTEXTS:
        bare_side.owe(context - ROOM // 4, empty=True)
        row[f"bare_{context}"] = bare_side.seconds(place, 1)
    row["inductor"] = inductor(place, r, batch, dtype, copies)
    row["fla"] = fla(place, r, batch, dtype, copies)
    row["recurrent_of_copy"] = 2 * state_bytes / row["recurrent"] / copy
    rows = sum(x.nbytes for x in Side(place, r, buffered, batch, 1).logs[0][1:])
    row["buffered_of_copy"] = (state_bytes * (1 + 1 / L) + rows / 2) / row["buffered"] / copy
    return row


def sanitize() -> dict[str, str]:
    """compute-sanitizer's verdict on the emitted GDN steps, or why there is none."""
    tool = shutil.which("compute-sanitizer")
    if tool is None or not torch.cuda.is_available():
        return {"skipped": "there is no compute-sanitizer" if tool is None else "there is no GPU"}
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for variant in ("buffered", "verify"):
            file = Path(folder, f"{variant}.py")
            emit = [sys.executable, "-m", "kvbuffer_compile", "emit", "--recurrence", "gdn", "--variant", variant]
            subprocess.run([*emit, "--target", "triton", "--out", str(file)], check=True)
            for check in ("memcheck", "racecheck"):
                run = [tool, "--tool", check, "--error-exitcode", "9", sys.executable, str(file), "--steps", "20"]
                done = subprocess.run(run, capture_output=True, text=True)
                found[f"{variant} {check}"] = "clean" if done.returncode == 0 else done.stdout[-500:]
    return found


def targets(results: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What the project set out to reach, with the worst case of each."""
    rows = results["cases"]
    large = [r for r in rows if r["batch"] >= 128]
    full = [r for r in large if r["dtype"] == "float32"]
    small = [r for r in rows if r["batch"] <= 8]

    def best_other(r: dict[str, Any]) -> float:
        return min(x for x in (r["inductor"], r["fla"]) if isinstance(x, float))

    ratios = {
        ("recurrent / copy bandwidth, B >= 128 float32", 0.9): [r["recurrent_of_copy"] for r in full],
        ("buffered / copy bandwidth, B >= 128 float32", 0.9): [r["buffered_of_copy"] for r in full],
        ("buffered over recurrent, B >= 128 float32", 1.7): [r["recurrent"] / r["buffered"] for r in full],
        ("buffered over recurrent, B >= 128 bfloat16", 1.6): [
            r["recurrent"] / r["buffered"] for r in large if r["dtype"] == "bfloat16"
        ],
        ("the better of recurrent and buffered over the others, B <= 8", 0.98): [
            best_other(r) / min(r["recurrent"], r["buffered"]) for r in small
        ],
        ("verify of 4 over 4 recurrent steps, B >= 128", 3.2): [4 * r["recurrent"] / r["verify_4"] for r in large],
        ("verify of 4 over snapshots of every draft", 2.0): [r["snapshots_4"] / r["verify_4"] for r in large],
        ("buffer-only over recurrent at context 32", 3.0): [r["recurrent"] / r["bare_32"] for r in large],
        ("whole model over Inductor, B = 256", 1.25): [r["gain"] for r in results["model"] if r["batch"] == 256],
        ("whole model over Inductor, B = 1", 0.98): [r["gain"] for r in results["model"] if r["batch"] == 1],
    }
    for (name, wanted), found in ratios.items():
        if found:
            yield {"target": name, "value": min(found), "wanted": wanted, "met": min(found) >= wanted}


if __name__ == "__main__":
    main()
