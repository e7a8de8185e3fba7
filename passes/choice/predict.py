"""Seconds per step of each way to serve a state, from the symbolic cost, a machine, and the constants below.

    seconds = max(bytes / bandwidth, operations / rate) + launches * launch

A state that fits in the cache is counted at the cache's bandwidth.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod, sqrt

import sympy

from kvbuffer_compile.ir.plan import Variant
from kvbuffer_compile.ir.program import Program, Read
from kvbuffer_compile.machine import Machine
from kvbuffer_compile.passes.choice import cost

# How far implementations are from the ideal traffic that cost.py counts. Measured with torch 2.13 on a CPU
# (AVX-512, 1 and 2 threads, states of 16 KB to 67 MB) and torch 2.11 on an H100 (2 MB to 1 GB); unless said otherwise
# in passes over the state at the bandwidth of a large copy. Where measurements differ, the value that favours Inductor.

# Inductor reads the state for the reads, again for the update, and writes it. H100: 3.3 (GDN), 3.5 (GLA), 4.8 (SSD).
PLAIN_PASSES = 3.0
# On a CPU a reduction over an axis that is not the innermost is slower still: GDN took 13 to 25 passes, GLA 5 to 8.
PLAIN_STRIDED_READ = {"cpu": 2.0}
PLAIN_LAUNCHES = {"cpu": 1.0}  # GPU: 2, one kernel for the reductions and one for the update
# Generated C++ reached 0.67 to 0.73 of the read floor's bandwidth over a period of 16 steps.
KERNEL_EFFICIENCY = {"cpu": 0.7}  # GPU: 1, the recurrent kernel moved 1.13 times the bytes of a copy in the same time
KERNEL_LAUNCHES = {"cpu": 3.0}  # a C++ op dispatched from Python takes 4 to 5 us, a small ATen op 1.4 us. GPU: 1
# Composite steps: 0.5 ms (GDN, 6 ops) and 0.3 ms (GLA, 3 ops) on a state of 16 KB at 1.4 us a launch.
COMPOSITE_LAUNCHES, COMPOSITE_LAUNCHES_PER_OP = 63.0, 48.0
# Rows are masked, decayed and concatenated at full capacity in the compute dtype: 14 to 18 passes over them.
COMPOSITE_ROW_PASSES = 16.0
COMPOSITE_FLUSH_PASSES = 6.0  # temporaries of the size of the state; on a GPU at every step, to avoid a synchronisation
COMPOSITE_RECURRENT_PASSES = 20.0  # every op of the program makes a temporary of the size of the state

# A prediction must promise this much before a graph is rewritten ("never slower"); the composite one is the rougher.
MIN_GAIN = {"aten": 1.25}
MIN_GAIN_KERNEL = 1.1

# Flush lengths worth a look. The optimum is flat (within 6% at a factor of sqrt(2)), so few are enough; Triton's
# tiles are powers of two, and loops over rows are unrolled by 4.
FLUSHES = (2, 4, 8, 12, 16, 24, 32, 48, 64)
# On an H100 the generated recurrent kernel runs at copy bandwidth, 1.2 to 3.1 times Inductor, and the buffered one is
# slower in all but scalar-gated float32 cases (benchmarks/results/gpu_h100.json): only an explicit flush asks for it.
FLUSHES_TRITON: tuple[int, ...] = ()


@dataclass(frozen=True)
class Case:
    """Everything a prediction depends on, in numbers.

    lanes: sizes of program.lanes. sizes: (K, V). Widths are bytes of an element, row_widths one for each of
    program.logged. strided: reads that contract an axis of the state that is not its innermost one.
    capacity: slots that the user wants at least, 0 for none. target: "aten", "cpp" or "triton". tokens: of one step.
    slots: the sequences are taken out of a pool.
    """

    program: Program
    sequence: bool
    lanes: tuple[int, ...]
    sizes: tuple[int, int]
    state_width: int
    row_widths: tuple[int, ...]
    operand_width: int
    compute_width: int
    strided: int
    capacity: int
    target: str
    tokens: int = 1
    slots: bool = False

    @property
    def state_bytes(self) -> int:
        return prod(self.lanes) * prod(self.sizes) * self.state_width


@dataclass(frozen=True)
class Candidate:
    """One way to serve a state. bytes, seconds: per step, mean over a flush period. gain: plain over these seconds."""

    variant: Variant
    flush: int
    bytes: float
    seconds: float
    gain: float


@dataclass(frozen=True)
class Prediction:
    """The candidates for one state, and what they are compared with.

    slot_bytes: one slot of the log, over all lanes. best_flush: L*, of the bytes alone. formula: L* with its numbers.
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

    @property
    def choice(self) -> Candidate | None:
        return None if self.chosen is None else self.candidates[self.chosen]


@functools.lru_cache(maxsize=256)
def predict(case: Case, machine: Machine, flushes: tuple[int, ...]) -> Prediction:
    """Every candidate: the recurrent step, and the buffered one at each of `flushes`. Nothing is chosen yet."""
    counts = _counts(case)
    plain_bytes, plain_seconds = _plain(case, machine, counts)
    serve = _composite if case.target == "aten" else _kernel

    def candidate(variant: Variant, flush: int) -> Candidate:
        moved, seconds = serve(case, machine, counts, variant, flush)
        return Candidate(variant, flush, moved, seconds, plain_seconds / seconds)

    ladder = sorted(set(flushes) | {1} if case.tokens == 1 else set(flushes))
    candidates = tuple(candidate(_variant(case, flush), flush) for flush in ladder)
    plain = Candidate("recurrent", 1, plain_bytes, plain_seconds, 1.0)
    best, formula = _best_flush(case, counts)
    return Prediction(machine, case.target, case.state_bytes, round(counts.slot), best, formula, plain, candidates)


def _variant(case: Case, flush: int) -> Variant:
    if case.tokens > 1:
        return "verify"
    return "buffered" if flush > 1 else "recurrent"


# --------------------------------------------------------------------------------------------- symbolic part


@dataclass(frozen=True)
class _Counts:
    """The symbolic costs with everything but the flush length put in. computed_slot: a slot in the compute dtype."""

    slot: float
    computed_slot: float
    operands: float
    recurrent_bytes: float
    recurrent_operations: float
    buffered_bytes: Callable[[int], float]
    buffered_operations: Callable[[int], float]


def _counts(case: Case) -> _Counts:
    known = cost.numbers(case.program, case.lanes, case.sizes, s=case.state_width, a=case.operand_width, T=case.tokens)
    plain = cost.recurrent(case.program).map(lambda e: e.subs(known))
    log = cost.buffered(case.program, case.sequence, case.row_widths).map(lambda e: e.subs(known))
    computed_widths = (case.compute_width,) * len(case.row_widths)
    sizes = [cost.slot(case.program, case.sequence, w).size.subs(known) for w in (case.row_widths, computed_widths)]
    return _Counts(
        float(sizes[0]), float(sizes[1]), float(plain.operands), float(plain.bytes), float(plain.operations),
        sympy.lambdify(cost.L, log.bytes, "math"), sympy.lambdify(cost.L, log.operations, "math"),
    )  # fmt: skip


def _best_flush(case: Case, counts: _Counts) -> tuple[float, str]:
    """L* = sqrt(2 s K V / slot) per lane: cost.best_flush with numbers; for K = V = d that is sqrt(s d / (b g))."""
    k, v = case.sizes
    lane_slot = counts.slot / max(prod(case.lanes), 1)
    if lane_slot == 0:
        return 1.0, "nothing to log"
    best = sqrt(2 * case.state_width * k * v / lane_slot)
    return best, f"L* = sqrt(2*s*K*V/slot) = sqrt(2*{case.state_width}*{k}*{v}/{lane_slot:.4g}) = {best:.1f}"


# --------------------------------------------------------------------------------------- implementations


def _seconds(case: Case, machine: Machine, moved: float, operations: float, launches: float) -> float:
    bandwidth = machine.cache_bandwidth if case.state_bytes <= machine.cache else machine.bandwidth
    return max(moved / bandwidth, operations / machine.rate) + launches * machine.launch


def _plain(case: Case, machine: Machine, counts: _Counts) -> tuple[float, float]:
    passes = PLAIN_PASSES + PLAIN_STRIDED_READ.get(machine.device, 0.0) * case.strided
    moved = passes * case.tokens * case.state_bytes + counts.operands
    launches = PLAIN_LAUNCHES.get(machine.device, 2.0) * case.tokens
    return moved, _seconds(case, machine, moved, counts.recurrent_operations, launches)


def _kernel(case: Case, machine: Machine, counts: _Counts, variant: Variant, flush: int) -> tuple[float, float]:
    if variant == "recurrent":
        moved, operations = counts.recurrent_bytes, counts.recurrent_operations
    else:
        period = max(flush, case.tokens)
        moved, operations = counts.buffered_bytes(period), counts.buffered_operations(period)
    launches, efficiency = KERNEL_LAUNCHES.get(machine.device, 1.0), KERNEL_EFFICIENCY.get(machine.device, 1.0)
    if variant == "recurrent" and machine.update_bandwidth and case.state_bytes > machine.cache:
        machine = replace(machine, bandwidth=machine.update_bandwidth)  # it changes the state in place
    spent = _seconds(case, machine, moved / efficiency, operations / efficiency, launches)
    return moved, spent


def _composite(case: Case, machine: Machine, counts: _Counts, variant: Variant, flush: int) -> tuple[float, float]:
    launches = COMPOSITE_LAUNCHES_PER_OP * len(case.program.ops) + COMPOSITE_LAUNCHES
    passes, rows = COMPOSITE_RECURRENT_PASSES, 0.0
    if variant == "recurrent":
        launches /= 6  # 87 us against 490 (GDN)
    else:
        reads = sum(isinstance(op, Read) for op in case.program.ops)
        passes = reads + COMPOSITE_FLUSH_PASSES / (flush if machine.device == "cpu" else 1)
        rows = COMPOSITE_ROW_PASSES * counts.computed_slot * max(flush, case.capacity)
    if case.slots:  # taken out and put back: the state when it was written, all rows
        passes += 2 + 2 / (flush if machine.device == "cpu" else 1)
        rows += 3 * counts.slot * max(flush, case.capacity) if variant != "recurrent" else 0.0
    if case.state_width != case.compute_width:  # a copy of the state in the compute dtype, at every step
        passes += 1 + 2 * case.compute_width / case.state_width
    moved = passes * case.state_bytes + rows + counts.operands
    return moved, _seconds(case, machine, moved, 0.0, launches)
