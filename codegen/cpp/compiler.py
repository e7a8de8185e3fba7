"""The C++ compiler: which one there is, and running it without trusting it to end, to be brief or to speak UTF-8."""

from __future__ import annotations

import math
import os
import shlex
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

from kvbuffer_compile.errors import EmitError

INSTALL = "install a C++ compiler (Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++) or name one in CXX"
# A kernel takes 1 to 3 s of processor time, on a busy machine minutes by the clock. So a compiler is given up when it
# has used no processor time at all for IDLE seconds, and whatever it does after LIMIT (KVBUFFER_COMPILE_TIMEOUT).
IDLE, LIMIT = 12.0, 300.0
LOOK = 2.0  # seconds between two looks at what it has used
KEPT = 1 << 16  # bytes of what it prints

_hung: dict[tuple[str, ...], str] = {}  # commands that were given up, and what was said: one wait is enough


def command() -> tuple[str, ...]:
    """CXX, which may carry arguments, or g++. EmitError when CXX cannot be read."""
    given = os.environ.get("CXX", "")
    try:
        return tuple(shlex.split(given)) or ("g++",)
    except ValueError as error:
        raise EmitError(f"the environment variable CXX={given!r} cannot be read ({error}): {INSTALL}") from error


def find(words: tuple[str, ...]) -> str:
    """Path and version of the compiler. EmitError, with what to do, when there is none that answers."""
    path = shutil.which(words[0])
    if path is None:
        raise EmitError(f"there is no C++ compiler {shlex.join(words)!r}: {INSTALL}")
    lines = run(words, ["--version"]).splitlines()
    return f"{path}: {lines[0] if lines else 'unknown version'}"


def run(words: tuple[str, ...], arguments: Sequence[str]) -> str:
    """What the compiler prints. EmitError, with the end of that, when it fails or is given up."""
    name, seconds = shlex.join(words), limit()
    if words in _hung:
        raise EmitError(_hung[words])
    try:
        process = subprocess.Popen(
            [*words, *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
    except (OSError, ValueError) as error:
        raise EmitError(f"cannot run the C++ compiler {name!r} ({error}): {INSTALL}") from error
    text, ended = _attend(process, seconds)
    if not ended:
        advice = f"{INSTALL}, or give it more seconds in KVBUFFER_COMPILE_TIMEOUT"
        _hung[words] = f"the C++ compiler {name!r} was given up, it did not end: {advice}"
        raise EmitError(f"{_hung[words]}\n{text[-4000:]}")
    if process.returncode:
        advice = "see what it says, or name another one in CXX"
        raise EmitError(f"the C++ compiler {name!r} failed with {_status(process)}: {advice}\n{text[-4000:]}")
    return text


def limit() -> float:
    """Seconds that a compiler may take in all. EmitError when KVBUFFER_COMPILE_TIMEOUT is no such number."""
    given = os.environ.get("KVBUFFER_COMPILE_TIMEOUT", "")
    try:
        seconds = float(given or LIMIT)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise EmitError(f"the environment variable KVBUFFER_COMPILE_TIMEOUT={given!r} must be seconds, more than 0")
    return seconds


def _status(process: subprocess.Popen[bytes]) -> str:
    code = process.returncode
    return f"exit code {code}" if code > 0 else f"signal {-code}"


def _attend(process: subprocess.Popen[bytes], seconds: float) -> tuple[str, bool]:
    """What a process has printed, and whether it has ended by itself; else it is killed."""
    assert process.stdout is not None
    printed = _Tail(process.stdout)
    try:
        ended = _ends(process, seconds)
    finally:
        if process.poll() is None:
            with suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return printed.text(), ended


class _Tail(threading.Thread):
    """Reads a stream and keeps its end: a compiler may print without end."""

    def __init__(self, stream: IO[bytes]) -> None:
        super().__init__(daemon=True)
        self.stream, self.kept = stream, b""
        self.start()

    def run(self) -> None:
        with self.stream:
            while chunk := os.read(self.stream.fileno(), KEPT):
                self.kept = (self.kept + chunk)[-KEPT:]

    def text(self) -> str:
        self.join(1.0)  # no longer: a server that the compiler has started may keep the stream open
        return self.kept.decode("utf-8", "replace")


def _ends(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Wait for a process; False when it takes longer, or does nothing."""
    busy = time.monotonic()
    end, used = busy + seconds, None
    while True:
        with suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, min(LOOK, end - time.monotonic())))
            return True
        now, before = time.monotonic(), used
        used = _processor_time(process.pid)
        busy = now if used is None or used != before else busy
        if now >= end or now - busy >= IDLE:
            return False


def _processor_time(session: int) -> int | None:
    """Clock ticks that the processes of a session have used; None where that is not told."""
    total = None
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            words = path.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
            if int(words[3]) == session:
                total = (total or 0) + sum(map(int, words[11:15]))
        except (OSError, ValueError, IndexError):
            continue
    return total
