"""Machine code with its schedule, from nvdisasm's text (`-c -gi -hex`).

From Volta on, the upper bits of an instruction's second word hold what ptxas decided: cycles to stall, the scoreboard
that a result or the reading of operands sets, and those to wait for (Jia et al., arXiv 1804.06826, chapter 2).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.static_gpu.machine import pipe

NONE = 7  # no scoreboard
WIDTHS = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}

_INSTRUCTION = re.compile(r"\s+/\*([0-9a-f]{4,6})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][A-Z0-9_.]*)\s*(.*?);")
_WORD = re.compile(r"/\* 0x([0-9a-f]{16}) \*/")
_LABEL = re.compile(r"^(\.L_\w+):")
_LINE = re.compile(r'"([^"]+)", line (\d+)')
_TARGET = re.compile(r"`\((\.L_\w+)\)")
_WIDTH = re.compile(r"\.(128|64|U16|S16|U8|S8)\b")


@dataclass
class Instruction:
    """lines: of the generated file, innermost first. stall: cycles before the warp's next instruction. write, read:
    scoreboards set until the result is there and until operands are read; wait: a bit for each to wait for.
    target: a branch's label. tensor: the kernel argument that memory is touched of ("" where unknown); width: bytes a
    thread moves."""

    guard: str
    op: str
    operands: str
    lines: tuple[int, ...]
    stall: int = 1
    write: int = NONE
    read: int = NONE
    wait: int = 0
    tensor: str = ""
    base: str = field(init=False)
    pipe: str = field(init=False)
    busy: int = field(init=False)
    target: str = field(init=False)
    width: int = field(init=False)

    def __post_init__(self) -> None:
        self.base = self.op.split(".")[0]
        self.pipe, self.busy = pipe(self.op)
        label, width = _TARGET.search(self.operands), _WIDTH.search(self.op)
        self.target = label[1] if label else ""
        self.width = WIDTHS[width[1]] if width else 4

    def schedule(self, word: int) -> None:
        """Take the schedule from the second word of the encoding."""
        control = word >> 41
        self.stall, self.write = control & 15, control >> 5 & 7
        self.read, self.wait = control >> 8 & 7, control >> 11 & 63


@dataclass(frozen=True)
class Code:
    """instructions in order of address; labels: the index of the instruction behind each."""

    instructions: list[Instruction]
    labels: dict[str, int]


def parse(text: str, file: str) -> Code:
    """Read the disassembly of one kernel; lines are those of `file`, a path whose name counts."""
    code, labels = list[Instruction](), dict[str, int]()
    lines: tuple[int, ...] = ()
    told = False  # these lines are of the next instruction
    for line in text.splitlines():
        if "//##" in line:
            lines = (lines if told else ()) + tuple(_lines(line, Path(file).name))
            told = True
        elif found := _INSTRUCTION.match(line):
            code.append(Instruction(found[2] or "", found[3], found[4].strip(), tuple(dict.fromkeys(lines))))
            told = False
        elif found := _LABEL.match(line):
            labels[found[1]] = len(code)
        elif code and (found := _WORD.search(line)):
            code[-1].schedule(int(found[1], 16))
    while code and code[-1].base in ("NOP", "BRA"):  # padding behind the end
        code.pop()
    return Code(code, labels)


def _lines(text: str, file: str) -> list[int]:
    return [int(number) for name, number in _LINE.findall(text) if Path(name).name == file]
