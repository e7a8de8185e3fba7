"""Whether something failed while a graph was compiled that may well not fail the next time.

What is made of such a graph is right, but not what another process should find: a compiler that was killed on a busy
machine, memory that was short during a proof, an error of our own.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class _Thread(threading.local):
    happened = False


_thread = _Thread()


def mark() -> None:
    """Something failed, in the compilation that this thread is in."""
    _thread.happened = True


def happened() -> bool:
    """Whether something has, since `watched` began."""
    return _thread.happened


@contextmanager
def watched() -> Iterator[None]:
    """A compilation of its own."""
    outer, _thread.happened = _thread.happened, False
    try:
        yield
    finally:
        _thread.happened = outer
