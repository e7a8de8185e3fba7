"""Seconds per step of each way to serve a state, from the symbolic cost, a machine, and the constants below.

    seconds = max(bytes / bandwidth, operations / rate) + launches * launch

The bandwidth is that of the bytes that one call of the graph touches: whatever lies between two visits of a state
decides whether it is still in a cache. Generated C++ kernels are predicted from what kernels were timed to take here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from math import prod, sqrt

import sympy

from kvbuffer_compile.ir.plan import Variant
from kvbuffer_compile.ir.program import Read
from kvbuffer_compile.machine.numbers import Machine
from kvbuffer_compile.passes.choice import cost, kernels
from kvbuffer_compile.passes.choice.case import Case, Period, Work

# How far implementations are from the ideal traffic that cost.py counts. Measured with torch 2.13 on a CPU
# (AVX-512, 1 and 2 threads, states of 16 KB to 67 MB) and torch 2.11 on an H100 (2 MB to 1 GB); unless said otherwise
# in passes over the state at the bandwidth of a large copy. Where measurements differ, the value that favours Inductor.

# Inductor reads the state for the reads, again for the update, and writes it. H100: 3.3 (GDN), 3.5 (GLA), 4.8 (SSD).
PLAIN_PASSES = 3.0
# On a CPU a reduction over an axis that is not the innermost is slower still: on an EPYC GDN took 7 passes, GLA 4 to 5,
# on a Xeon 13 to 25 and 5 to 8.
PLAIN_STRIDED_READ = {"cpu": 2.0}
# In a cache its arithmetic takes longer than that: operations on an element of the state, at the rate of cached matrix
# products, with one read of the state and for each further one, and at least with 16 bits. Seen: 6.4 to 25 (GLA,
# Mamba-2), 16 to 44 (GDN, KDA, RWKV-7), at least 12 with 16 bits; reads that are contiguous were taken for half.
PLAIN_OPERATIONS, PLAIN_OPERATIONS_MORE, PLAIN_CONTIGUOUS = 6.0, 10.0, 0.5
PLAIN_NARROW = 12.0
BLOCK_UPDATE = 4.0  # passes: the product is written, read with the state, and the sum is written
# Blocks of tokens are products of matrices. One thread of an EPYC did, for 2, 4, 8, 16 and 32 rows, 1.6, 2.7, 4.0, 4.8
# and 5.1 times as many operations a second as machine.rate says (baddbmm with cached matrices of 64 x 64).
PRODUCTS, PRODUCTS_HALF = 5.5, 3.0
PLAIN_LAUNCHES = {"cpu": 1.0}  # GPU: 2, one kernel for the reductions and one for the update
# Generated C++ reached 0.67 to 0.73 of the read floor's bandwidth over a period of 16 steps.
KERNEL_EFFICIENCY = {"cpu": 0.7}  # GPU: 1, the recurrent kernel moved 1.13 times the bytes of a copy in the same time
KERNEL_LAUNCHES = {"cpu": 3.0}  # a C++ op dispatched from Python takes 4 to 5 us, a small ATen op 1.4 us. GPU: 1
# Composite steps: 0.5 ms (GDN, 6 ops) and 0.3 ms (GLA, 3 ops) on a state of 16 KB at 1.4 us a launch.
COMPOSITE_LAUNCHES, COMPOSITE_LAUNCHES_PER_OP = 63.0, 48.0
# Rows are masked, decayed and concatenated at full capacity in the compute dtype: 14 to 18 passes over them.
COMPOSITE_ROW_PASSES = 16.0
COMPOSITE_FLUSH_PASSES = 6.0  # temporaries of the size of the state; on a GPU at every step, to avoid a synchronisation
COMPOSITE_SHADOW_PASSES = 4.0  # it is widened, scaled and chosen beside the state, which is read as well
COMPOSITE_RECURRENT_PASSES = 20.0  # every op of the program makes a temporary of the size of the state

# A prediction must promise this much before a graph is rewritten ("never slower"); the composite one is the rougher.
MIN_GAIN = {"aten": 1.25}
MIN_GAIN_KERNEL = 1.1
# And this many times as much where the machine was measured while it was busy: small states were then predicted to gain
# 40 times, and lost. Large ones gain that much anyway.
MIN_GAIN_BUSY = 2.0

# Flush lengths worth a look. The optimum is flat (within 6% at a factor of sqrt(2)), so few are enough; Triton's
# tiles are powers of two, and loops over rows are unrolled by 4.
FLUSHES = (2, 4, 8, 12, 16, 24, 32, 48, 64)
# On GPUs a buffered step for one token is taken only where it was timed on that very card: on an H100 the recurrent
# kernel runs at copy bandwidth, 1.2 to 3.1 times Inductor, and whether the buffered one is faster still depends on
# kernel, dtype and batch in ways that bytes do not tell (benchmarks/results/gpu_h100.json).
FLUSHES_TRITON = (8, 16, 32)


@dataclass(frozen=True)
class Candidate:
    """One way to serve a state. bytes, seconds: per step, mean over a flush period. gain: plain over these seconds.
    around: of them what the host takes around the op of a kernel. measured: seconds of an op that was timed, None where
    none was."""

    variant: Variant
    flush: int
    bytes: float
    seconds: float
    gain: float
    around: float = 0.0
    measured: float | None = None


@dataclass(frozen=True)
class Prediction:
    """The candidates for one state, and what they are compared with.

    slot_bytes: one slot of the log, over all lanes. best_flush: L*, of the bytes alone. formula: L* with its numbers.
    shadow_bytes: of the shadow that buffered steps read, 0 for none.
    plain: the step as Inductor compiles it (flush 1, gain 1). chosen: index into candidates, None when declined.
    """

    machine: Machine
    target: str
    state_bytes: int
    slot_bytes: int
    best_flush: float
    formula: str
    plain: Candidate
    candidates: tuple[Candidate, ...]
    chosen: int | None = None
    shadow_bytes: int = 0

    @property
    def choice(self) -> Candidate | None:
        return None if self.chosen is None else self.candidates[self.chosen]

    @property
    def needed(self) -> float:
        """The gain that a candidate must promise to be taken."""
        return MIN_GAIN.get(self.target, MIN_GAIN_KERNEL) * (MIN_GAIN_BUSY if self.machine.busy else 1.0)


@functools.lru_cache(maxsize=256)
def predict(case: Case, machine: Machine, flushes: tuple[int, ...]) -> Prediction:
    """Every candidate: the recurrent step, and the buffered one at each of `flushes`. Nothing is chosen yet."""
    counts = _counts(case)
    plain_bytes, plain_seconds = _plain(case, machine, counts)
    serve = _composite if case.target == "aten" else _kernel

    def candidate(variant: Variant, flush: int) -> Candidate:
        moved, seconds = serve(case, machine, counts, variant, flush)
        seconds += _within(case) / (machine.rate * _products(case.tokens))
        return Candidate(variant, flush, moved, seconds, plain_seconds / seconds, _around(case, machine, variant))

    ladder = sorted(set(flushes) | {1} if case.tokens == 1 else set(flushes))
    candidates = tuple(candidate(_variant(case, flush), flush) for flush in ladder)
    plain = Candidate("recurrent", 1, plain_bytes, plain_seconds, 1.0)
    best, formula = _best_flush(case, counts)
    return Prediction(
        machine, case.target, case.state_bytes, round(counts.slot), best, formula, plain, candidates,
        shadow_bytes=case.elements * case.shadow_width,
    )  # fmt: skip


def with_measured(prediction: Prediction, times: Mapping[int, float]) -> Prediction:
    """The candidates that were timed, judged by that. times: seconds of an op by flush length."""

    def judged(c: Candidate) -> Candidate:
        spent = times[c.flush] + c.around
        return replace(c, seconds=spent, gain=prediction.plain.seconds / spent, measured=times[c.flush])

    timed = tuple(judged(c) for c in prediction.candidates if c.flush in times)
    return replace(prediction, candidates=timed) if timed else prediction


def _variant(case: Case, flush: int) -> Variant:
    if case.tokens > 1:
        return "block" if case.block else "verify"
    return "buffered" if flush > 1 else "recurrent"


# --------------------------------------------------------------------------------------------- symbolic part


_FIELDS = tuple(f.name for f in fields(Work))


@dataclass(frozen=True)
class _Counts:
    """The symbolic costs with everything but the flush length put in. computed_slot: a slot in the compute dtype."""

    slot: float
    computed_slot: float
    recurrent: Work
    buffered: Callable[[int], Period]


def _counts(case: Case) -> _Counts:
    widths = {"s": case.state_width, "h": case.shadow_width, "a": case.operand_width}
    known = cost.numbers(case.program, case.lanes, case.sizes, **widths, T=case.tokens)
    plain = cost.recurrent(case.program).map(lambda e: e.subs(known))
    log, shadow = (case.program, case.sequence, case.row_widths), case.shadow_width > 0
    steps = [make(*log, shadow=shadow) for make in (cost.reading, cost.flushing)]
    if case.block:  # its tokens do not walk each other's rows
        walks = sum(isinstance(op, Read) for op in case.program.ops) * cost.slot(case.program, case.sequence).walk
        steps = [step.plus(row_operations=-cost.T * (cost.T - 1) / 2 * walks) for step in steps]
    reading, flushing = (_by_flush(step.map(lambda e: e.subs(known))) for step in steps)
    computed_widths = (case.compute_width,) * len(case.row_widths)
    sizes = [cost.slot(case.program, case.sequence, w).size.subs(known) for w in (case.row_widths, computed_widths)]
    recurrent = Work(*(float(getattr(plain, name)) for name in _FIELDS))
    return _Counts(
        float(sizes[0]), float(sizes[1]), recurrent,
        lambda flush: Period(reading(flush), flushing(flush), case.tokens / flush),
    )  # fmt: skip


def _by_flush(step: cost.Cost) -> Callable[[int], Work]:
    """The work of a step by the flush length, the only symbol left in it."""
    at = sympy.lambdify(cost.L, [getattr(step, name) for name in _FIELDS], "math")
    return lambda flush: Work(*map(float, at(flush)))


def _best_flush(case: Case, counts: _Counts) -> tuple[float, str]:
    """L* = sqrt(2 s K V / slot) per lane: cost.best_flush with numbers; for K = V = d that is sqrt(s d / (b g)). With a
    shadow of h bytes a flush writes that too, and reads the state where a step reads the shadow, in each of p passes.
    """
    k, v = case.sizes
    lane_slot = counts.slot / max(prod(case.lanes), 1)
    if lane_slot == 0:
        return 1.0, "nothing to log"
    moved, name = case.state_width, "s"
    if case.shadow_width:
        less = round(counts.recurrent.passes) * (case.state_width - case.shadow_width)
        moved, name = moved + case.shadow_width + less, "(s+h+p(s-h))"
    best = sqrt(2 * moved * k * v / lane_slot)
    return best, f"L* = sqrt(2*{name}*K*V/slot) = sqrt(2*{moved}*{k}*{v}/{lane_slot:.4g}) = {best:.1f}"


# --------------------------------------------------------------------------------------- implementations


def _seconds(case: Case, machine: Machine, moved: float, operations: float, launches: float) -> float:
    bandwidth = machine.speed("copy", case.working_set)
    return max(moved / bandwidth, operations / machine.rate) + launches * machine.launch


def _plain(case: Case, machine: Machine, counts: _Counts) -> tuple[float, float]:
    if case.block:  # a product of matrices for each read, and one for the update of all tokens, stored and added
        reads = sum(isinstance(op, Read) for op in case.program.ops)
        passes = reads + BLOCK_UPDATE if machine.device == "cpu" else PLAIN_PASSES
        moved = passes * case.state_bytes + counts.recurrent.operands
        launches = len(case.program.ops) * PLAIN_LAUNCHES.get(machine.device, 2.0)
        operations = counts.recurrent.operations / _products(case.tokens)
        return moved, _seconds(case, machine, moved, operations, launches)
    passes = PLAIN_PASSES + PLAIN_STRIDED_READ.get(machine.device, 0.0) * case.strided
    moved = passes * case.tokens * case.state_bytes + counts.recurrent.operands
    launches = PLAIN_LAUNCHES.get(machine.device, 2.0) * case.tokens
    operations = float(counts.recurrent.operations)
    if machine.device == "cpu":
        reads = sum(isinstance(op, Read) for op in case.program.ops)
        each = PLAIN_OPERATIONS + PLAIN_OPERATIONS_MORE * max(reads - 1, 0)
        each = max(each, PLAIN_NARROW if case.state_width < case.compute_width else 0.0)
        operations = each * (1.0 if case.strided else PLAIN_CONTIGUOUS) * case.tokens * case.elements
    return moved, _seconds(case, machine, moved, operations, launches)


def _products(tokens: int) -> float:
    """How many times machine.rate products of matrices do that have as many rows."""
    return PRODUCTS * tokens / (tokens + PRODUCTS_HALF)


def _within(case: Case) -> float:
    """Operations of the products that a block adds to reads, as matrix products."""
    return case.within * prod(case.lanes) * 2 * case.tokens**2 * sum(case.sizes)


def _kernel(case: Case, machine: Machine, counts: _Counts, variant: Variant, flush: int) -> tuple[float, float]:
    period = None if variant == "recurrent" else counts.buffered(max(flush, case.tokens))
    work = counts.recurrent if period is None else period.mean
    if machine.kernels is not None:
        if period is None:
            return work.bytes, kernels.recurrent(case, machine, machine.kernels, work)
        return work.bytes, kernels.buffered(case, machine, machine.kernels, period)
    launches, efficiency = KERNEL_LAUNCHES.get(machine.device, 1.0), KERNEL_EFFICIENCY.get(machine.device, 1.0)
    operations = (work.operations + work.row_operations + work.gathered + work.fold_operations) / efficiency
    return work.bytes, _seconds(case, machine, work.bytes / efficiency, operations, launches)


def _around(case: Case, machine: Machine, variant: Variant) -> float:
    """Composite steps are many ops, and how many depends on the variant."""
    if case.target == "aten":
        return 0.0
    launches = KERNEL_LAUNCHES.get(machine.device, 1.0)
    return launches * machine.launch if machine.kernels is None else kernels.host(case, machine, variant)


def _composite(case: Case, machine: Machine, counts: _Counts, variant: Variant, flush: int) -> tuple[float, float]:
    launches = COMPOSITE_LAUNCHES_PER_OP * len(case.program.ops) + COMPOSITE_LAUNCHES
    passes, rows = COMPOSITE_RECURRENT_PASSES, 0.0
    if variant == "recurrent":
        launches /= 6  # 87 us against 490 (GDN)
    else:
        reads = sum(isinstance(op, Read) for op in case.program.ops)
        passes = reads + COMPOSITE_FLUSH_PASSES / (flush if machine.device == "cpu" else 1)
        passes += COMPOSITE_SHADOW_PASSES if case.shadow_width else 0.0
        rows = COMPOSITE_ROW_PASSES * counts.computed_slot * max(flush, case.capacity)
    if case.slots:  # taken out and put back: the state when it was written, all rows
        passes += 2 + 2 / (flush if machine.device == "cpu" else 1)
        rows += 3 * counts.slot * max(flush, case.capacity) if variant != "recurrent" else 0.0
    if case.state_width != case.compute_width:  # a copy of the state in the compute dtype, at every step
        passes += 1 + 2 * case.compute_width / case.state_width
    moved = passes * case.state_bytes + rows + counts.recurrent.operands
    return moved, _seconds(case, machine, moved, 0.0, launches)
