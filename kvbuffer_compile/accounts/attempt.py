"""What makes the tokens of a call count for all of its states at once."""

from __future__ import annotations

from torch import Tensor


class Attempt:
    """One call of a rewritten graph: all its states step, or none does.

    done: set when the call has gone through; the one write that commits the tokens of all states. parents: of the draft
    tree that was stepped over, drafted: the cursors (data_ptr) that have.
    """

    __slots__ = ("done", "drafted", "parents")

    def __init__(self, parents: Tensor | None = None) -> None:
        self.done = False
        self.parents = parents
        self.drafted: set[int] = set()
