"""KeyboardInterrupt at one place after another of ours: more places than those at which CPython raises Ctrl-C."""

from __future__ import annotations

import dis
import functools
import linecache
import sys
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch

import kvbuffer_compile

PACKAGE = str(Path(kvbuffer_compile.__file__).parent)
PURE = {"read_ahead.py", "program.py", "memory.py"}  # what these change is made by themselves


class Interrupt:
    """Raises at the n-th place that is reached in the package. where: which one that was.

    Code that writes in place is looked at bytecode by bytecode if `fine`, else line by line, each time that it is run;
    all other code line by line, each line once.
    """

    def __init__(self, n: int, fine: bool = True) -> None:
        self.left, self.fine = n, fine
        self.seen: set[tuple[CodeType, int]] = set()
        self.where = ""

    def __call__(self, frame: FrameType, event: str, arg: Any) -> Any:
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if not writes(frame.f_code):
            return self._once
        frame.f_trace_opcodes = self.fine
        return self._each

    def _once(self, frame: FrameType, event: str, arg: Any) -> Any:
        line = frame.f_code, frame.f_lineno
        if event == "line" and line not in self.seen:
            self.seen.add(line)
            self._reached(frame)
        return self._once

    def _each(self, frame: FrameType, event: str, arg: Any) -> Any:
        if event == ("opcode" if self.fine else "line"):
            self._reached(frame)
        return self._each

    def _reached(self, frame: FrameType) -> None:
        code = frame.f_code
        op = dis.opname[code.co_code[frame.f_lasti]]
        at: int | None = frame.f_lineno  # none for bytecodes that the compiler added
        line = linecache.getline(code.co_filename, at or 0).lstrip()
        if line.startswith("with ") and op in ("SWAP", "LOAD_CONST"):
            return  # the way out of a with statement, which CPython does not interrupt
        self.left -= 1
        if self.left < 0:
            self.where = f"{Path(code.co_filename).name}:{at} {code.co_name} ({op})"
            raise KeyboardInterrupt

    def run(self, act: Callable[[], Any]) -> bool:
        """Whether the call was interrupted; a callback of the garbage collector would swallow what is raised there."""
        sys.settrace(self)
        try:
            act()
        except KeyboardInterrupt:
            assert self.where, "Ctrl-C of the user"
        finally:
            sys.settrace(None)
        return bool(self.where)


@functools.cache
def writes(code: CodeType) -> bool:
    """Whether a function changes tensors in place, tells others to, or changes an attribute."""
    if Path(code.co_filename).name in PURE:
        return False
    assigns = any(i.opname == "STORE_ATTR" for i in dis.get_instructions(code))
    return assigns or any(n == "at_once" or (n[-1] == "_" and n[0] != "_") for n in (code.co_name, *code.co_names))


def everywhere(start: Callable[[], Callable[[], Any]], check: Callable[[str], None], fine: bool = True) -> None:
    """Interrupt a call at each place in turn, and name all places after which something was wrong.

    start: sets everything up anew and gives the call. check: is told where it was interrupted, and raises when
    something is wrong then.
    """
    wrong: list[str] = []
    n = 0
    while True:
        act, interrupt = start(), Interrupt(n, fine)
        before = _thread()
        hit = interrupt.run(act)
        assert _thread() == before, f"surroundings left behind at {interrupt.where}"
        if not hit:
            break
        n += 1
        try:
            check(interrupt.where)
        except Exception as error:  # whatever a damaged state may lead to
            wrong.append(f"{interrupt.where}: {str(error).splitlines()[0] if str(error) else type(error).__name__}")
    assert n > 10, "the call was not looked at"
    assert not wrong, f"{len(wrong)} of {n} places:\n" + "\n".join(wrong)


def _thread() -> tuple[int | bool, ...]:
    """What a call may have changed for its thread."""
    keys = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    return (*(k.raw_repr() for k in keys), torch._C._is_torch_function_enabled(), torch.is_grad_enabled())
