"""What a prediction is about: one state and its graph in numbers, and the work of one step."""

from __future__ import annotations

from dataclasses import dataclass, fields
from math import prod

from kvbuffer_compile.ir.program import Program


@dataclass(frozen=True)
class Case:
    """Everything a prediction depends on, in numbers.

    lanes: sizes of program.lanes. sizes: (K, V). Widths are bytes of an element, row_widths one for each of
    program.logged. strided: reads that contract an axis of the state that is not its innermost one.
    capacity: slots that the user wants at least, 0 for none. target: "aten", "cpp" or "triton". tokens: of one step.
    slots: the sequences are taken out of a pool. others: bytes that one call of the graph touches besides the state.
    states: how many it steps. shadow_width: of a shadow that is read in the state's place, 0 for none. block: its
    tokens see the state, and nothing of each other; within: reads to which the graph adds what they would see, a
    product of T x T numbers a lane. float16: its 16-bit numbers are float16 and not bfloat16.
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
    others: int = 0
    states: int = 1
    shadow_width: int = 0
    block: bool = False
    within: int = 0
    float16: bool = False

    @property
    def elements(self) -> int:
        """Of the state."""
        return prod(self.lanes) * prod(self.sizes)

    @property
    def state_bytes(self) -> int:
        return self.elements * self.state_width

    @property
    def read_width(self) -> int:
        """Bytes of an element of what a step reads."""
        return self.shadow_width or self.state_width

    @property
    def working_set(self) -> int:
        """Bytes between two visits of the state, itself included."""
        return self.state_bytes + self.others


@dataclass(frozen=True)
class Work:
    """One step in numbers, as cost.Cost counts it."""

    state_read: float
    state_written: float
    rows_read: float
    rows_written: float
    operands: float
    operations: float
    rows: float
    row_operations: float
    gathered: float
    fold_operations: float
    passes: float

    @property
    def bytes(self) -> float:
        return self.state_read + self.state_written + self.rows_read + self.rows_written + self.operands


@dataclass(frozen=True)
class Period:
    """The steps between two writes of a state: those that only read it, on average, and the one that flushes, which
    are so much of all steps."""

    reading: Work
    flushing: Work
    share: float

    @property
    def mean(self) -> Work:
        def both(name: str) -> float:
            reading, flushing = (float(getattr(work, name)) for work in (self.reading, self.flushing))
            return (1 - self.share) * reading + self.share * flushing

        return Work(*(both(f.name) for f in fields(Work)))
