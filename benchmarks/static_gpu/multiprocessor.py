"""Warps on one multiprocessor, in order and by the schedule in their machine code."""

from __future__ import annotations

import heapq
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from benchmarks.static_gpu.disassembly import Instruction
from benchmarks.static_gpu.machine import Machine, latency
from benchmarks.static_gpu.memory import Memory
from benchmarks.static_gpu.traffic import Traffic

BOARDS = 6  # scoreboards of a warp
PARTS = 4  # sub-partitions, each with an issue slot and pipes of its own
ROUNDS = 4  # times the resident programs that are simulated; more are extrapolated from these
STORED, SENT, READ = 20, 30, 12  # cycles until operands are stored to registers, sent to memory, read


@dataclass
class Warp:
    """at: its next instruction. boards, setters: when each scoreboard is released, and by what. copies: when each
    group of asynchronous copies is there; open: when the group that is being filled is. place: of its program."""

    program: int
    part: int
    place: int
    at: int = 0
    boards: list[float] = field(default_factory=lambda: [0.0] * BOARDS)
    setters: list[str] = field(default_factory=lambda: [""] * BOARDS)
    copies: list[float] = field(default_factory=list)
    open: float = 0.0


@dataclass(frozen=True)
class Simulated:
    """seconds of the launch; bytes of the chip; shares of the time that DRAM, issue slots and the load/store unit are
    busy; life: cycles of one program; waits: cycles that warps waited, by what for."""

    seconds: float
    resident: int
    dram_bytes: float
    l2_bytes: float
    dram_busy: float
    issue_busy: float
    lsu_busy: float
    life: float
    waits: Mapping[str, float]


class Multiprocessor:
    """Runs its share of `programs` programs of `warps` warps, `resident` of them at once."""

    def __init__(
        self, traced: Sequence[Instruction], warps: int, resident: int, programs: int, m: Machine,
        traffic: Mapping[str, Traffic], cold: bool,
    ) -> None:  # fmt: skip
        self.code, self.warps, self.resident, self.m = traced, warps, resident, m
        self.share = programs / m.sms
        self.wanted = -(-programs // m.sms) if self.share <= ROUNDS * resident else ROUNDS * resident
        self.memory = Memory(m, programs, traffic, cold)
        self.issue = [0.0] * PARTS
        self.pipes: list[dict[str, float]] = [{} for _ in range(PARTS)]
        self.queue: list[tuple[float, int, Warp]] = []
        self.started: list[float] = []
        self.left: list[int] = []  # warps of each program that still run
        self.met: dict[int, list[tuple[float, Warp]]] = {}
        self.finished: list[float] = []
        self.pushed = self.issued = 0
        self.life = 0.0
        self.waits: dict[str, float] = defaultdict(float)

    def run(self) -> Simulated:
        for place in range(min(self.resident, self.wanted)):
            self._begin(place * float(self.m.dispatch), place)
        while self.queue:
            now, _, warp = heapq.heappop(self.queue)
            self._go_on(now, warp)
        self.finished.sort()
        end, memory, m = self.finished[-1], self.memory, self.m
        total = max(end, memory.dram)  # an SM may run ahead of its share, but in the end all bytes are moved
        if self.share > self.wanted:
            low, high = self.resident, self.wanted - self.resident
            between = (self.finished[high - 1] - self.finished[low - 1]) / (high - low)
            total += (self.share - self.wanted) * between
        scale = self.share / self.wanted * m.sms
        return Simulated(
            total / m.clock + m.fixed, self.resident, memory.dram_bytes * scale, memory.l2_bytes * scale,
            memory.dram_busy / end, self.issued / PARTS / end, memory.lsu_busy / end, self.life / len(self.finished),
            self.waits,
        )  # fmt: skip

    def _push(self, at: float, warp: Warp) -> None:
        self.pushed += 1
        heapq.heappush(self.queue, (at, self.pushed, warp))

    def _begin(self, at: float, place: int) -> None:
        program = len(self.started)
        self.started.append(at)
        self.left.append(self.warps)
        for w in range(self.warps):
            self._push(at, Warp(program, (place * self.warps + w) % PARTS, place))

    def _end(self, now: float, warp: Warp) -> None:
        self.left[warp.program] -= 1
        if not self.left[warp.program]:
            self.finished.append(now)
            self.life += now - self.started[warp.program]
            if len(self.started) < self.wanted:
                self._begin(now + self.m.cta_launch, warp.place)

    def _go_on(self, now: float, warp: Warp) -> None:
        """Execute a warp until another one is due before it."""
        while warp.at < len(self.code):
            i = self.code[warp.at]
            ready, cause = _ready(i, warp, now)
            if i.base == "BAR" and self.warps > 1 and "ARV" not in i.op:
                self._meet(ready, warp)
                return
            if cause:
                self.waits[cause] += ready - now
            t = self._slot(i, warp.part, ready)
            if t > now and self._due_before(t):
                self._push(t, warp)
                return
            self._execute(i, warp, t)
            warp.at += 1
            now = t + max(1, i.stall)
            if self._due_before(now):
                self._push(now, warp)
                return
        self._end(now, warp)

    def _due_before(self, t: float) -> bool:
        return bool(self.queue) and self.queue[0][0] < t - 1e-9

    def _meet(self, now: float, warp: Warp) -> None:
        """A barrier: the last to come releases all."""
        here = self.met.setdefault(warp.program, [])
        here.append((now, warp))
        if len(here) < self.warps:
            return
        for came, other in self.met.pop(warp.program):
            other.at += 1
            self.waits["barrier"] += now - came
            self._push(now + self.m.barrier + self.m.barrier_warp * self.warps, other)

    def _slot(self, i: Instruction, part: int, ready: float) -> float:
        """When an instruction that is ready finds an issue slot and its pipe."""
        issue, pipe = self.issue[part], self.pipes[part].get(i.pipe, 0.0)
        t = max(ready, issue, pipe)
        if t > ready:
            self.waits["issue" if issue >= pipe else f"pipe {i.pipe}"] += t - ready
        return t

    def _execute(self, i: Instruction, warp: Warp, t: float) -> None:
        self.issue[warp.part] = t + 1
        self.pipes[warp.part][i.pipe] = t + i.busy
        self.issued += 1
        released = self._released(i, warp, t)
        name = f"{i.base} {i.tensor}" if i.base in ("LDG", "ATOMG", "LDGSTS") else i.base
        _hold(warp, i.write, released, name)
        _hold(warp, i.read, t + (SENT if i.base in ("STG", "LDG", "STS") else READ), f"{i.base} operands")

    def _released(self, i: Instruction, warp: Warp, t: float) -> float:
        """When the result is there."""
        if i.base == "LDGDEPBAR":
            warp.copies.append(warp.open)
            warp.open = 0.0
            return t + STORED
        if i.pipe != "mio" or i.base == "LDC":
            return t + latency(i.base)
        found = self.memory.access(i, t)
        if i.base == "LDGSTS":
            warp.open = max(warp.open, found)
        return found


def _ready(i: Instruction, warp: Warp, now: float) -> tuple[float, str]:
    """When nothing holds an instruction back any more, and what did last; "" for nothing."""
    t, cause = now, ""
    for board in range(BOARDS):
        if i.wait >> board & 1 and warp.boards[board] > t:
            t, cause = warp.boards[board], warp.setters[board]
    if i.base == "DEPBAR":
        behind = re.search(r"SB0, 0x([0-9a-f]+)", i.operands)
        waited = len(warp.copies) - (int(behind[1], 16) if behind else 0)
        if waited > 0 and warp.copies[waited - 1] > t:
            t, cause = warp.copies[waited - 1], "async"
    return t, cause


def _hold(warp: Warp, board: int, until: float, setter: str) -> None:
    if board < BOARDS and until > warp.boards[board]:
        warp.boards[board], warp.setters[board] = until, setter
