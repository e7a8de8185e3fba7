"""Generated Triton kernels on a GPU: correctness against float64, then bandwidth and ratios.

    python -m benchmarks.gpu [--out FILE.json] [--batches 1 8 32 128] [--only gdn ...] [--seconds 300]

Every side runs as CUDA graphs over several states in turn, so that none is in the L2 cache when its turn comes; the
median of several replays counts. Outputs of all sides are compared before anything is timed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvbuffer_compile import composite, ops
from kvbuffer_compile.plan import Layout, Plan
from kvbuffer_compile.recurrences import RECURRENCES, Recurrence

DEVICE = torch.device("cuda")
L = 16
COLD_BYTES = 400e6  # states that are walked through before one comes again: several times any L2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--only", nargs="+", default=list(RECURRENCES))
    parser.add_argument("--seconds", type=float, default=300.0, help="stop starting new cases after this time")
    args = parser.parse_args()
    results: dict[str, Any] = {"machine": machine(), "cases": []}
    print(results["machine"], flush=True)
    end = time.monotonic() + args.seconds
    for case in cases(args.only, args.batches):
        if time.monotonic() > end:
            print("time is up")
            break
        row = measure(*case)
        results["cases"].append(row)
        print(row, flush=True)
        if args.out:
            args.out.write_text(json.dumps(results, indent=1))


def cases(names: list[str], batches: list[int]) -> Iterator[tuple[Recurrence, int, torch.dtype]]:
    for dtype in (torch.float32, torch.bfloat16):
        for batch in sorted(batches, reverse=True):
            for name in names:
                yield RECURRENCES[name], batch, dtype


def machine() -> dict[str, Any]:
    """Name, versions, measured copy bandwidth (read and written bytes) and the cost of one launch in a graph."""
    import triton

    x = torch.empty(2**28, device=DEVICE)
    y = torch.empty_like(x)
    copy = graph_seconds([lambda: y.copy_(x)])
    small = torch.zeros(1, device=DEVICE)
    launch = graph_seconds([lambda: small.add_(1)] * 100) / 100
    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "copy_bytes_per_s": 2 * x.nbytes / copy,
        "launch_s": launch,
    }


def graph_seconds(calls: list[Callable[[], Any]], repeats: int = 11) -> float:
    """Median seconds of a CUDA graph that makes all the calls once."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(repeats + 3):
        start, stop = torch.cuda.Event(True), torch.cuda.Event(True)
        start.record()
        graph.replay()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) / 1e3)
    return statistics.median(times[3:])


class Side:
    """One way to step: a plan's op on several states."""

    def __init__(
        self, r: Recurrence, batch: int, dtype: torch.dtype, variant: str, copies: int, tokens: int = 1
    ) -> None:
        program = r.program
        row = torch.bfloat16
        rows = tuple(torch.float32 if v.kind == "scalar" or v.name in ("a",) else row for v in program.logged)
        layout = Layout(((None,), (r.heads,), (r.sizes[0],), (r.sizes[1],)), (0, 1, 2, 3))
        capacity = L + (tokens if variant == "verify" else 0)
        self.plan = Plan(
            program, layout, variant, r.sizes, 1 if variant == "recurrent" else L,  # type: ignore[arg-type]
            1 if variant == "recurrent" else capacity, dtype, rows, target="triton",
        )  # fmt: skip
        self.op = ops.step_op(self.plan)
        ops.use_triton(self.plan)
        lanes = (batch, r.heads)
        self.states = [torch.randn(*lanes, *r.sizes, device=DEVICE).mul_(0.1).to(dtype) for _ in range(copies)]
        self.side = [self._buffers(lanes, i, copies) for i in range(copies)]
        self.inputs = [r.inputs(batch, torch.bfloat16, DEVICE) for _ in range(4)]
        if variant == "verify":
            self.inputs = [[torch.stack([x] * tokens, 2) for x in xs] for xs in self.inputs]

    def _buffers(self, lanes: tuple[int, int], i: int, copies: int) -> list[Tensor]:
        if self.plan.variant == "recurrent":
            return []
        cursor = ops.new_cursor(self.plan, lanes, DEVICE)
        cursor[1].fill_(L)
        rows = [
            torch.full(self.plan.row_shape(v, lanes), float("nan"), dtype=d, device=DEVICE)
            for v, d in zip(self.plan.program.logged, self.plan.row_dtypes, strict=True)
        ]
        return [cursor, *rows]

    def calls(self, rounds: int = 1) -> list[Callable[[], Any]]:
        """One step on every state, `rounds` times."""
        return [
            (lambda i=i, t=t: self.op(self.states[i], *self.side[i], *self.inputs[t % 4]))
            for t in range(rounds)
            for i in range(len(self.states))
        ]


def check(r: Recurrence, batch: int, dtype: torch.dtype) -> float:
    """Largest relative error of 3 L buffered and recurrent steps against float64; AssertionError when it is large."""
    worst = 0.0
    for variant in ("recurrent", "buffered"):
        side = Side(r, batch, dtype, variant, 1)
        exact = side.states[0].double()
        for _ in range(3 * L):
            inputs = r.inputs(batch, torch.bfloat16, DEVICE)
            out = side.op(side.states[0], *side.side[0], *inputs)
            want = _exact(r, exact, inputs)
            error = ((out - want).abs().max() / want.abs().max()).item()
            worst = max(worst, error)
        if variant == "buffered":
            cursor, *rows = side.side[0]
            composite.flush(side.plan, side.states[0], cursor, rows, cursor[0] > 0)
        worst = max(worst, ((side.states[0] - exact).abs().max() / exact.abs().max()).item())
    limit = 0.03  # rows and, in the second half, states in bfloat16
    assert worst < limit, f"{r.name} batch {batch} {dtype}: error {worst}"
    return worst


def _exact(r: Recurrence, state: Tensor, inputs: list[Tensor]) -> Tensor:
    from kvbuffer_compile.ir import run
    from kvbuffer_compile.memory import Dense

    memory = Dense(state)
    env = run(r.program, memory, {v.name: x.double() for v, x in zip(r.program.inputs, inputs, strict=True)})
    state.copy_(memory.state)
    return env[r.program.outputs[0].name]


def measure(r: Recurrence, batch: int, dtype: torch.dtype) -> dict[str, Any]:
    """Seconds a step of every variant, and of plain Inductor, with equal outputs asserted before."""
    state_bytes = batch * r.heads * r.sizes[0] * r.sizes[1] * dtype.itemsize
    copies = int(min(64, max(2, -(-COLD_BYTES // state_bytes))))
    row: dict[str, Any] = {"case": r.name, "batch": batch, "dtype": str(dtype), "state_bytes": state_bytes}
    row["error"] = check(r, min(batch, 8), dtype)
    for name, variant, tokens in (("recurrent", "recurrent", 1), ("buffered", "buffered", 1), ("verify4", "verify", 4)):
        side = Side(r, batch, dtype, variant, copies, tokens)
        rounds = L if variant == "buffered" else 4
        row[name] = graph_seconds(side.calls(rounds)) / rounds / copies
    states = [torch.randn(batch, r.heads, *r.sizes, device=DEVICE).to(dtype) for _ in range(copies)]
    inputs = r.inputs(batch, torch.bfloat16, DEVICE)
    plain = torch.compile(r.step, dynamic=False)
    with torch.no_grad():
        row["inductor"] = graph_seconds([lambda s=s: plain(s, *inputs) for s in states]) / copies
    row["buffered_x_recurrent"] = row["recurrent"] / row["buffered"]
    row["buffered_x_inductor"] = row["inductor"] / row["buffered"]
    row["verify4_x_recurrent"] = 4 * row["recurrent"] / row["verify4"]
    row["recurrent_bytes_per_s"] = 2 * state_bytes / row["recurrent"]
    return row


if __name__ == "__main__":
    main()
