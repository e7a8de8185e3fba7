"""What a step of a kernel would take on a card: a prediction, never a measurement."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from heapq import nlargest

from benchmarks.static_gpu.branches import Step
from benchmarks.static_gpu.kernel import Kernel
from benchmarks.static_gpu.machine import COUNTED, Machine
from benchmarks.static_gpu.multiprocessor import Multiprocessor, Simulated
from benchmarks.static_gpu.trace import counts, trace
from benchmarks.static_gpu.traffic import state_passes, traffic

OFTEN = 7  # of the things that warps wait for, how many are told


@dataclass(frozen=True)
class Predicted:
    """seconds: mean over a flush period. steady, flush: of the two kinds of steps. counts, state: what a warp executes
    in a steady step, and how often the state is loaded and stored in it."""

    kernel: Kernel
    seconds: float
    steady: Simulated
    flush: Simulated | None
    counts: Counter[str]
    state: tuple[float, float]

    def text(self, m: Machine) -> str:
        """For people, in some lines."""
        k, s, c = self.kernel, self.steady, self.counts
        issue = c["all"] * k.warps * k.programs / (4 * m.sms) / m.clock
        pipes = sorted(((name[5:], n) for name, n in c.items() if name.startswith("pipe ")), key=lambda x: -x[1])
        waited = max(1.0, sum(s.waits.values()))
        waits = ", ".join(
            f"{name} {cycles / waited:.0%}" for name, cycles in nlargest(OFTEN, s.waits.items(), key=lambda x: x[1])
        )
        folded = f", a flush {self.flush.seconds * 1e6:.1f}" if self.flush else ""
        return "\n  ".join([
            f"{k.programs} programs of {k.warps} warps, {k.registers} registers, {k.spills} bytes spilled, {k.shared} "
            f"bytes shared, {s.resident} programs an SM ({s.resident * k.warps} warps)",
            "a warp executes: " + ", ".join(f"{name} {c[name]}" for name in ("all", *COUNTED) if c[name]),
            "cycles of pipes: " + ", ".join(f"{name} {n}" for name, n in pipes),
            f"the state is loaded {self.state[0]:.2f} times and stored {self.state[1]:.2f} times",
            f"bounds: DRAM {s.dram_bytes / m.dram * 1e6:.1f} us ({s.dram_bytes / 1e6:.1f} MB), L2 "
            f"{s.l2_bytes / m.l2 * 1e6:.1f} us, issue {issue * 1e6:.1f} us, a program {s.life / m.clock * 1e6:.2f} us",
            f"busy: DRAM {s.dram_busy:.0%}, issue {s.issue_busy:.0%}, load/store {s.lsu_busy:.0%}; waits: {waits}",
            f"predicted: {self.seconds * 1e6:.1f} us a step (steady {s.seconds * 1e6:.1f}{folded})",
        ])  # fmt: skip


def steps(k: Kernel) -> tuple[Step, Step]:
    """A steady step, which finds half of a flush length owed, and one that flushes."""
    owed = 0.0 if k.plan.variant == "recurrent" else k.plan.flush / 2
    return tuple(Step(owed, k.plan.flush, full, k.tokens, k.constants) for full in (False, True))  # type: ignore[return-value]


def predict(k: Kernel, m: Machine) -> Predicted:
    """Seconds of a step on m."""
    steady, folding = steps(k)
    resident = k.resident(m)
    cold = k.programs <= 2 * m.sms * resident

    def run(step: Step) -> tuple[Simulated, Counter[str], tuple[float, float]]:
        traced = trace(k.code, k.branches, step)
        met = traffic(traced, k, step, cold, m)
        simulated = Multiprocessor(traced, k.warps, resident, k.programs, m, met, cold).run()
        return simulated, counts(traced), state_passes(traced, k)

    one, counted, state = run(steady)
    if k.plan.variant == "recurrent":
        return Predicted(k, one.seconds, one, None, counted, state)
    flush, _, _ = run(folding)
    period = max(1, k.plan.flush // k.tokens)
    seconds = ((period - 1) * one.seconds + flush.seconds) / period
    return Predicted(k, seconds, one, flush, counted, state)
