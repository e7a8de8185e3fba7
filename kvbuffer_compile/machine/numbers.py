"""What the cost model knows about a device, as numbers."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from math import log
from typing import Literal, get_args

Kind = Literal["read", "copy", "update", "kernel_read", "kernel_update", "kernel_twice", "kernel_rows"]

# Times that a larger size is faster, above which a CPU counts as busy. Some is no sign: a small copy has few of
# many threads. 32 was seen.
INVERTED = 8.0
MOST_FORK = 1e-4  # seconds to let all threads work; more was a thread that others kept from its processor
BUSY = 0.3  # a spread above which a machine counts as busy


@dataclass(frozen=True)
class Speed:
    """Bytes/s where `bytes` are met again and again, by all threads. Copies and updates count what they read and what
    they write.

    read: a sum. copy: into another array. update: multiplied in place. kernel_read, kernel_update, kernel_twice: what
    generated kernels reach that only read a state, that change it, and that read it before they change it, their
    arithmetic left out; 0 where none was timed. kernel_rows: the same of owed rows, which are short and lie apart.
    """

    bytes: int
    read: float
    copy: float
    update: float
    kernel_read: float = 0.0
    kernel_update: float = 0.0
    kernel_twice: float = 0.0
    kernel_rows: float = 0.0

    def of(self, kind: Kind) -> float:
        """One of the speeds; where no kernel was timed, that of the same traffic without arithmetic."""
        return float(getattr(self, kind)) or (
            self.read if kind in ("read", "kernel_read", "kernel_rows") else self.update
        )


@dataclass(frozen=True)
class Kernels:
    """Seconds that generated C++ kernels take on one thread, states being in its cache.

    call, rows_call: of an op that changes the state, and of one that has rows, without work. fork: to let all threads
    work. A lane takes `lane` and its operations, `rate` a second, in a step that changes the state; `read_lane` and
    `read` in one that only reads it. An owed row takes `row` a lane and its operations, `walk` a second, and `gather`
    for each element of it that is copied first. A flush takes `pack` for each row of a lane and does `fold` operations
    a second. bfloat16: what an element in it takes more to be read and written than one of float32, below zero where
    conversions cost less than the bytes that are spared; narrow_read: what one takes to be
    read, all in all; narrow_row, narrow_walk: a row in it. exposed: how much of the shorter of arithmetic and the
    state's way from memory the longer does not hide, from 0 to 1.
    """

    call: float
    rows_call: float
    fork: float
    lane: float
    rate: float
    read_lane: float
    read: float
    row: float
    walk: float
    gather: float
    pack: float
    fold: float
    bfloat16: float
    narrow_read: float
    narrow_row: float
    narrow_walk: float
    exposed: float

    def together(self, arithmetic: float, moving: float) -> float:
        """Seconds of both at the same time."""
        return max(arithmetic, moving) + self.exposed * min(arithmetic, moving)

    def moving(self, seconds: float, arithmetic: float) -> float:
        """What moving takes alone, if both take so long together: the inverse. 0 where arithmetic hides all of it."""
        alone = seconds - self.exposed * arithmetic
        if alone >= arithmetic:
            return alone
        return min(max(seconds - arithmetic, 0.0) / self.exposed, arithmetic) if self.exposed else 0.0


@dataclass(frozen=True)
class Machine:
    """One device as it was found, with the threads it was measured with.

    device: torch device type. speeds: by growing size, from what fits in the caches of the cores to what fits in none;
    between two the time for a byte changes with the logarithm of the size, since caches forget gradually. cache, last:
    bytes of the caches of all cores in use, and of the last level, which others may share. launch: seconds to start
    a small op from Python. rate: float32 operations/s of a batched product of two vectors with cached matrices, as a
    read does it. kernels: None where none was timed.
    measured: the day. load: processes that wanted to run then, for each core. spread: how much longer the median of
    the largest copies took than the best, 0.1 for 10 %.
    """

    name: str
    device: str
    threads: int
    speeds: tuple[Speed, ...]
    cache: int
    last: int
    launch: float
    rate: float
    kernels: Kernels | None = None
    measured: str = ""
    load: float = 0.0
    spread: float = 0.0

    def speed(self, kind: Kind, working_set: float) -> float:
        """Bytes/s of one kind of traffic where the code between two visits touches so many bytes.

        Whatever was measured, what is nearer is not much slower than what is farther, and no slower where the machine
        was busy: threads that waited for each other made a cache 40 times slower than memory.
        """
        sizes, measured = [s.bytes for s in self.speeds], [s.of(kind) for s in self.speeds]
        least = 1.0 if self.busy else 0.5
        reached = [max(speed, least * max(measured[i:])) for i, speed in enumerate(measured)]
        far = bisect_right(sizes, working_set)
        if far in (0, len(sizes)):
            return reached[min(far, len(sizes) - 1)]
        near = far - 1
        share = log(working_set / sizes[near]) / log(sizes[far] / sizes[near])
        return 1 / ((1 - share) / reached[near] + share / reached[far])

    @property
    def busy(self) -> bool:
        """Whether others used it while it was measured: copies took very different times, or what a CPU's cache holds
        was slower than what lies behind it (0.07 GB/s at 2 MiB and 2.4 at 128 MiB were seen, with a spread of 12 %), or
        threads waited for each other (4 ms, where 1 to 12 us are usual)."""
        waited = self.kernels is not None and self.kernels.fork >= MOST_FORK
        return self.spread > BUSY or waited or (self.device == "cpu" and self.inverted > INVERTED)

    @property
    def inverted(self) -> float:
        """How many times faster one kind of traffic was at a larger size than at a smaller one, at most; it should be
        below 1."""
        kinds = [[x for s in self.speeds if (x := float(getattr(s, kind)))] for kind in get_args(Kind)]
        return max((max(found[i:]) / near for found in kinds for i, near in enumerate(found[:-1], 1)), default=0.0)

    @property
    def advice(self) -> str:
        """What is to be done about a machine that was measured while it was busy, "" for any other."""
        return "while it was busy: python -m kvbuffer_compile doctor --remeasure when it is idle" if self.busy else ""

    @property
    def bandwidth(self) -> float:
        """Bytes/s of a copy that no cache holds."""
        return self.speeds[-1].copy

    def __str__(self) -> str:
        levels = ", ".join(f"{s.copy / 1e9:.3g} GB/s at {_size(s.bytes)}" for s in self.speeds)
        seen = f"; measured {self.measured}, load {self.load:.1f}, spread {self.spread:.0%}" if self.measured else ""
        advice = f", {self.advice}" if self.busy else ""
        return (
            f"{self.name}: copies {levels}; {self.launch * 1e6:.2g} us a launch, {self.rate / 1e9:.3g} GFLOP/s"
            f"{seen}{advice}"
        )


def _size(n: int) -> str:
    return f"{n / 2**20:.3g} MiB"
