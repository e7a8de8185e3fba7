"""Half-precision reads on a CPU: generated steps that read a 16-bit shadow of a float32 state, beside those without.

    python -m benchmarks.half_reads [--out FILE.json] [--only gdn mamba2 gla] [--batch 128] [--rounds 5] [--threads 2]

States come from memory: each side has its own, of at least 8 times the last cache by default, and the sides take turns
step by step, so that a busy machine slows all of them alike; with --threads 1 the clock is the thread's own processor
time, which leaves out the time that others had the processor. Operands are bfloat16, rows of keys and values too. A
number is the mean over the steps of a flush period, of the best or the median of all rounds; a ratio is that of two
sides in one round, the median over the rounds. Before anything is timed, all outputs of two flush periods are compared.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.cpu_kernels import move
from benchmarks.run import command, machine
from kvbuffer_compile.codegen import build
from kvbuffer_compile.commands.recurrences import RECURRENCES, Recurrence
from kvbuffer_compile.ir.plan import Layout, Plan
from kvbuffer_compile.ir.program import Decay
from kvbuffer_compile.steps import ops

L = 16
CPU = torch.device("cpu")
# Of outputs, beside the recurrent step: computed rows in float32 and bfloat16 operands differ from it by rounding only.
EQUAL, HALF = 1e-4, 2e-3
NUMBERS = 32 * 128 * 128  # of the state of one sequence, in every recurrence


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--only", nargs="+", choices=RECURRENCES, default=["gdn", "mamba2", "gla"])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5, help="flush periods of every side")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of every side")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results: dict[str, Any] = {"command": command("half_reads"), "machine": machine(), "cases": []}
    print(results["machine"], flush=True)
    for name in args.only:
        case = replace(RECURRENCES[name], heads=NUMBERS // prod(RECURRENCES[name].sizes))
        results["cases"].append(measure(case, args.batch, args.rounds))
        print(json.dumps(results["cases"][-1], indent=1), flush=True)
        if args.out:
            args.out.write_text(json.dumps(results, indent=1) + "\n")


class Steps:
    """One side: a state of its own that a generated op steps."""

    def __init__(self, case: Recurrence, state: Tensor, flush: int, read: torch.dtype | None = None) -> None:
        program, lanes = case.program, tuple(state.shape[:2])
        gates = {e.factor for e in program.events if isinstance(e, Decay)}
        narrow = {v for v in program.inputs if v.kind != "scalar" and v not in gates}
        rows = tuple(torch.bfloat16 if v in narrow else torch.float32 for v in program.logged)
        self.plan = plan = Plan(
            program, Layout(((None,), (None,), (None,), (None,)), (0, 1, 2, 3)),
            "recurrent" if flush == 1 else "buffered", case.sizes, flush, flush, torch.float32, rows,
            target="cpp", read_dtype=read,
        )  # fmt: skip
        self.op = ops.step_op(plan)
        build.load(plan)
        self.state = state.clone()
        self.side: list[Tensor] = []
        if flush > 1:
            cursor = torch.zeros(4, lanes[0], dtype=torch.int32)
            cursor[1] = flush
            self.side = [cursor]
            for v, dtype in zip(program.logged, rows, strict=True):
                self.side.append(torch.full(plan.row_shape(v, lanes), float("nan"), dtype=dtype))
        if read is not None:
            self.side += [torch.empty(state.shape, dtype=read), torch.zeros(plan.scale_shape(lanes))]

    def __call__(self, inputs: list[Tensor]) -> Tensor:
        return self.op(self.state, *self.side, *inputs)  # type: ignore[no-any-return]


def measure(case: Recurrence, batch: int, rounds: int) -> dict[str, Any]:
    """One row of the results: milliseconds of every side, and what they gain over each other."""
    torch.manual_seed(0)
    start = torch.randn(batch, case.heads, *case.sizes)
    sides = {
        "recurrent": Steps(case, start, 1),
        "buffered": Steps(case, start, L),
        "float16 reads": Steps(case, start, L, torch.float16),
        "bfloat16 reads": Steps(case, start, L, torch.bfloat16),
    }
    errors = compare(case, batch, sides)
    inputs = case.inputs(batch, torch.bfloat16, CPU)
    every: dict[str, Callable[[], Any]] = {
        "read": lambda: move("read_all", start),
        "copy": lambda: move("copy_all", start),
    }
    every |= {name: (lambda step=step: step(inputs)) for name, step in sides.items()}
    times = timed(every, rounds)
    row: dict[str, Any] = {"case": case.name, "batch": batch, "MB": start.nbytes / 1e6, "errors": errors}
    row["milliseconds"] = {name: summary(found) for name, found in times.items()}
    row["ratios"] = {f"{a} / {b}": ratio(times[a], times[b]) for a, b in PAIRS}
    return row


PAIRS = (
    ("recurrent", "float16 reads"), ("buffered", "float16 reads"), ("recurrent", "buffered"),
    ("buffered", "bfloat16 reads"), ("read", "float16 reads"), ("copy", "recurrent"),
)  # fmt: skip


def compare(case: Recurrence, batch: int, sides: dict[str, Steps]) -> dict[str, float]:
    """The largest relative difference of each side's outputs from the recurrent ones, over two flush periods."""
    errors = dict.fromkeys(sides, 0.0)
    for _ in range(2 * L):
        inputs = case.inputs(batch, torch.bfloat16, CPU)
        want = sides["recurrent"](inputs)
        for name, side in sides.items():
            if name != "recurrent":
                error = float((side(inputs) - want).abs().max() / want.abs().max())
                errors[name] = max(errors[name], error)
    for name, error in errors.items():
        limit = EQUAL if "reads" not in name else HALF * (8 if name.startswith("bfloat16") else 1)
        assert error <= limit, f"{case.name} {name}: relative error {error}"
    return errors


def timed(sides: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[list[float]]]:
    """Milliseconds of every step of every round, the sides in turn at each step."""
    times: dict[str, list[list[float]]] = {name: [[] for _ in range(rounds)] for name in sides}
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    for n in range(rounds):
        for _ in range(L):
            for name, step in sides.items():
                begin = clock()
                step()
                times[name][n].append((clock() - begin) * 1e3)
    return times


def summary(rounds: Sequence[Sequence[float]]) -> dict[str, float]:
    means = [statistics.mean(x) for x in rounds]
    middle = statistics.median(t for x in rounds for t in x)  # a step without a flush
    return {"best": round(min(means), 3), "median": round(statistics.median(means), 3), "step": round(middle, 3)}


def ratio(a: Sequence[Sequence[float]], b: Sequence[Sequence[float]]) -> float:
    return round(statistics.median(sum(x) / sum(y) for x, y in zip(a, b, strict=True)), 3)


if __name__ == "__main__":
    main()
