"""How the bytes that a trace asks for are met: what comes from memory is what a tensor has, once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.static_gpu.branches import Step
from benchmarks.static_gpu.disassembly import Instruction
from benchmarks.static_gpu.kernel import Kernel
from benchmarks.static_gpu.machine import Machine


@dataclass(frozen=True)
class Traffic:
    """dram: share of the bytes asked for that come from DRAM; seen: share of lanes whose mask is on; far: whether the
    latency is that of DRAM; written: share of the bytes stored that are written."""

    dram: float = 1.0
    seen: float = 1.0
    far: bool = True
    written: float = 1.0


OPEN = Traffic()
WORDS = ("cursor", "tickets", "slots", "")  # tensors of few numbers, which L2 holds once a program has asked


def traffic(traced: Sequence[Instruction], k: Kernel, step: Step, cold: bool, m: Machine) -> dict[str, Traffic]:
    """By tensor. A second program that reads it, or a second read by the same one, finds it in L2."""
    asked = {base: _bytes(traced, k, base) for base in ("LDG", "LDGSTS", "STG")}
    found = {}
    for tensor in {i.tensor for i in traced}:
        if tensor in WORDS:
            found[tensor] = Traffic(dram=0.02, seen=1 / 32, far=cold and tensor in ("cursor", "slots"))
            continue
        copied = asked["LDGSTS"][tensor]
        loads, stores = asked["LDG"][tensor] + copied, asked["STG"][tensor]
        masked = bool(copied) or any(i.guard for i in traced if i.tensor == tensor and i.base != "STG")
        share = _Share(k, step, tensor, cold, m)
        seen = share.seen(copied)
        dram = share.loaded() / max(1.0, loads * (seen if masked and not share.all_rows else 1.0)) if loads else 0.0
        written = share.stored() / stores if stores else 1.0
        found[tensor] = Traffic(min(1.0, dram), seen, True, min(1.0, written))
    return found


def state_passes(traced: Sequence[Instruction], k: Kernel) -> tuple[float, float]:
    """(loaded, stored): bytes of the state that a step asks for, in states. 1 and 0 are a step that reads it once; the
    last rounds of a loop that copies ahead count, though they ask for nothing, which machine code does not show."""
    whole = k.sizes["state"] / k.programs
    loads = sum(_bytes(traced, k, base)["state"] for base in ("LDG", "LDGSTS"))
    return loads / whole, _bytes(traced, k, "STG")["state"] / whole


def _bytes(traced: Sequence[Instruction], k: Kernel, base: str) -> Counter[str]:
    """What a program asks for of each tensor by one kind of instruction, were no lane masked."""
    found: Counter[str] = Counter()
    for i in traced:
        if i.base == base:
            found[i.tensor] += 32 * i.width * k.warps
    return found


@dataclass(frozen=True)
class _Share:
    """What one program's part of a tensor is, in bytes."""

    k: Kernel
    step: Step
    tensor: str
    cold: bool
    m: Machine

    @property
    def whole(self) -> float:
        return self.k.sizes.get(self.tensor, 0) / self.k.programs

    @property
    def row(self) -> bool:
        return self.tensor.startswith("row_")

    @property
    def all_rows(self) -> bool:
        return self.row and self.step.flush

    @property
    def slots(self) -> int:
        """Slots that a kernel goes through: a power of two."""
        return 1 << (self.k.plan.capacity - 1).bit_length()

    def seen(self, copied: int) -> float:
        """Share of lanes that ask. copied: bytes asked for by loops that copy ahead, whose last rounds ask nothing."""
        if self.tensor == "state" and copied > self.whole > 0:
            return self.whole / copied
        if not self.row:
            return 1.0
        return 0.0 if self.step.flush else self.step.owed / self.slots

    def loaded(self) -> float:
        """Bytes that come from memory."""
        near = self.m.rows_in_l2 if self.row and not self.cold else 0.0
        if not self.row or self.step.flush:
            return self.whole * (1 - near)
        return self.whole * (1 - near) * self.step.owed / self.step.length * min(1.0, self.step.length / self.slots)

    def stored(self) -> float:
        return self.whole / (self.slots if self.row else 1)
