"""Time the decode steps of a workload three ways, and see that they agree."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from kvbuffer_compile.backend import GraphRecord, kvbuffer, observers
from kvbuffer_compile.commands.workload import Call, Factory

WAYS = ("eager", "inductor", "kvbuffer")
COMPARED = 32  # steps whose outputs are kept and compared, warm-up included


@dataclass(frozen=True)
class Timing:
    """One way. Seconds per step (first: with compilation). error: largest deviation of an output from eager's, relative
    to eager's largest value, over the first COMPARED steps. states: how many the graph compiled last has rewritten."""

    way: str
    first: float
    median: float
    best: float
    error: float
    states: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def bench(
    factory: Factory, options: dict[str, Any], steps: int, warmup: int, tell: Callable[[str], None] = lambda text: None
) -> list[Timing]:
    """Time `steps` decode steps of each of WAYS after `warmup` others. ArithmeticError when kvbuffer's differ. tell: is
    given a line before and after each.

    Inductor's own deviation from eager is the yardstick: ten times that and 64 ulps more are allowed.
    """
    timings: list[Timing] = []
    expected: list[list[Tensor]] = []
    for way in WAYS:
        tell(f"{way}: {'compiling and ' if way != 'eager' else ''}running {1 + warmup + steps} steps")
        with _rewritten() as counts:
            seconds, outputs = _run(_compiled(way, factory(), options), steps, warmup)
        expected = expected or outputs
        best, median = min(seconds[1 + warmup :]), statistics.median(seconds[1 + warmup :])
        timings.append(Timing(way, seconds[0], median, best, deviation(outputs, expected), counts[-1]))
        tell(f"{way}: {median * 1e3:.3g} ms a step, the first took {seconds[0]:.1f} s")
    _agree(timings, expected)
    return timings


@contextmanager
def _rewritten() -> Iterator[list[int]]:
    """How many states each graph compiled meanwhile has rewritten; begins with 0. Keeps no graph alive."""
    counts = [0]

    def count(record: GraphRecord) -> None:
        counts.append(len(record.rewritten))

    observers.listeners.append(count)
    try:
        yield counts
    finally:
        observers.listeners.remove(count)


def _compiled(way: str, call: Call, options: dict[str, Any]) -> Callable[[], Any]:
    fn, args = call
    torch._dynamo.reset()
    if way == "inductor":
        fn = torch.compile(fn)
    elif way == "kvbuffer":
        fn = torch.compile(fn, backend=kvbuffer, options=options)
    return lambda: fn(*args)


def _run(step: Callable[[], Any], steps: int, warmup: int) -> tuple[list[float], list[list[Tensor]]]:
    """Seconds of each step, the first one with compilation, and the outputs of the first ones."""
    seconds, outputs = [], []
    with torch.no_grad():
        for i in range(1 + warmup + steps):
            start = time.perf_counter()
            out = step()
            if torch.accelerator.is_available():
                torch.accelerator.synchronize()
            seconds.append(time.perf_counter() - start)
            if i < COMPARED:
                outputs.append([x.detach().clone() for x in tree_leaves(out) if isinstance(x, Tensor)])
    return seconds, outputs


def deviation(got: Sequence[Sequence[Tensor]], want: Sequence[Sequence[Tensor]]) -> float:
    """Largest difference of two runs, relative to the largest value of the second; inf where only one is finite."""
    worst = 0.0
    for mine, theirs in ((a, b) for x, y in zip(got, want, strict=True) for a, b in zip(x, y, strict=True)):
        if theirs.numel() == 0:
            continue
        difference = (mine.double() - theirs.double()).abs().nan_to_num(nan=float("inf"), posinf=float("inf"))
        same = (mine == theirs) | (mine.isnan() & theirs.isnan())
        scale = theirs.double().nan_to_num(0.0, 0.0, 0.0).abs().max().item()
        worst = max(worst, difference.masked_fill(same, 0.0).max().item() / max(scale, 1e-30))
    return worst


def _agree(timings: Sequence[Timing], expected: Sequence[Sequence[Tensor]]) -> None:
    floats = [x.dtype for step in expected for x in step if x.dtype.is_floating_point]
    ulp = max((torch.finfo(dtype).eps for dtype in floats), default=0.0)
    errors = {t.way: t.error for t in timings}
    allowed = 10 * errors["inductor"] + 64 * ulp
    if not errors["kvbuffer"] <= allowed:
        raise ArithmeticError(
            f"outputs differ from eager's by {errors['kvbuffer']:.3g} relative, {allowed:.3g} allowed"
        )


HEAD = ("", "median ms", "best ms", "speed", "first s", "error", "states")


def table(timings: Sequence[Timing]) -> str:
    """The timings for people, one line each, in milliseconds, and what the columns mean."""
    plain = next(t.median for t in timings if t.way == "inductor")
    rows = [
        (t.way, f"{t.median * 1e3:.3f}", f"{t.best * 1e3:.3f}", f"{plain / t.median:.2f}x", f"{t.first:.2f}",
         f"{t.error:.1e}", str(t.states))
        for t in timings
    ]  # fmt: skip
    widths = [max(map(len, column)) for column in zip(HEAD, *rows, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in (HEAD, *rows)]
    return "\n".join([
        *lines,
        "speed: against Inductor, by medians. first: the first step, with compilation. error: largest difference",
        "from eager's outputs, relative to the largest of them. states: how many are stepped by kernels of kvbuffer.",
    ])  # fmt: skip
