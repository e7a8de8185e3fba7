"""What a forked child process has to do differently."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_forked = False


def _in_child() -> None:
    global _forked
    _forked = True


os.register_at_fork(after_in_child=_in_child)


@contextmanager
def one_thread_in_a_fork() -> Iterator[None]:
    """In a forked child: without OpenMP's threads, which stayed in the parent and would be waited for without end."""
    if not _forked:
        yield
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
