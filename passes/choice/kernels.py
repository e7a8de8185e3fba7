"""Seconds of a generated C++ step, from what such kernels were timed to take on the machine (machine.Kernels)."""

from __future__ import annotations

from math import prod

from kvbuffer_compile.ir.plan import Variant
from kvbuffer_compile.ir.program import Read
from kvbuffer_compile.machine.numbers import Kernels, Kind, Machine
from kvbuffer_compile.passes.choice import cost
from kvbuffer_compile.passes.choice.case import Case, Period, Work

# A call of a rewritten graph and each of its states cost the host so many launches more than Inductor's graph: accounts
# are found, rows handed over, and what stands around a step is no longer one kernel with it. In a loop of nothing else
# it is a tenth of that; here nothing of it is in a cache, as between real work (benchmarks/results/host.json).
CALL_LAUNCHES, STATE_LAUNCHES = 20.0, 3.0
CALL_WITH_ROWS, STATE_WITH_ROWS = 32.0, 5.0
THREADED = 1 << 14  # elements of a state from which on a C++ step runs on all threads
READ = 2  # operations on an element that is read
ROOMY = 0.25  # of a core's cache: so much of it is found again


def recurrent(case: Case, machine: Machine, timed: Kernels, work: Work) -> float:
    """A C++ step that reads and writes the state: arithmetic on all threads, and the state's way from where it is,
    which hide each other in part."""
    times = cost.meetings(case.program)
    kind: Kind = "kernel_twice" if times > 1 else "kernel_update"
    moving = 2 * case.state_bytes / machine.speed(kind, case.working_set) + _met_again(case, machine, times)
    arithmetic = prod(case.lanes) * timed.lane + max(work.operations / timed.rate + _rounding(case, timed), 0.0)
    vectors = work.operands / machine.speed("read", case.working_set)
    threads, fork = _threads(case, machine, timed)
    return timed.call + fork + timed.together(arithmetic / threads, moving) + vectors + host(case, machine, "recurrent")


def _met_again(case: Case, machine: Machine, times: int) -> float:
    """Seconds in which passes after the first fetch a lane from behind the core's own cache. What was timed had small
    lanes, which were still there; while a lane is met again the next one comes in. Caches do not forget the oldest
    first: of two lanes that fill half of one a third is gone, of two that fill it all is."""
    filled = 2 * prod(case.sizes) * case.state_width * machine.threads / machine.cache
    gone = min(max((filled - ROOMY) / (1 - ROOMY), 0.0), 1.0)
    return gone * (times - 1) * case.state_bytes / machine.speed("kernel_read", 2 * machine.cache)


def buffered(case: Case, machine: Machine, timed: Kernels, period: Period) -> float:
    """The mean C++ step of a flush period. Each lane gathers its rows, passes over its part of the state and adds the
    rows to what it has read, one after the other: what one part waits for, another does not hide."""
    between = case.working_set + case.states * (period.mean.rows_read + period.mean.rows_written)
    threads, fork = _threads(case, machine, timed)

    def step(work: Work, flushes: bool) -> float:
        passing = timed.together(
            _pass_arithmetic(case, timed, work, flushes) / threads, _pass_moving(case, machine, work, flushes, between)
        )
        # A row that is stored is fetched before, and written back later.
        rows_moving = (work.rows_read + 2 * work.rows_written) / machine.speed("kernel_rows", between)
        rows = timed.together(_row_arithmetic(case, timed, work, flushes) / threads, rows_moving)
        return passing + rows + work.operands / machine.speed("read", between)

    ordinary, last = step(period.reading, False), step(period.flushing, True)
    mean = (1 - period.share) * ordinary + period.share * last
    return timed.rows_call + fork + mean + host(case, machine, "buffered")


def _pass_arithmetic(case: Case, timed: Kernels, work: Work, flushes: bool) -> float:
    reads = sum(isinstance(op, Read) for op in case.program.ops)
    shared = max(reads - work.passes, 0) * case.elements  # a further read in a pass takes half: it loads nothing
    spent = prod(case.lanes) * timed.read_lane + (work.operations - shared) / timed.read
    if (case.state_width if flushes else case.read_width) < case.compute_width:
        spent += work.passes * case.elements * (timed.narrow_read - READ / timed.read)
    if flushes:
        spent += max(work.fold_operations / timed.fold + _rounding(case, timed), 0.0)
    return spent


def _pass_moving(case: Case, machine: Machine, work: Work, flushes: bool, between: float) -> float:
    once = work.state_read / max(work.passes, 1)  # passes after the first find a lane in the nearest cache
    if flushes:
        return (once + work.state_written) / machine.speed("kernel_update", between)
    return once / machine.speed("kernel_read", between)


def _row_arithmetic(case: Case, timed: Kernels, work: Work, flushes: bool) -> float:
    narrow = any(width < case.compute_width for width in case.row_widths)
    row, walk = (timed.narrow_row, timed.narrow_walk) if narrow else (timed.row, timed.walk)
    each = timed.pack + max(row - timed.row, 0.0) if flushes else row
    return work.rows * each + work.row_operations / walk + work.gathered * timed.gather


def _rounding(case: Case, timed: Kernels) -> float:
    """What 16-bit elements that are read and written take more. Processors round to float16 by one instruction, which
    took 0 to 0.02 ns an element where ten took 0.11 for bfloat16."""
    if case.state_width >= case.compute_width:
        return 0.0
    return case.elements * (min(timed.bfloat16, 0.0) if case.float16 else timed.bfloat16)


def _threads(case: Case, machine: Machine, timed: Kernels) -> tuple[int, float]:
    """How many threads a step runs on, and the seconds it takes to let them."""
    threads = machine.threads if case.elements >= THREADED else 1
    return threads, timed.fork if threads > 1 else 0.0


def host(case: Case, machine: Machine, variant: Variant) -> float:
    """Seconds around the op that Inductor's graph does not need."""
    if variant == "recurrent":
        return (STATE_LAUNCHES + CALL_LAUNCHES / case.states) * machine.launch
    return (STATE_WITH_ROWS + CALL_WITH_ROWS / case.states) * machine.launch
