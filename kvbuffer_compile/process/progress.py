"""Signs of life while a graph compiles: two lines in the log and, on a terminal, a line that says what goes on.

The line is shown on stderr after a second, with the seconds that have passed, and leaves nothing behind. It is not
shown where stderr is no terminal, nor with KVBUFFER_QUIET=1 in the environment.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

log = logging.getLogger("kvbuffer_compile")
PATIENCE = 1.0  # seconds that nobody needs a sign for

_lock = threading.Lock()
_shown: _Line | None = None


@contextmanager
def compiling(what: str) -> Iterator[None]:
    """While this is compiled. Of several at once, or one within another, the first is shown."""
    global _shown
    start = time.monotonic()
    log.info("compiling %s", what)
    line = _Line(what, start) if wanted() else None
    with _lock:
        first = line is not None and _shown is None
        if first:
            _shown = line
    try:
        if first and line is not None:
            with suppress(Exception):  # a compilation must not fail for want of a sign of life
                line.begin()
        yield
    finally:
        if first and line is not None:
            with _lock:
                _shown = None
            with suppress(Exception):
                line.end()
        log.info("compiled %s in %.1f s", what, time.monotonic() - start)


def stage(text: str) -> None:
    """What is done now, a few words; shown if anything is."""
    log.debug("%s", text)
    line = _shown
    if line is not None:
        line.stage = text


def wanted() -> bool:
    """Whether somebody is there who wants to see it."""
    if os.environ.get("KVBUFFER_QUIET", "0") not in ("", "0"):
        return False
    try:
        return sys.stderr.isatty()
    except Exception:  # none, closed, or an object that only writes
        return False


class _Line:
    """The line on the terminal."""

    def __init__(self, what: str, start: float) -> None:
        self.what = what
        self.start = start
        self.stage = ""
        self.timer = threading.Timer(PATIENCE, self._show)
        self.timer.daemon = True
        self.live: Any = None
        self.ended = False
        self.lock = threading.Lock()

    def begin(self) -> None:
        self.timer.start()

    def text(self) -> str:
        where = f", {self.stage}" if self.stage else ""
        return f"kvbuffer: compiling {self.what}{where}, {time.monotonic() - self.start:.0f} s"

    def _show(self) -> None:
        from rich.console import Console
        from rich.live import Live
        from rich.spinner import Spinner

        spinner = Spinner("dots")

        def now() -> Spinner:
            spinner.update(text=self.text())
            return spinner

        with self.lock:
            if not self.ended:
                console = Console(file=sys.stderr)
                self.live = Live(get_renderable=now, console=console, refresh_per_second=5, transient=True,
                                 redirect_stdout=False, redirect_stderr=False)  # fmt: skip
                self.live.start()

    def end(self) -> None:
        self.timer.cancel()
        with self.lock:
            self.ended = True
            if self.live is not None:
                self.live.stop()
