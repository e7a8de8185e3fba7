"""Writes that belong together and that no exception can come between."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from operator import call


def at_once(*writes: Callable[[], object]) -> None:
    """Do all of these calls, in order. Each is a `functools.partial` of a function written in C, such as a tensor's
    `copy_` or `setattr`.

    CPython raises KeyboardInterrupt, or what another thread sends, between two bytecodes; here there are none: the
    loop itself runs in C. The calls must not fail either: whatever they need, values of the right dtype above all, is
    computed before. What commits the rest comes last, so that an error of the device in between is a step not done.
    """
    deque(map(call, writes), maxlen=0)
