"""Conditions and loops of the generated Python: what stands around a line, and how it turns out in a given step."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

COMPILED = ".dtype"  # in conditions that the compiler decides: what is there is of the branch that was taken
# Conditions that hold for one program of many, or for slots of a pool that several entries have.
CHANCE = r"last|arrive\(|.*atomic_add|.*earlier > 0|writes == 0"


class Around(NamedTuple):
    """A statement around a line: its kind, its condition or what it runs over, and its own line."""

    kind: Literal["if", "else", "for"]
    text: str
    line: int


Path = tuple[Around, ...]  # outermost first


class Branches:
    """around: for each line of a text, the statements of its function around it."""

    def __init__(self, text: str) -> None:
        self.around: dict[int, Path] = {}
        self._walk(ast.parse(text).body, ())

    def path(self, lines: tuple[int, ...]) -> Path:
        """What is around an instruction whose lines are given, innermost first: of each call and in it."""
        return tuple(step for line in reversed(lines) for step in self.around.get(line, ()))

    def _walk(self, body: list[ast.stmt], path: Path) -> None:
        for node in body:
            match node:
                case ast.If():
                    text = ast.unparse(node.test)
                    self.around[node.lineno] = path
                    self._walk(node.body, (*path, Around("if", text, node.lineno)))
                    self._walk(node.orelse, (*path, Around("else", text, node.lineno)))
                case ast.For() | ast.While():
                    text = ast.unparse(node.iter if isinstance(node, ast.For) else node.test)
                    self.around[node.lineno] = path
                    self._walk(node.body, (*path, Around("for", text, node.lineno)))
                case ast.With():
                    self._walk(node.body, path)
                case ast.FunctionDef():
                    self._walk(node.body, ())
                case _:
                    for line in range(node.lineno, (node.end_lineno or node.lineno) + 1):
                        self.around.setdefault(line, path)


@dataclass(frozen=True)
class Step:
    """The step that is run. owed: rows before a steady step; length: before one that flushes; flush: whether this one
    does; tokens: of a verify. constants: numbers that the kernel knows by name."""

    owed: float
    length: int
    flush: bool
    tokens: int
    constants: Mapping[str, object]

    def holds(self, text: str) -> float:
        """How likely a condition is to hold: 1 where it cannot be told."""
        if text == "owed < 0" or re.match(CHANCE, text):
            return 0.0
        found = self._value(text)
        return 1.0 if found is None else float(bool(found))

    def likely(self, path: Path) -> float:
        """How likely a program is to come by."""
        found = 1.0
        for kind, text, _ in path:
            if kind != "for" and COMPILED not in text:
                found *= self.holds(text) if kind == "if" else 1 - self.holds(text)
        return found

    def trips(self, text: str) -> int:
        """How often a loop is run: once where it cannot be told."""
        inside = re.search(r"range\((.*)\)", text)
        parts = re.split(r",(?![^()]*\))", inside[1]) if inside else []
        numbers = [self._value(p.strip()) for p in parts if "=" not in p]
        if not numbers or None in numbers:
            return 1
        first, end, by = (0, *numbers, 1) if len(numbers) == 1 else (*numbers, 1)[:3]
        return max(1, round(-(-(end - first) // by)))  # type: ignore[operator]

    def _value(self, text: str) -> float | None:
        names = {**self.constants, "owed": self.length if self.flush else self.owed, "T": self.tokens}
        names |= {"kept": 0 if self.flush else self.owed, "flush": self.flush, "writes": True}
        try:
            return float(eval(text, {"__builtins__": {"min": min, "max": max}}, names))
        except (NameError, TypeError, AttributeError, ValueError, ZeroDivisionError, SyntaxError):
            return None  # a value that only the device knows
