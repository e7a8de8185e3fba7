"""Memory as one multiprocessor meets it: queues with a rate each, and a latency behind them."""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.static_gpu.disassembly import Instruction
from benchmarks.static_gpu.machine import ATOMICS, GLOBAL, STORES, Machine, latency
from benchmarks.static_gpu.traffic import OPEN, Traffic

ISSUED = 30  # cycles until an instruction whose lanes are all masked is done


class Memory:
    """Times are in cycles. lsu, port, l2, dram: when the load/store unit, the way into the SM, its shares of L2 and of
    DRAM will have done what was asked of them; a share is what all SMs get of it, more where there are few programs."""

    def __init__(self, m: Machine, programs: int, traffic: Mapping[str, Traffic], cold: bool) -> None:
        self.m, self.traffic = m, traffic
        self.latency: float = m.cold_latency if cold else m.dram_latency
        self.dram_rate, self.l2_rate = (rate / m.sms / m.clock for rate in (m.dram, m.l2))
        if programs < m.sms:
            self.dram_rate = min(m.alone[0], self.dram_rate * m.sms / programs)
            self.l2_rate = min(m.alone[1], self.l2_rate * m.sms / programs)
        self.lsu = self.port = self.l2 = self.dram = 0.0
        self.lsu_busy = self.dram_busy = self.dram_bytes = self.l2_bytes = 0.0

    def access(self, i: Instruction, t: float) -> float:
        """When what an instruction of the load/store unit asks for at t is there."""
        if i.base not in GLOBAL:
            moved = 32 * i.width if i.base in ("LDS", "STS") else 128
            return self._begin(t, max(1.0, min(2.0, moved / 256))) + latency(i.base)
        kind = self.traffic.get(i.tensor, OPEN)
        masked = i.base != "STG" and (i.guard or i.base == "LDGSTS")
        amount = 32 * i.width * (kind.seen if masked else 1.0)
        start = self._begin(t, max(1.0, amount / 128))
        return start + ISSUED if amount < 1 else self._move(i, kind, start, amount)

    def _begin(self, t: float, waves: float) -> float:
        start = max(t, self.lsu)
        self.lsu = start + waves
        self.lsu_busy += waves
        return start

    def _move(self, i: Instruction, kind: Traffic, start: float, amount: float) -> float:
        store = i.base in STORES
        share = kind.written if store else kind.dram
        self.port = max(start, self.port) + amount / self.m.port
        self.l2 = max(start, self.l2) + amount / self.l2_rate
        self.l2_bytes += amount
        served = max(self.port, self.l2 - self.m.burst)
        if share:
            cycles = amount * share * (self.m.write if store else 1.0) / self.dram_rate
            self.dram = max(start, self.dram) + cycles
            self.dram_busy += cycles
            self.dram_bytes += amount * share
            served = max(served, self.dram - self.m.burst)
        if i.base in ATOMICS:
            return served + self.m.atomic_latency
        return served + (self.latency if kind.far else self.m.l2_latency)
