"""Seconds of a generated C++ step, from what such kernels were timed to take on the machine (machine.Kernels)."""

from __future__ import annotations

from math import prod

from kvbuffer_compile.ir.plan import Variant
from kvbuffer_compile.ir.program import Read
from kvbuffer_compile.machine.numbers import Kernels, Kind, Machine
from kvbuffer_compile.passes.choice.case import Case, Work

# A call of a rewritten graph and each of its states cost the host so many launches (of 2.5 us) more than Inductor's
# graph: accounts are found, rows handed over, and what stands around a step is no longer one kernel with it. In a loop
# of nothing else 14 and 1.5 (benchmarks/results/host.json); between real work, when nothing of it is in a cache, 30 to
# 60 and 4 to 8 (benchmarks/results/sweep_epyc.json).
CALL_LAUNCHES, STATE_LAUNCHES = 32.0, 5.0
# Operations that 16-bit elements of a state take more: to be read, and to be read and rounded. A further read in the
# same pass takes half of the first.
CONVERTED, CONVERTED_BOTH = 2.0, 8.0
FOLDED = 2.0  # times as many operations a second in a flush as in a plain step: a product of matrices
THREADED = 1 << 14  # elements of a state from which on a C++ step runs on all threads


def seconds(case: Case, machine: Machine, timed: Kernels, work: Work, variant: Variant) -> float:
    """A C++ step: arithmetic on all threads, or the state's way from where it is, whatever takes longer."""
    lanes, narrow = prod(case.lanes), case.elements if case.read_width < case.compute_width else 0
    if variant == "recurrent":
        narrow = case.elements if case.state_width < case.compute_width else 0
        arithmetic = lanes * timed.lane + (work.operations + CONVERTED_BOTH * narrow) / timed.rate
    else:
        reads = sum(isinstance(op, Read) for op in case.program.ops)
        shared = max(reads - work.passes, 0) * case.elements
        arithmetic = lanes * timed.read_lane + (work.operations - shared + CONVERTED * narrow) / timed.read
        arithmetic += work.row_operations / timed.walk + work.fold_operations / (FOLDED * timed.rate)
    working_set = case.working_set + case.states * (work.rows_read + work.rows_written)
    if variant == "recurrent":
        passes: Kind = "kernel_twice" if work.state_read > case.state_bytes else "kernel_update"
        moving = 2 * case.state_bytes / machine.speed(passes, working_set)
    else:
        once = work.state_read / max(work.passes, 1)  # passes after the first find a lane in the nearest cache
        moving = once / machine.speed("kernel_read", working_set)
        moving += work.state_written / machine.speed("kernel_update", working_set)
    moving += (work.rows_read + work.rows_written + work.operands) / machine.speed("read", working_set)
    threads = machine.threads if case.elements >= THREADED else 1
    fork = timed.fork if threads > 1 else 0.0
    return timed.call + fork + max(arithmetic / threads, moving) + host(case, machine)


def host(case: Case, machine: Machine) -> float:
    """Seconds around the op that Inductor's graph does not need."""
    return (STATE_LAUNCHES + CALL_LAUNCHES / case.states) * machine.launch
