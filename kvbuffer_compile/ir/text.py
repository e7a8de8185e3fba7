"""Read programs back from their text form: for tests, examples and the command line."""

from __future__ import annotations

import re
from collections.abc import Iterable

from kvbuffer_compile.errors import IRError
from kvbuffer_compile.ir.program import KINDS, Decay, Op, Program, Read, Update, Var, map_op, verify


def parse(text: str) -> Program:
    """Read the text form; what stands behind a # is a comment. Kinds and lanes of results follow from those of the
    operands. IRError on bad text."""
    lines = [line for given in text.splitlines() if (line := given.partition("#")[0].strip())]
    head = re.fullmatch(r"program over (.+) tokens (\d+)", lines[0]) if lines else None
    if head is None:
        raise IRError(f"program text must begin with 'program over <lanes> tokens <n>', got {lines[:1]}")
    lanes = tuple(x for x in head[1].split() if x != "-")
    reader = _Reader(lanes)
    for line in lines[1:]:
        reader.read(line)
    return verify(Program(lanes, tuple(reader.inputs), tuple(reader.ops), tuple(reader.outputs), int(head[2])))


class _Reader:
    def __init__(self, lanes: tuple[str, ...]) -> None:
        self.lanes = lanes
        self.inputs: list[Var] = []
        self.ops: list[Op] = []
        self.outputs: list[Var] = []
        self.vars: dict[str, Var] = {}

    def read(self, line: str) -> None:
        if m := re.fullmatch(r"input (\w+): (\w+)\((.*)\)", line):
            self.inputs.append(self._define(m[1], m[2], m[3].split()))
        elif m := re.fullmatch(r"decay (\w+)", line):
            self.ops.append(Decay(self._use(m[1])))
        elif m := re.fullmatch(r"update (\w+), (\w+)", line):
            self.ops.append(Update(self._use(m[1]), self._use(m[2])))
        elif m := re.fullmatch(r"(\w+) = read (\w+)", line):
            x = self._use(m[2])
            self.ops.append(Read(self._define(m[1], "value" if x.kind == "key" else "key", self.lanes), x))
        elif m := re.fullmatch(r"(\w+) = ([\w.]+)\((.*)\)", line):
            args = tuple(self._argument(a.strip()) for a in m[3].split(",")) if m[3] else ()
            self.ops.append(map_op(m[1], m[2], args, self.lanes, self._define))
        elif m := re.fullmatch(r"return ?(.*)", line):
            self.outputs += [self._use(a.strip()) for a in m[1].split(",") if a.strip()]
        else:
            raise IRError(f"cannot read the program line {line!r}")

    def _define(self, name: str, kind: str, lanes: Iterable[str]) -> Var:
        if kind not in KINDS:
            raise IRError(f"{name} has kind {kind!r}; allowed: {', '.join(KINDS)}")
        return self.vars.setdefault(name, Var(name, kind, tuple(lanes)))

    def _use(self, name: str) -> Var:
        if name not in self.vars:
            raise IRError(f"{name} is used before it is defined")
        return self.vars[name]

    def _argument(self, text: str) -> Var | float | int | bool:
        if text in self.vars:
            return self.vars[text]
        if text in ("True", "False"):
            return text == "True"
        try:
            return int(text) if re.fullmatch(r"-?\d+", text) else float(text)
        except ValueError:
            raise IRError(f"{text} is neither a variable nor a number") from None
