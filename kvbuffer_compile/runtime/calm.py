"""Calls whose states owe nothing, since they are stepped without rows: what was looked up once is not looked up again.

A state that is written at every step may still lie in memory that others owe rows to, or be guarded since it was
stepped with rows before. A call that finds nothing of the kind says so for the next ones, for as long as it is true.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, Self

from torch import Tensor

from kvbuffer_compile.accounts.ledger import LEDGER
from kvbuffer_compile.guard.aliases import is_alias


class Calm:
    """That the states of a call were ordinary tensors, in the memory of no account: while the next call has the same
    ones, and no account was opened since, there is nothing to be settled."""

    __slots__ = ("_opened", "_others", "_states")

    def __init__(self, opened: int, states: Sequence[tuple[int, weakref.ref[Tensor]]], others: Sequence[int]) -> None:
        self._opened, self._states, self._others = opened, states, others

    @classmethod
    def of(cls, args: Sequence[Any], states: Sequence[int], others: Sequence[int]) -> Self | None:
        """After a call has settled its inputs. states: positions of those that it steps; others: of further inputs that
        can be states, other ones at every call."""
        opened = LEDGER.opened
        if any(is_alias(args[i]) or LEDGER.in_memory_of(args[i]) for i in states):
            return None
        return cls(opened, [(i, weakref.ref(args[i])) for i in states], others)

    def holds(self, args: Sequence[Any]) -> bool:
        """Whether a call with these inputs has nothing to settle."""
        if LEDGER.opened != self._opened or not all([ref() is args[i] for i, ref in self._states]):
            return False
        return not any([is_alias(args[i]) for i in self._others])
