"""States are read and stepped by one thread at a time: each has a lock, shared with those it is stepped with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

RLock = Any  # threading.RLock is a function
T = TypeVar("T")


class Locked(Protocol):
    """What has a lock."""

    lock: RLock


def under_locks(accounts: Sequence[Locked], call: Callable[[], T]) -> T:
    """call() with the locks of these accounts held. One lock after the other, always in the same order."""
    return _holding(sorted({a.lock for a in accounts}, key=id), call)


def _holding(locks: list[RLock], call: Callable[[], T]) -> T:
    if not locks:
        return call()
    with locks[0]:  # nested, so that no exception leaves one behind
        return _holding(locks[1:], call)
