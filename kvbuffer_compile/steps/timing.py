"""Generated C++ kernels of a known recurrence, timed on this machine: what a call, a lane, an operation and a row take.

Two sizes of state tell what a lane costs from what its elements cost, two fills of the buffer what a row costs. All but
the speed of memory is measured on one thread, with states that its own cache holds.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from math import prod

import torch
from torch import Tensor

from kvbuffer_compile.codegen.example import example
from kvbuffer_compile.errors import EmitError
from kvbuffer_compile.ir.plan import Layout, Plan, Variant
from kvbuffer_compile.ir.program import Program
from kvbuffer_compile.ir.text import parse
from kvbuffer_compile.machine import Machine, keep, machine_for
from kvbuffer_compile.machine.measure import one_thread, seconds
from kvbuffer_compile.machine.numbers import Kernels, Speed
from kvbuffer_compile.process import progress
from kvbuffer_compile.process.surroundings import neutral
from kvbuffer_compile.steps import ops

# Linear attention with a decay for each head (Mamba-2, RetNet): one read, one update, all in one pass.
PROGRAM = parse(
    "program over b h tokens 1\ninput q: key(b h)\ninput k: key(b h)\ninput v: value(b h)\ninput g: scalar(b h)\n"
    "decay g\nupdate k, v\no = read q\nreturn o"
)
# Gated DeltaNet: what is read decides what is written, so that a plain step passes twice.
TWICE = parse(
    "program over b h tokens 1\ninput q: key(b h)\ninput k: key(b h)\ninput v: value(b h)\ninput g: scalar(b h)\n"
    "decay g\ny = read k\nd = aten.sub.Tensor(v, y)\nupdate k, d\no = read q\nreturn o"
)
SMALL, LARGE = (16, 16), (128, 128)
ROWS = 28  # owed in the second measurement
CAPACITY = 32
LAYOUT = Layout(((None,), (None,), (None,), (None,)), (0, 1, 2, 3))
CPU = torch.device("cpu")
Size = Callable[[tuple[int, int]], int]
FORK_LANES = 256  # of a small state that all threads step


def with_kernels(machine: Machine) -> Machine:
    """The machine with what its kernels take: as it was kept, or timed now (4 s, half of it the compiler's)."""
    if machine.device != "cpu" or machine.kernels is not None:
        return machine
    try:
        kernels, speeds = _timed(machine)
    except EmitError:
        return machine
    timed = replace(machine, kernels=kernels, speeds=speeds)
    keep(timed)
    return timed


def calibrated(device: torch.device, target: str) -> Machine:
    """The machine a plan for this device and target is chosen by."""
    machine = machine_for(device)
    return with_kernels(machine) if target == "cpp" else machine


@neutral
def _timed(machine: Machine) -> tuple[Kernels, tuple[Speed, ...]]:
    progress.stage("timing kernels on this machine")
    changing = {s: _plan(PROGRAM, "recurrent", s) for s in (SMALL, LARGE)}
    reading = {s: _plan(PROGRAM, "buffered", s) for s in (SMALL, LARGE)}
    twice = _plan(TWICE, "recurrent", LARGE)
    with ThreadPoolExecutor() as pool:
        list(pool.map(ops.use_cpp, (*changing.values(), *reading.values(), twice)))
    with one_thread():
        small, large = (_lane(changing[s]) for s in (SMALL, LARGE))
        empty, full = ({s: _lane(reading[s], n) for s in (SMALL, LARGE)} for n in (0, ROWS))
        call = max(_best(_step(changing[SMALL], 1), 10) - small, 1e-9)
        alone = _best(_step(changing[SMALL], FORK_LANES), 10)
    together = _best(_step(changing[SMALL], FORK_LANES), 10)
    fork = max(together - call - (alone - call) / machine.threads, 0.0)
    lane, rate = _line(5, small, large)  # operations on an element: decay 1, update 2, read 2
    read_lane, read = _line(2, empty[SMALL], empty[LARGE])
    rows = {s: (full[s] - empty[s]) / ROWS for s in (SMALL, LARGE)}
    row, walk = _line(2, rows[SMALL], rows[LARGE], sum)
    kernels = Kernels(call, fork, lane, rate, read_lane, read, row, walk)
    return kernels, tuple(
        _with_memory(s, changing[LARGE], twice, reading[LARGE], call, machine) for s in machine.speeds
    )


def _line(each: float, small: float, large: float, size: Size = prod) -> tuple[float, float]:
    """What a lane or row takes without operations, and how many a second there are.

    small, large: seconds at both sizes. each: operations on a number, of which there are so many."""
    slope = max(large - small, 1e-12) / (each * (size(LARGE) - size(SMALL)))
    return max(small - slope * each * size(SMALL), 1e-12), 1 / slope


def _plan(program: Program, variant: Variant, sizes: tuple[int, int]) -> Plan:
    capacity = 1 if variant == "recurrent" else CAPACITY
    dtypes = (torch.float32,) * len(program.logged)
    return Plan(program, LAYOUT, variant, sizes, capacity, capacity, torch.float32, dtypes, target="cpp")


def filled(
    plan: Plan, lanes: tuple[int, ...], device: torch.device = CPU
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """(state, cursor, rows, operands) with numbers in them: memory that was never written is one page of zeros to a
    reader. Products of keys stay small, so that no state grows."""
    state, _, _, rows, operands = example(plan, lanes, 1, device)
    cursor = ops.new_cursor(plan, lanes, device)
    cursor[1] = plan.flush
    for x, value in ((state, 1.0), *((x, 0.5) for x in rows), *((x, 0.5 / max(plan.sizes)) for x in operands)):
        x.fill_(value)
    return state, cursor, rows, operands


def _step(plan: Plan, lanes: int, owed: int = 0) -> Callable[[], Tensor]:
    """A step of a state of so many lanes, which owes the same number of rows at every call."""
    state, cursor, rows, operands = filled(plan, (1, lanes))
    op = ops.step_op(plan)
    if plan.variant == "recurrent":
        return functools.partial(op, state, *operands)

    def step() -> Tensor:
        cursor[0] = owed
        return op(state, cursor, *rows, *operands)  # type: ignore[no-any-return]

    return step


def _lanes(size: int) -> int:
    return max(1, size // (4 * prod(LARGE)))


def _best(step: Callable[[], Tensor], inner: int = 1) -> float:
    """Large states take several milliseconds a step, so they are given more time."""
    once = min(seconds(step, CPU, inner=inner, budget=0.03))
    return min(once, *seconds(step, CPU, inner=inner, budget=min(10 * once, 0.15)))


def _lane(plan: Plan, owed: int = 0) -> float:
    """Seconds of one lane: what more of them take more, so that neither the call nor Python counts. They take turns,
    and all of it fits in the cache of one core."""
    few, many = (1, 3) if plan.sizes == LARGE else (16, 48)
    steps = [_step(plan, lanes, owed) for lanes in (few, many)]
    rounds = [[min(seconds(step, CPU, inner=8, budget=0.004)) for step in steps] for _ in range(8)]
    shortest, longer = (min(times) for times in zip(*rounds, strict=True))
    return float(max(longer - shortest, 1e-12)) / (many - few)


def _with_memory(speed: Speed, once: Plan, twice: Plan, reading: Plan, call: float, machine: Machine) -> Speed:
    """With what kernels reach where states come from there; those that fit in the cores' caches were timed already."""
    if speed.bytes <= machine.cache:
        return speed
    lanes = _lanes(speed.bytes)
    moved = 4 * lanes * prod(LARGE)
    read, update, again = (moved / max(_best(_step(plan, lanes)) - call, 1e-9) for plan in (reading, once, twice))
    return replace(speed, kernel_read=read, kernel_update=2 * update, kernel_twice=2 * again)
