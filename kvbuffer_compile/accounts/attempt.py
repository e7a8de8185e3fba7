"""What makes the tokens of a call count for all of its states at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import Tensor

from kvbuffer_compile.guard.sharing import Watch
from kvbuffer_compile.process.locks import RLock

A = TypeVar("A")  # accounts know of attempts, and attempts only who takes part


@dataclass(slots=True)
class Again(Generic[A]):
    """All that another call of the same graph with the same states needs: nothing is looked up or counted one by one.

    given: the aliases by which the call finds the states. lock: that of every account. tail: the arguments behind the
    user's own. watch: on the states' memory, while nobody else holds it.
    """

    accounts: Sequence[A]
    given: Sequence[Tensor]
    lock: RLock
    tail: Sequence[Tensor]
    watch: Watch


class Attempt(Generic[A]):
    """Calls of a rewritten graph with nothing between them: in each of them all its states step, or none does.

    begun, done: how many calls. Writing `done` is what commits the tokens of all states. again: what the next call
    needs; None when there is none that may be counted here, since somebody else looks at one of the states.
    parents: of the draft tree that was stepped over, drafted: the cursors (data_ptr) that have.
    """

    __slots__ = ("again", "begun", "done", "drafted", "parents")

    def __init__(self, parents: Tensor | None = None) -> None:
        self.begun, self.done = 1, 0
        self.again: Again[A] | None = None
        self.parents = parents
        self.drafted: set[int] = set()
