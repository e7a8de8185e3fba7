"""One warp's way through a kernel, in a given step."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence

from benchmarks.static_gpu.branches import Around, Branches, Step
from benchmarks.static_gpu.disassembly import Code, Instruction
from benchmarks.static_gpu.machine import COUNTED, LOADS

_MOVES = ("BSYNC", "NOP", "BRA", "EXIT")  # ptxas puts them at lines of its own choice


def trace(code: Code, branches: Branches, step: Step) -> list[Instruction]:
    """The instructions that a warp executes, in order.

    A block runs if most of its instructions stand under conditions that hold. A loop is a branch backwards, and runs
    as often as the innermost `for` around most of it.
    """
    return list(_Walk(code, branches, step).run(0, len(code.instructions)))


def counts(traced: Sequence[Instruction]) -> Counter[str]:
    """How many instructions of each kind of COUNTED there are, "all" and, as "pipe <name>", the cycles of pipes."""
    found: Counter[str] = Counter(all=len(traced))
    for i in traced:
        found[f"pipe {i.pipe}"] += i.busy
        found.update(name for name, pattern in COUNTED.items() if re.match(pattern, i.op))
        if i.base in LOADS:
            found["loaded bytes"] += 32 * i.width
    return found


class _Walk:
    def __init__(self, code: Code, branches: Branches, step: Step) -> None:
        self.code, self.labels = code.instructions, code.labels
        self.branches, self.step = branches, step
        starts = {0, *self.labels.values()}
        starts |= {n + 1 for n, i in enumerate(self.code) if i.base in ("BRA", "EXIT", "RET", "BRX", "CALL")}
        self.starts = sorted(x for x in starts if x < len(self.code))
        ends = [*self.starts[1:], len(self.code)]
        self.blocks = {first: (end, self._runs(first, end)) for first, end in zip(self.starts, ends, strict=True)}
        self.loops = dict(self._loops())

    def run(self, first: int, last: int, inside: tuple[int, ...] = ()) -> Iterator[Instruction]:
        """From one instruction to before another. inside: the heads of the loops that are being run."""
        n = first
        while n < last:
            end, trips = self.loops.get(n, (last, 1))
            if end < last and n not in inside:
                for _ in range(trips):
                    yield from self.run(n, end + 1, (*inside, n))
                n = end + 1
                continue
            end, runs = self.blocks[self.starts[bisect_right(self.starts, n) - 1]]
            end = min(end, last)
            for i in self.code[n:end] if runs else ():
                yield i
                if i.base == "EXIT" and not i.guard:
                    return
            n = end

    def _runs(self, first: int, last: int) -> bool:
        known = [i for i in self.code[first:last] if i.lines]
        known = [i for i in known if i.base not in _MOVES] or known
        likely = [self.step.likely(self.branches.path(i.lines)) for i in known]
        return not likely or sum(likely) / len(likely) >= 0.5

    def _loops(self) -> Iterator[tuple[int, tuple[int, int]]]:
        """(head, (last instruction, trips)) of each loop; of several branches to one head the last counts."""
        for n, i in enumerate(self.code):
            head = self.labels.get(i.target, n + 1) if i.base == "BRA" else n + 1
            if head <= n:
                yield head, (n, self._trips(head, n))

    def _trips(self, head: int, last: int) -> int:
        paths = [self.branches.path(i.lines) for i in self.code[head : last + 1] if i.lines]
        found: Counter[Around] = Counter()
        for path in paths:
            found.update({step for step in path if step.kind == "for"})
        depth = {step: depth for path in paths for depth, step in enumerate(path)}
        full = [step for step, count in found.items() if count >= 0.5 * len(paths)]
        return self.step.trips(max(full, key=depth.__getitem__).text) if full else 1
