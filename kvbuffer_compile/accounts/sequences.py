"""Settling single sequences of a state, the others as they are."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from kvbuffer_compile.accounts.account import Account
from kvbuffer_compile.process.forks import one_thread_in_a_fork
from kvbuffer_compile.process.surroundings import neutral
from kvbuffer_compile.steps import composite


def are_along(account: Account, tensor: Tensor) -> bool:
    """Whether the first dim of this tensor is that of the account's sequences."""
    layout = account.plan.layout
    return account.owner() is tensor and account.place is None and layout.sequence and len(layout.dims[0]) == 1


def settle_sequences(account: Account, which: Sequence[int]) -> None:
    """Fold in what these sequences owe. To be called with the account's lock held."""
    account.reconcile()
    if account.drafts is not None or account.held is not None or account.without_memory:
        account.settle()
    elif account.dirty or account.bare:
        _fold(account, which)


@neutral
def _fold(account: Account, which: Sequence[int]) -> None:
    """One sequence after the other: each is a write of its own."""
    unsettled = account.unsettled
    account.forget_shadow()  # of all: whoever comes may write some of it
    account.history.disturbed = True
    with one_thread_in_a_fork():
        for n in which:
            rows = [row.narrow(0, n, 1) for row in account.rows]
            state, cursor = account.state.narrow(0, n, 1), account.cursor.narrow(1, n, 1)
            composite.flush(account.plan, state, cursor, rows, unsettled.narrow(0, n, 1))
