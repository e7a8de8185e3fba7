"""Is `flush="auto"` ever slower than Inductor, or than another of our own plans? Many small and large cases.

    python -m benchmarks.sweep --out benchmarks/results/sweep.json [--only gdn ...] [--cases 3 7 ...] [--seconds 2]

A case is a graph that steps 1, 8 or 24 states of one recurrence in turn, each layer fed by the one before, compiled by
plain Inductor and for this backend, in one process. Both take turns; a turn is a number of calls that is a multiple of
every flush length. Beside them the generated ops of all candidates are called on states of the same number and size, so
that they can be ranked: what is predicted of them stands beside what was measured. Outputs are compared first.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import math
import random
import statistics
import time
import types
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.cpu_kernels import CPU, Steps
from benchmarks.run import machine
from kvbuffer_compile.backend import observers
from kvbuffer_compile.commands.recurrences import RECURRENCES, Recurrence
from kvbuffer_compile.ir.plan import Plan
from kvbuffer_compile.options import Options
from kvbuffer_compile.passes.choice.choose import explain_choice
from kvbuffer_compile.passes.choice.predict import Prediction
from kvbuffer_compile.records import GraphRecord
from kvbuffer_compile.steps.timing import calibrated

FLUSHES = (1, 4, 8, 16)  # measured beside the one that is taken; 1: the recurrent step
MOST_BYTES = 900 << 20  # of the states of one graph

SHAPES = {  # (K, V), heads
    "gdn": [((16, 16), 4), ((32, 32), 8), ((64, 64), 8), ((128, 128), 16), ((128, 128), 32), ((256, 256), 4)],
    "mamba2": [((32, 32), 8), ((64, 64), 8), ((64, 64), 16), ((128, 64), 32), ((128, 64), 64), ((256, 64), 32)],
    "gla": [((16, 16), 4), ((64, 64), 8), ((128, 128), 8), ((128, 128), 32), ((256, 512), 4)],
    "kda": [((32, 32), 8), ((64, 64), 16), ((128, 128), 16), ((128, 128), 32)],
    "rwkv7": [((64, 64), 8), ((64, 64), 32), ((64, 64), 64)],
    "mlstm": [((64, 64), 4), ((128, 128), 4), ((256, 512), 4)],
}


@dataclass(frozen=True)
class Case:
    """states: how many one call steps."""

    name: str
    sizes: tuple[int, int]
    heads: int
    batch: int
    dtype: str
    states: int
    threads: int

    @property
    def recurrence(self) -> Recurrence:
        return replace(RECURRENCES[self.name], sizes=self.sizes, heads=self.heads)

    @property
    def bytes(self) -> int:
        width = getattr(torch, self.dtype).itemsize
        return self.states * self.batch * self.heads * self.sizes[0] * self.sizes[1] * width

    def __str__(self) -> str:
        k, v = self.sizes
        shape = f"{self.batch}x{self.heads}x{k}x{v}"
        return f"{self.name} {shape} {self.dtype} x{self.states} {self.threads}t {self.bytes / 1e6:.2g} MB"


def cases(threads: Sequence[int] = (1, 2)) -> list[Case]:
    """Of every recurrence and shape three, chosen by a fixed seed among all batches, dtypes, counts and threads."""
    dice = random.Random(14)
    found = []
    for name, shapes in SHAPES.items():
        for sizes, heads in shapes:
            every = [
                Case(name, sizes, heads, batch, dtype, states, n)
                for batch in (1, 8, 64)
                for dtype in ("float32", "bfloat16")
                for states in (1, 8, 24)
                for n in threads
            ]
            found += dice.sample([c for c in every if c.bytes <= MOST_BYTES], 3)
    return found


# ---------------------------------------------------------------------------------------------------- sides


class Graph:
    """The compiled graph of a case, on states of its own."""

    def __init__(self, case: Case, backend: str, starts: list[Tensor]) -> None:
        self.states = [s.clone() for s in starts]
        self.records: list[GraphRecord] = []
        step, names = case.recurrence.step, [v.name for v in case.recurrence.program.inputs]
        values = names.index("v")

        def layers(states: list[Tensor], operands: list[list[Tensor]]) -> Tensor:
            out = None
            for state, given in zip(states, operands, strict=True):
                if out is not None:
                    given = [x if n != values else (x + 0.001 * out).to(x.dtype) for n, x in enumerate(given)]
                out = step(state, *given)
            assert out is not None
            return out

        code = types.FunctionType(layers.__code__, layers.__globals__, f"layers_{backend}", None, layers.__closure__)
        self.step = torch.compile(code, backend=backend, fullgraph=True, dynamic=False)

    def __call__(self, operands: list[list[Tensor]]) -> Tensor:
        with observers.also(self.records.append):
            return self.step(self.states, operands)  # type: ignore[no-any-return]

    @property
    def chosen(self) -> int:
        """The flush length of its states; 0 where they were declined."""
        plans = {p.flush if isinstance(p, Plan) else 0 for r in self.records for _, p in r.states}
        assert len(plans) == 1, plans
        return plans.pop()

    def prediction(self) -> Prediction:
        """Of its first state."""
        found, call = next((one, r.call) for r in self.records for one, _ in r.states)
        return explain_choice(found, Options(), calibrated(CPU, "cpp"), "cpp", call)[1]


def candidates(
    case: Case, flushes: Sequence[int], starts: list[Tensor], operands: list[list[Tensor]]
) -> dict[int, Callable[[], None]]:
    """A call of each, by its flush length, that steps all states once. They share the memory of the states."""

    def of(flush: int) -> Callable[[], None]:
        variant = "recurrent" if flush == 1 else "buffered"
        sides = [Steps(case.recurrence, variant, s, capacity=flush) for s in starts]

        def call() -> None:
            for side, x in zip(sides, operands, strict=True):
                side(x)

        return call

    return {flush: of(flush) for flush in flushes}


# ------------------------------------------------------------------------------------------------- measuring


@torch.no_grad()
def measure(case: Case, seconds: float) -> dict[str, Any]:
    """One row: microseconds a call of every side, best and median; ratios of turns side by side."""
    torch.set_num_threads(case.threads)
    torch._dynamo.reset()
    torch.manual_seed(0)
    found, dtype = case.recurrence, getattr(torch, case.dtype)
    starts = [torch.randn(case.batch, case.heads, *case.sizes).to(dtype) for _ in range(case.states)]
    operands = [found.inputs(case.batch, dtype, CPU) for _ in starts]
    plain, auto = Graph(case, "inductor", starts), Graph(case, "kvbuffer", starts)
    tolerance = 1e-3 if dtype == torch.float32 else 0.1  # a plain 16-bit state is rounded at every step
    for _ in range(20):
        want, got = plain(operands), auto(operands)
        error = float((got - want).abs().max() / want.abs().max())
        assert error < tolerance, f"{case}: outputs differ by {error} of the largest"
    prediction, chosen = auto.prediction(), auto.chosen
    graphs: dict[str, Callable[[], Any]] = {"inductor": lambda: plain(operands), "auto": lambda: auto(operands)}
    flushes = sorted({*FLUSHES, chosen} - {0})
    calls = math.lcm(*flushes)
    times = alternate(graphs, calls, seconds)
    ranked = alternate({str(k): f for k, f in candidates(case, flushes, starts, operands).items()}, calls, seconds)
    ops = {str(c.flush): c.seconds - c.around for c in prediction.candidates if c.flush in flushes}
    predicted = {flush: round(spent * 1e6, 2) for flush, spent in ops.items()}
    pairs = sorted(b / a for a, b in zip(times["inductor"], times["auto"], strict=True))
    row: dict[str, Any] = asdict(case) | {"case": str(case), "MB": round(case.bytes / 1e6, 3), "chosen": chosen}
    row |= {name: summary(x) for name, x in times.items()}
    row["auto / inductor"] = round(statistics.median(pairs), 4)
    row["auto / inductor, best"] = round(min(times["auto"]) / min(times["inductor"]), 4)
    row["candidates"] = {k: summary(x) for k, x in ranked.items()}
    row["predicted"] = predicted | {"inductor": round(prediction.plain.seconds * 1e6, 2)}
    return row


def alternate(sides: dict[str, Callable[[], Any]], calls: int, seconds: float) -> dict[str, list[float]]:
    """Microseconds a call of each side, turn by turn, in an order that alternates. A turn is so many calls, or a
    multiple; at least four turns, however long they take."""
    gc.collect()
    gc.disable()
    try:
        started = time.perf_counter()
        for step in sides.values():
            for _ in range(calls):
                step()
        spent = time.perf_counter() - started
        repeat = max(1, round(0.004 * len(sides) / spent))
        turns = min(200, max(4, round(seconds / (spent * repeat))))
        times: dict[str, list[float]] = {name: [] for name in sides}
        for turn in range(turns):
            order = list(sides.items())
            for name, step in order if turn % 2 else reversed(order):
                begin = time.perf_counter()
                for _ in range(repeat * calls):
                    step()
                times[name].append((time.perf_counter() - begin) / (repeat * calls) * 1e6)
        return times
    finally:
        gc.enable()


def summary(times: list[float]) -> dict[str, float]:
    return {"best": round(min(times), 2), "median": round(statistics.median(times), 2)}


# ---------------------------------------------------------------------------------------------------- report


def line(row: dict[str, Any]) -> str:
    """One case for people."""
    best = {k: x["best"] for k, x in row["candidates"].items()}
    ours = " ".join(
        f"{'rec' if k == '1' else 'L' + k}={x:.0f}({row['predicted'].get(k, 0):.0f})" for k, x in best.items()
    )
    return (
        f"{row['case']}: chosen {row['chosen']}, {row['auto / inductor']:.2f} (best {row['auto / inductor, best']:.2f})"
        f" of Inductor's {row['inductor']['best']:.0f} us ({row['predicted']['inductor'] * row['states']:.0f}); {ours}"
    )


def verdict(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What is asked of all cases: none slower than Inductor, none far from the best of our own, candidates in the order
    that was predicted wherever two differ by more than 5 %."""
    ratios = [min(row["auto / inductor"], row["auto / inductor, best"]) for row in rows]
    losses, ordered, pairs = [], 0, 0
    for row in rows:
        best = {k: x["best"] for k, x in row["candidates"].items()}
        if str(row["chosen"]) in best:
            losses.append(best[str(row["chosen"])] / min(best.values()))
        for one, other in itertools.combinations(best, 2):
            if max(best[one], best[other]) > 1.05 * min(best[one], best[other]):
                pairs += 1
                predicted = row["predicted"]
                ordered += (best[one] < best[other]) == (predicted[one] < predicted[other])
    return {
        "cases": len(rows), "declined": sum(row["chosen"] == 0 for row in rows), "slowest over Inductor": max(ratios),
        "above 1.03": sum(x > 1.03 for x in ratios), "median over Inductor": round(statistics.median(ratios), 3),
        "chosen over best of our own, worst": round(max(losses, default=1.0), 3),
        "of these above 1.05": sum(x > 1.05 for x in losses), "pairs in the predicted order": f"{ordered} of {pairs}",
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--only", nargs="+", default=list(SHAPES))
    parser.add_argument("--cases", type=int, nargs="+", default=None, help="numbers in the list of all")
    parser.add_argument("--seconds", type=float, default=1.5, help="to measure a case, twice")
    args = parser.parse_args()
    torch._dynamo.config.recompile_limit = 64
    results: dict[str, Any] = {"machine": machine(), "numbers": {}, "cases": []}
    for number, case in enumerate(cases()):
        if case.name in args.only and (args.cases is None or number in args.cases):
            row = {"number": number} | measure(case, args.seconds)
            results["cases"].append(row)
            results["numbers"][case.threads] = asdict(calibrated(CPU, "cpp"))
            results["summary"] = verdict(results["cases"])
            print(number, line(row), flush=True)
            if args.out:
                args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
