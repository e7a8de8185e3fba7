"""How tests look at what a state owes: the one place that knows where the runtime keeps it."""

from __future__ import annotations

from torch import Tensor

from kvbuffer_compile.runtime import by_hand


def owed(state: Tensor) -> int:
    """The rows that the sequences of a state owe at most; looking does not settle them."""
    return max((int(account.cursor[0].max()) for account in by_hand.accounts_of(state)), default=0)
