"""Generated C++ kernels on a CPU, op by op, against plain Inductor and against moving the state once.

    python -m benchmarks.cpu_kernels [--out FILE.json] [--states 1x1 24x8] [--only gdn ...] [--threads 2]

A row is warm, one state that is stepped again and again, or cold, so many states in turn that no cache holds them, as
the layers of a model are: 24x8 are 24 states of batch 8. All sides take turns within one run, so that a busy machine
slows all of them alike. A turn is a whole flush period of steps of each state, of a warm one behind another that warms
the caches; a number is the mean over the steps of a period, of the best or the median of all turns. `read` and `copy`
move the state once, without arithmetic to speak of. Outputs of all sides are compared before anything is timed.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.run import command, machine
from kvbuffer_compile.codegen import build
from kvbuffer_compile.commands.recurrences import RECURRENCES, Recurrence
from kvbuffer_compile.ir.plan import Layout, Plan
from kvbuffer_compile.steps import ops

CPU = torch.device("cpu")
L = 16
DRAFTS = 4
FLUSHES = (4, 8, L)  # of buffered steps
WARM = L  # steps of a turn that are not timed, where one state is stepped again and again
CONTEXT = 32  # tokens of the sequence that lives in the buffer alone
NUMBERS = 32 * 128 * 128  # of the state of one sequence, in every recurrence


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--states", type=_states, nargs="+", default=[(1, 1), (24, 8)], help="NUMBERxBATCH, in turn")
    parser.add_argument("--only", nargs="+", default=list(RECURRENCES))
    parser.add_argument("--dtypes", nargs="+", default=["float32"])
    parser.add_argument("--rounds", type=int, default=8, help="turns of every side")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of every side")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results: dict[str, Any] = {"command": command("cpu_kernels"), "machine": machine(), "cases": []}
    print(results["machine"], flush=True)
    for dtype in args.dtypes:
        for states, batch in args.states:
            for name in args.only:
                found = RECURRENCES[name]
                case = replace(found, heads=NUMBERS // prod(found.sizes))
                row = measure(case, states, batch, getattr(torch, dtype), args.rounds)
                results["cases"].append(row)
                print(line(row), flush=True)
                if args.out:
                    args.out.write_text(json.dumps(results, indent=1) + "\n")


def _states(text: str) -> tuple[int, int]:
    states, batch = text.split("x")
    return int(states), int(batch)


# ------------------------------------------------------------------------------------------------- floor

# Asked for 16 KB ahead: the processor's own prefetcher stops at every page, and a cold read takes 1.8 times as long.
FLOOR = """\
#include <cstdint>
typedef float Wide __attribute__((vector_size(64), aligned(4)));
extern "C" float read_all(const Wide* p, int64_t n) {
  float sum = 0;
#pragma omp parallel for schedule(static) reduction(+ : sum)
  for (int64_t piece = 0; piece < n / 64; ++piece) {
    Wide part[4] = {};
    for (int i = 0; i < 64; ++i) {
      __builtin_prefetch(p + piece * 64 + i + 256, 0, 2);
      part[i % 4] += p[piece * 64 + i];
    }
    part[0] += part[1] + (part[2] + part[3]);
    for (int i = 0; i < 16; ++i) sum += part[0][i];
  }
  return sum;
}
extern "C" void copy_all(Wide* p, int64_t n) {
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < n; ++i) {
    __builtin_prefetch(p + i + 256, 1, 2);
    p[i] *= 0.999f;
  }
}
"""


@functools.cache
def _floor() -> ctypes.CDLL:
    return ctypes.CDLL(str(build.library(FLOOR)))


def move(name: str, state: Tensor) -> None:
    """Read, or read and write, all bytes of a tensor once."""
    getattr(_floor(), name)(ctypes.c_void_p(state.data_ptr()), ctypes.c_int64(state.nbytes // 64))


# ------------------------------------------------------------------------------------------------- sides


class Steps:
    """One side that runs a generated op on a state. Without `flush` that is when the buffer is full."""

    def __init__(
        self,
        case: Recurrence,
        variant: str,
        state: Tensor,
        capacity: int = L,
        flush: int | None = None,
        bare: bool = False,
    ) -> None:
        program, lanes = case.program, state.shape[:2]
        layout = Layout(((None,), (None,), (None,), (None,)), (0, 1, 2, 3))
        row_dtypes = tuple(torch.float32 if v.kind == "scalar" else state.dtype for v in program.logged)
        limit = capacity if flush is None else flush
        self.bare = bare
        self.plan = Plan(program, layout, variant, case.sizes, limit, capacity, state.dtype, row_dtypes, target="cpp")  # type: ignore[arg-type]
        self.op = ops.step_op(self.plan)
        build.load(self.plan)
        self.state = state
        self.side: list[Tensor] = []
        if variant != "recurrent":
            self.cursor = torch.zeros(4, lanes[0], dtype=torch.int32)
            self.cursor[1], self.cursor[3] = limit, int(bare)
            shapes = [self.plan.row_shape(v, tuple(lanes)) for v in program.logged]
            rows = [torch.full(s, float("nan"), dtype=d) for s, d in zip(shapes, row_dtypes, strict=True)]
            self.side = [self.cursor, *rows]

    def rewind(self, owed: int) -> None:
        """So many rows are owed from now on."""
        self.cursor[0] = owed
        self.cursor[3] = int(self.bare)

    def __call__(self, inputs: list[Tensor]) -> Tensor:
        return self.op(self.state, *self.side, *inputs)  # type: ignore[no-any-return]


def measure(case: Recurrence, states: int, batch: int, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """One row of the table: best and median milliseconds of every side for a state. The sides share the memory of the
    states, but not that of rows."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    start = torch.randn(batch, case.heads, *case.sizes).to(dtype)
    inputs = case.inputs(batch, dtype, CPU)
    compiled = torch.compile(case.step, dynamic=False)
    plain = start.clone()
    compare(case, batch, start, lambda x: compiled(plain, *x))

    drafts = [torch.stack([x] * DRAFTS, dim=2) for x in inputs]
    memory = [start.clone() for _ in range(states)]

    def steps(variant: str, **more: Any) -> list[Steps]:
        return [Steps(case, variant, state, **more) for state in memory]

    sides = [
        Side("read", [partial(move, "read_all", s) for s in memory]),
        Side("copy", [partial(move, "copy_all", s) for s in memory]),
        Side("inductor", [partial(compiled, s, *inputs) for s in memory]),
        Side("recurrent", [partial(step, inputs) for step in steps("recurrent")]),
    ]
    for flush in FLUSHES:
        made = steps("buffered", capacity=flush)
        begin = [partial(step.rewind, flush // 2) for step in made]
        sides.append(Side(f"buffered {flush}", [partial(step, inputs) for step in made], first=begin))
    made = steps("verify", capacity=L + DRAFTS, flush=L)
    half = [partial(step.rewind, L // 2) for step in made]
    sides.append(Side(f"verify {DRAFTS}", [partial(step, drafts) for step in made], half))
    made = steps("buffered", capacity=2 * CONTEXT, bare=True)
    full = [partial(step.rewind, CONTEXT) for step in made]
    sides.append(Side(f"bare at {CONTEXT}", [partial(step, inputs) for step in made], full))
    for _ in range(rounds):
        for side in sides:
            side.turn()
    row: dict[str, Any] = {"case": case.name, "states": states, "batch": batch, "dtype": str(dtype).split(".")[1]}
    return row | {"MB": start.nbytes / 1e6} | {side.name: side.summary() for side in sides}


@dataclass
class Side:
    """What takes turns: a step for each state. prepare, first: what is done before each step and before each turn,
    while no clock runs."""

    name: str
    steps: list[Callable[[], Any]]
    prepare: list[Callable[[], Any]] = field(default_factory=list)
    first: list[Callable[[], Any]] = field(default_factory=list)
    times: list[list[float]] = field(default_factory=lambda: [[] for _ in range(L)])  # a list for each step of a period

    def turn(self) -> None:
        """A flush period of steps."""
        for call in self.first:
            call()
        warm: list[list[float] | None] = [None] * (WARM if len(self.steps) == 1 else 0)
        for place in warm + self.times:
            for call in self.prepare:
                call()
            begin = time.perf_counter()
            for step in self.steps:
                step()
            if place is not None:
                place.append((time.perf_counter() - begin) / len(self.steps) * 1e3)

    def summary(self) -> dict[str, float]:
        """Milliseconds a step; the mean over a period."""
        best = statistics.mean(min(x) for x in self.times)
        return {"best": round(best, 4), "median": round(statistics.mean(statistics.median(x) for x in self.times), 4)}


def compare(case: Recurrence, batch: int, start: Tensor, plain: Callable[[list[Tensor]], Tensor]) -> None:
    """AssertionError when outputs of a generated step differ from those of plain Inductor over two flush periods."""
    sides = [Steps(case, "recurrent", start.clone())]
    sides += [Steps(case, "buffered", start.clone(), capacity=flush) for flush in FLUSHES]
    verify = Steps(case, "verify", start.clone(), capacity=L + DRAFTS, flush=L)
    tolerance = 1e-4 if start.dtype == torch.float32 else 6e-2  # a plain 16-bit state is rounded at every step
    history = []
    for _ in range(2 * L + 3):
        x = case.inputs(batch, start.dtype, CPU)
        history.append((x, plain(x)))
        for side in sides:
            close(side(x), history[-1][1], tolerance, f"{case.name} {side.plan.variant}")
    for n in range(0, 2 * L, DRAFTS):
        tokens = history[n : n + DRAFTS]
        got = verify([torch.stack(same, dim=2) for same in zip(*(x for x, _ in tokens), strict=True)])
        close(got, torch.stack([out for _, out in tokens], dim=2), tolerance, f"{case.name} verify")


def close(got: Tensor, want: Tensor, tolerance: float, what: str) -> None:
    error = float((got - want).abs().max() / want.abs().max())
    assert error <= tolerance, f"{what}: relative error {error}"


# ------------------------------------------------------------------------------------------------- report


def fastest(row: dict[str, Any]) -> dict[str, float]:
    """The best milliseconds of each side; `buffered` is the fastest flush length, which is `flush`."""
    best = {name: found["best"] for name, found in row.items() if isinstance(found, dict)}
    flush = min(FLUSHES, key=lambda n: best[f"buffered {n}"])
    return best | {"buffered": best[f"buffered {flush}"], "flush": flush}


def ratios(row: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """What the targets are about, from the best times."""
    best = fastest(row)
    yield "speed of buffered over inductor", best["inductor"] / best["buffered"]
    yield "speed of recurrent over inductor", best["inductor"] / best["recurrent"]
    yield "speed of buffered over recurrent", best["recurrent"] / best["buffered"]
    yield "buffered / read", best["buffered"] / best["read"]
    yield "recurrent / copy", best["recurrent"] / best["copy"]
    yield f"speed of verify over {DRAFTS} recurrent", DRAFTS * best["recurrent"] / best[f"verify {DRAFTS}"]
    yield "speed of bare over recurrent", best["recurrent"] / best[f"bare at {CONTEXT}"]


def line(row: dict[str, Any]) -> str:
    """One case for people."""
    head = f"{row['case']} {row['states']} of batch {row['batch']} {row['dtype']}, {row['MB']:.0f} MB each"
    sides = (f"{name} {x['best']:.3f} ({x['median']:.3f})" for name, x in row.items() if isinstance(x, dict))
    return "\n  ".join(
        [head, "ms, best (median): " + ", ".join(sides), *(f"{name}: {x:.2f}" for name, x in ratios(row))]
    )


if __name__ == "__main__":
    main()
