"""The accounts there are: by the tensor they were opened for, and by the memory their states lie in."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator

from torch import Tensor

from kvbuffer_compile.accounts import Account, Key
from kvbuffer_compile.overlap import address, overlap


class Ledger:
    """Finds accounts. Several states may share one allocation."""

    def __init__(self) -> None:
        self.accounts: dict[Key, Account] = {}
        self.lying_at: dict[int, list[Account]] = {}  # by overlap.address

    def __bool__(self) -> bool:
        return bool(self.accounts)

    def add(self, account: Account) -> None:
        self.accounts[account.key] = account
        self.lying_at.setdefault(account.storage, []).append(account)

    def phase(self, flush: int) -> int:
        """The count at which the next state first flushes, so that no token pays for many layers, whichever graphs they
        are in: one that as few states have as any, and of these the farthest from those that more have."""
        taken = Counter(a.phase for a in self.accounts.values() if a.plan.flush == flush)
        least = min(taken[p] for p in range(1, flush + 1))
        crowded = [p for p in taken if taken[p] > least]

        def distance(phase: int) -> int:
            return min((min((phase - p) % flush, (p - phase) % flush) for p in crowded), default=0)

        return max((p for p in range(1, flush + 1) if taken[p] == least), key=lambda p: (distance(p), p))

    def remove(self, account: Account) -> None:
        """Forget an account that owes nothing."""
        self.accounts.pop(account.key, None)
        for rival in account.rivals:
            rival.rivals.remove(account)
        holders = self.lying_at[account.storage]
        holders.remove(account)
        if not holders:
            del self.lying_at[account.storage]

    def owner_died(self, key: Key) -> None:
        """The user's tensor is going: free its rows, folded in first if its storage lives on in another tensor."""
        account = self.accounts.pop(key, None)
        if account is None or sys.is_finalizing():
            return
        # the dying owner and our aliases of it; a tensor that it was a view of may be the user's as well
        ours = 1 + sum(a.owner() is None for a in self.lying_at[account.storage])
        if account.storage_users > ours:
            account.settle()
        self.remove(account)

    def moved(self, account: Account, before: int) -> None:
        """The state of an account has memory now."""
        self.lying_at[before].remove(account)
        if not self.lying_at[before]:
            del self.lying_at[before]
        self.lying_at.setdefault(account.storage, []).append(account)

    def in_memory_of(self, t: Tensor) -> tuple[Account, ...]:
        """The accounts of states in the same allocation, wherever there."""
        return tuple(self.lying_at.get(address(t), ()))

    def overlapping(self, t: Tensor) -> Iterator[Account]:
        """The accounts of states of which a tensor is a part, or they of it."""
        for account in self.in_memory_of(t):
            if overlap(account.state, t):
                yield account

    def reached(self, t: Tensor, exposed: bool) -> tuple[Account, ...]:
        """The accounts that an access to a tensor is about; exposed: to its memory as such, all that lie there."""
        return self.in_memory_of(t) if exposed else tuple(self.overlapping(t))

    def check_aliases(self, account: Account) -> None:
        """Find out whether someone else holds the storage of a state now: a tensor made before the state was guarded, a
        NumPy array, a view that another compiled graph returned."""
        holders = self.lying_at[account.storage]
        owners = {id(a.owner()) for a in holders}
        bases = {id(a.base) for a in holders if a.base is not None} - owners
        known = len(holders) + len(owners) + len(bases)
        aliased = account.storage_users > known
        for holder in holders:
            holder.aliased = aliased
