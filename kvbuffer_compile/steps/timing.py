"""Generated C++ kernels of a known recurrence, timed on this machine: what a call, a lane, an operation and a row take.

Two sizes of state tell what a lane costs from what its elements cost, three fills of the buffer what a row and a flush
cost, 16-bit states what conversions cost. All but the speed of memory is measured on one thread, with states that its
own cache holds.
"""

from __future__ import annotations

import ctypes
import functools
import statistics
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
from kvbuffer_compile.machine.numbers import MOST_FORK, Kernels, Speed
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
# Gated linear attention: a decay for each key row, so that rows are multiplied by decays before they are read.
GATED = parse(
    "program over b h tokens 1\ninput q: key(b h)\ninput k: key(b h)\ninput v: value(b h)\ninput a: key(b h)\n"
    "decay a\nupdate k, v\no = read q\nreturn o"
)
CHANGED, READ = 5, 2  # operations of PROGRAM on an element that it changes, and on one that it reads
SMALL, LARGE = (16, 16), (128, 128)
ROWS = 28  # owed in the second measurement
CAPACITY = 32
LAYOUT = Layout(((None,), (None,), (None,), (None,)), (0, 1, 2, 3))
CPU = torch.device("cpu")
Size = Callable[[tuple[int, int]], int]
TRIES = 2  # of timing kernels, where the first time others were at work
FORK_LANES = 256  # of a small state that all threads step


def with_kernels(machine: Machine) -> Machine:
    """The machine with what its kernels take: as it was kept, or timed now (3 s, and what nine take to compile)."""
    if machine.device != "cpu" or machine.kernels is not None:
        return machine
    timed = machine
    try:
        for _ in range(TRIES):
            kernels, speeds = _timed(machine)
            timed = replace(machine, kernels=kernels, speeds=speeds)
            if machine.busy or not timed.busy:  # its speeds, which are not measured here, would not change
                break
    except EmitError:
        return machine
    keep(timed)
    return timed


def calibrated(device: torch.device, target: str) -> Machine:
    """The machine a plan for this device and target is chosen by."""
    machine = machine_for(device)
    return with_kernels(machine) if target == "cpp" else machine


@neutral
def _timed(machine: Machine) -> tuple[Kernels, tuple[Speed, ...]]:
    progress.stage("timing kernels on this machine")
    plans = _Plans()
    with ThreadPoolExecutor() as pool:
        list(pool.map(ops.use_cpp, plans.all))
    with one_thread():
        kernels = _alone(plans)
    kernels = replace(kernels, fork=_fork(plans, kernels, machine.threads))
    levels = {s.bytes: _Level(plans, s.bytes, kernels, machine) for s in machine.speeds if s.bytes > machine.cache}
    if levels:
        kernels = replace(kernels, exposed=statistics.median(level.exposed for level in levels.values()))
    # What fits in the cores' caches was timed already.
    return kernels, tuple(levels[s.bytes].speed(s, kernels) if s.bytes in levels else s for s in machine.speeds)


def _fork(plans: _Plans, kernels: Kernels, threads: int) -> float:
    """What it takes to let all threads work, MOST_FORK at most."""
    step = _step(plans.changing[SMALL], FORK_LANES)
    together = _best(step)
    with one_thread():
        single = _best(step)
    return min(max(together - kernels.call - (single - kernels.call) / threads, 0.0), MOST_FORK)


class _Plans:
    """What is timed: steps that change a state, that read it, that read it before they change it; some with 16 bits."""

    def __init__(self) -> None:
        both = (SMALL, LARGE)
        self.changing = {s: _plan(PROGRAM, "recurrent", s) for s in both}
        self.reading = {s: _plan(PROGRAM, "buffered", s) for s in both}
        self.narrow = {s: _plan(PROGRAM, "buffered", s, torch.bfloat16) for s in both}
        self.rounding = _plan(PROGRAM, "recurrent", LARGE, torch.bfloat16)
        self.twice = _plan(TWICE, "recurrent", LARGE)
        self.gated = _plan(GATED, "buffered", LARGE)

    @property
    def all(self) -> list[Plan]:
        several = (self.changing, self.reading, self.narrow)
        return [*(plan for plans in several for plan in plans.values()), self.rounding, self.twice, self.gated]


def _alone(plans: _Plans) -> Kernels:
    """What kernels take on one thread and in its cache; nothing of threads and memory yet."""
    small, large = (_lane(plans.changing[s]) for s in (SMALL, LARGE))
    owing = {n: {s: _lane(plans.reading[s], n) for s in (SMALL, LARGE)} for n in (0, ROWS, CAPACITY)}
    narrow = {n: {s: _lane(plans.narrow[s], n) for s in (SMALL, LARGE)} for n in (0, ROWS)}
    gated = {n: _lane(plans.gated, n) for n in (0, ROWS)}
    lane, rate = _line(CHANGED, small, large)
    read_lane, read = _line(READ, owing[0][SMALL], owing[0][LARGE])
    rows = {s: (owing[ROWS][s] - owing[0][s]) / ROWS for s in (SMALL, LARGE)}
    row, walk = _line(2, rows[SMALL], rows[LARGE], sum)
    narrow_rows = {s: (narrow[ROWS][s] - narrow[0][s]) / ROWS for s in (SMALL, LARGE)}
    narrow_row, narrow_walk = _line(2, narrow_rows[SMALL], narrow_rows[LARGE], sum)
    packed = {s: (owing[CAPACITY][s] - owing[0][s]) / CAPACITY for s in (SMALL, LARGE)}
    pack, fold = _line(2, packed[SMALL], packed[LARGE])
    elements = prod(LARGE)
    copied = 2 * LARGE[0]  # of a row of GATED: a decay and a key
    return Kernels(
        call=max(_best(_step(plans.changing[SMALL], 1), 10) - small, 1e-9),
        rows_call=max(_best(_step(plans.reading[SMALL], 1), 10) - owing[0][SMALL], 1e-9),
        fork=0.0, lane=lane, rate=rate, read_lane=read_lane, read=read, row=row, walk=walk,
        gather=max((gated[ROWS] - gated[0]) / ROWS - rows[LARGE], 1e-12) / copied, pack=pack, fold=fold,
        bfloat16=(_lane(plans.rounding) - large) / elements,
        narrow_read=max(narrow[0][LARGE] - read_lane, 1e-12) / elements,
        narrow_row=narrow_row, narrow_walk=narrow_walk, exposed=0.0,
    )  # fmt: skip


class _Level:
    """What kernels take where states come from one level of the caches, or from memory."""

    def __init__(self, plans: _Plans, size: int, kernels: Kernels, machine: Machine) -> None:
        elements = max(1, size // (4 * prod(LARGE))) * prod(LARGE)
        self.bytes, self.kernels = 4 * elements, kernels

        def took(plan: Plan, owed: int = 0) -> float:
            called = kernels.rows_call if plan.variant == "buffered" else kernels.call
            step = _step(plan, elements * 4 // (prod(LARGE) * plan.state_dtype.itemsize), owed)
            return max(_best(step) - called - kernels.fork, 1e-9)

        def arithmetic(lane: float, operations: float, rate: float) -> float:
            return elements * (lane / prod(LARGE) + operations / rate) / machine.threads

        # Seconds in all, and those of them that are arithmetic.
        self.read = took(plans.reading[LARGE]), arithmetic(kernels.read_lane, READ, kernels.read)
        self.update = took(plans.changing[LARGE]), arithmetic(kernels.lane, CHANGED, kernels.rate)
        self.twice = took(plans.twice), arithmetic(kernels.lane, CHANGED + READ, kernels.rate)
        narrow = self.update[1] + elements * kernels.bfloat16 / machine.threads
        self.narrow = took(plans.rounding), 2 * narrow  # as many bytes are twice as many elements
        owing = ROWS * elements // prod(LARGE)
        walked = owing * (kernels.row + 2 * sum(LARGE) / kernels.walk) / machine.threads
        self.rows = max(took(plans.reading[LARGE], ROWS) - self.read[0], 1e-9), walked
        self.row_bytes = owing * 4 * (sum(LARGE) + 1)  # a key, a value, a decay

    @property
    def exposed(self) -> float:
        """Kernels.exposed that explains both steps, with more and with less arithmetic on as many bytes."""

        def off(exposed: float) -> float:
            kernels = replace(self.kernels, exposed=exposed)
            return abs(kernels.together(self.narrow[1], kernels.moving(*self.update)) - self.narrow[0])

        return min((n / 20 for n in range(21)), key=off)

    def speed(self, found: Speed, kernels: Kernels) -> Speed:
        """With these of kernels. None moves more than what does no arithmetic; and what moves less cannot take longer:
        where it did, others were at work."""
        least = self.bytes / max(found.read, found.copy / 2, found.update / 2)
        twice = max(kernels.moving(*self.twice), least)
        update = max(min(kernels.moving(*self.update), twice), least)
        read = max(min(kernels.moving(*self.read), update), least)
        rows = max(kernels.moving(*self.rows), self.row_bytes / found.read)
        both = 2 * self.bytes
        return replace(
            found, kernel_read=self.bytes / read, kernel_update=both / update, kernel_twice=both / twice,
            kernel_rows=self.row_bytes / rows,
        )  # fmt: skip


def _line(each: float, small: float, large: float, size: Size = prod) -> tuple[float, float]:
    """What a lane or row takes without operations, and how many a second there are.

    small, large: seconds at both sizes. each: operations on a number, of which there are so many."""
    slope = max(large - small, 1e-12) / (each * (size(LARGE) - size(SMALL)))
    return max(small - slope * each * size(SMALL), 1e-12), 1 / slope


def _plan(program: Program, variant: Variant, sizes: tuple[int, int], state: torch.dtype = torch.float32) -> Plan:
    capacity = 1 if variant == "recurrent" else CAPACITY
    dtypes = tuple(torch.float32 if v.kind == "scalar" else state for v in program.logged)
    return Plan(program, LAYOUT, variant, sizes, capacity, capacity, state, dtypes, target="cpp")


def filled(
    plan: Plan, lanes: tuple[int, ...], device: torch.device = CPU
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """(state, cursor, rows, operands) with numbers in them: memory that was never written is one page of zeros to a
    reader. Products of keys stay small, so that no state grows. In front of the operands the slots of a pool, all."""
    state, _, _, rows, operands, *slots = example(plan, lanes, 1, device)
    cursor = ops.new_cursor(plan, lanes, device)
    cursor[1] = plan.flush
    for x, value in ((state, 1.0), *((x, 0.5) for x in rows), *((x, 0.5 / max(plan.sizes)) for x in operands)):
        x.fill_(value)
    return state, cursor, rows, [*slots, *operands]


def _step(plan: Plan, lanes: int, owed: int = 0) -> Callable[[], Tensor]:
    """A step of a state of so many lanes, which owes the same number of rows at every call."""
    state, cursor, rows, operands = filled(plan, (1, lanes))
    op = ops.step_op(plan)
    if plan.variant == "recurrent":
        return functools.partial(op, state, *operands)

    # Of the one sequence. Past torch, where writing it takes as long as the whole call.
    owes = ctypes.c_int32.from_address(cursor.data_ptr())

    def step() -> Tensor:
        owes.value = owed
        return op(state, cursor, *rows, *operands)  # type: ignore[no-any-return]

    return step


def _best(step: Callable[[], Tensor], inner: int = 1) -> float:
    """Large states take several milliseconds a step, so they are given more time."""
    once = min(seconds(step, CPU, inner=inner, budget=0.03))
    return min(once, *seconds(step, CPU, inner=inner, budget=min(10 * once, 0.15)))


def _lane(plan: Plan, owed: int = 0) -> float:
    """Seconds of one lane: what more of them take more, so that neither the call nor Python counts. They take turns,
    and all of it fits in the cache of one core; where its pages lie matters, so several places are tried."""
    few, many = (1, 3) if plan.sizes == LARGE else (16, 48)
    rounds = []
    for _ in range(3):
        steps = [_step(plan, lanes, owed) for lanes in (few, many)]
        rounds += [[min(seconds(step, CPU, inner=8, budget=0.003)) for step in steps] for _ in range(2)]
    shortest, longer = (min(times) for times in zip(*rounds, strict=True))
    return float(max(longer - shortest, 1e-12)) / (many - few)
