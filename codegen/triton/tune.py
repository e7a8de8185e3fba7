"""The fastest launch of a kernel on the GPU at hand: measured once, kept on disk.

KVBUFFER_TUNE=0 turns the measuring off; what is on disk still counts, and else the model of launch.py.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import statistics
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from kvbuffer_compile.codegen.example import example, typical_lanes
from kvbuffer_compile.codegen.schedule import schedule
from kvbuffer_compile.codegen.triton import triton as emitter
from kvbuffer_compile.codegen.triton.launch import Config, space
from kvbuffer_compile.codegen.triton.load import load
from kvbuffer_compile.errors import EmitError
from kvbuffer_compile.ir.plan import Plan
from kvbuffer_compile.machine.measure import captured, seconds
from kvbuffer_compile.process import disk

LANES = 1024  # that a launch is timed with: enough for any GPU to be full
TOKENS = 4  # of a verify step
PERIODS = 4  # between two flushes, that are timed at once
EQUAL = 1.03  # times as long as the best: timings are not better than that
MOST_BYTES = 1 << 20  # of a file

Timer = Callable[[Plan, Config], float]


def tuned(plan: Plan, device: str, timer: Timer) -> Config:
    """The best launch of the plan's kernel on a device of this name.

    timer: seconds a step takes with a launch, inf when it cannot run. Used for the launches of launch.space when the
    disk knows no answer.
    """
    choices = space(plan, schedule(plan.program, in_place=plan.variant != "buffered"))
    path = _path(_key(plan, choices, device))
    known = path and _read(path, choices)
    if known is None and os.environ.get("KVBUFFER_TUNE") != "0":
        times = {config: timer(plan, config) for config in choices}
        known = min(choices, key=lambda c: times[c])
        if math.isinf(times[known]):
            raise EmitError(f"no launch of its Triton kernel runs on {device}\n{plan.program}")
        known = choices[0] if times[choices[0]] <= EQUAL * times[known] else known  # the model's own among equals
        if path and math.isfinite(times[known]):
            _write(path, known, times)
    return known or choices[0]


def _key(plan: Plan, choices: list[Config], device: str) -> str:
    import triton

    parts = (emitter.emit(plan, choices[0]), *map(str, choices), device, triton.__version__)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _path(key: str) -> Path | None:
    """The file of an answer; None where nothing can be kept."""
    try:
        return disk.folder() / f"launch_{key}.json"
    except OSError:
        return None


def _read(path: Path, choices: list[Config]) -> Config | None:
    """The answer in a file; None when there is none, or none that makes sense."""
    try:
        found = Config(**json.loads(disk.read(path, MOST_BYTES) or b"")["best"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return choices[choices.index(found)] if found in choices else None  # True is as good as 1, and prints otherwise


def _write(path: Path, best: Config, times: dict[Config, float]) -> None:
    """A cache that cannot be written costs the next process its time."""
    seconds = [{**asdict(c), "seconds": t} for c, t in times.items() if math.isfinite(t)]
    with suppress(OSError):
        disk.write(path, json.dumps({"best": asdict(best), "measured": seconds}, indent=1).encode())


def on_gpu(plan: Plan, config: Config) -> float:
    """Seconds a step takes on the current GPU; inf when it cannot be launched."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    with unset_fake_temporarily(), torch.no_grad():  # compilers run us under their fake tensors
        try:
            return _seconds(load(emitter.emit(plan, config)).launch, plan)
        except Exception:  # too much shared memory, an assembler that gives up: such a launch is no candidate
            return math.inf


def _seconds(launch: Any, plan: Plan) -> float:
    tokens = min(TOKENS, plan.capacity) if plan.several else 1
    arguments = example(plan, typical_lanes(plan, LANES), tokens, "cuda")
    steps = max(1, plan.flush // tokens)

    def period() -> None:
        for _ in range(PERIODS * steps):
            launch(*arguments)

    times = seconds(captured(period, arguments[0].device), arguments[0].device)
    return statistics.median(times) / (PERIODS * steps)
