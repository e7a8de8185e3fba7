"""The accounts there are: by the tensor they were opened for, and by the memory their states lie in.

Tables are read without a lock, in steps that the interpreter does not divide, and changed under one. Tensors die at any
point of any thread, also while this one changes a table: then their deaths are only noted, and dealt with behind it.
"""

from __future__ import annotations

import heapq
import itertools
import os
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress

import torch
from torch import Tensor

from kvbuffer_compile.accounts.account import Account, Key
from kvbuffer_compile.accounts.allocation import Allocation
from kvbuffer_compile.accounts.history import Tally
from kvbuffer_compile.guard.overlap import overlap, storage_of

Region = tuple[int, int, torch.Size]  # of memory: storage, place in it, shape
MOST_BRIEF = 256


def region_of(t: Tensor) -> Region:
    """The part of which allocation a tensor is."""
    return storage_of(t), int(t.storage_offset()), t.shape


class Phases:
    """The counts at which states of one flush length first flush, so that no token pays for many layers, whichever
    graphs they are in: each as often as any other, and those that follow each other far apart."""

    def __init__(self, flush: int) -> None:
        self.flush = flush
        bits = flush.bit_length()
        self.order = sorted(range(flush), key=lambda n: int(f"{n:0{bits}b}"[::-1], 2))  # 0, half, a quarter, ...
        self.next = 0
        self.free: list[int] = []

    def take(self) -> tuple[int, int]:
        """A number, to be given back, and its phase, 1 to flush."""
        if self.free:
            number = heapq.heappop(self.free)
        else:
            number, self.next = self.next, self.next + 1
        return number, self.flush - self.order[number % self.flush]

    def give_back(self, number: int) -> None:
        """The state with this number is gone."""
        heapq.heappush(self.free, number)


class Ledger:
    """Finds accounts. Several states may share one allocation."""

    def __init__(self) -> None:
        self.accounts: dict[Key, Account] = {}
        self.by_alias: dict[int, Account] = {}  # by the id of what stands for the owner, where that is the state
        self.allocations: dict[int, Allocation[Account]] = {}  # by overlap.storage_of
        self.opened = 0  # accounts, ever
        self.gone = Tally()  # of states that are gone
        self.brief: dict[Region, int] = {}  # how many in a row were stepped once and are gone, unlike their memory
        self._phases: dict[int, Phases] = {}  # by flush length
        self._numbers: dict[int, tuple[Phases, int]] = {}  # by the account's serial number
        self._serials = itertools.count()
        self._died: deque[weakref.ref[Account]] = deque()
        self._lock = threading.RLock()
        self._changing = False
        os.register_at_fork(after_in_child=self._in_child)

    def __bool__(self) -> bool:
        return bool(self.allocations)

    def _in_child(self) -> None:
        """Other threads, and with them the locks they held, stayed in the parent."""
        self._lock, self._changing = threading.RLock(), False
        for found in self.allocations.values():
            for account in found.accounts:
                account.leave()
                account.lock = threading.RLock()

    def _change(self, change: Callable[[], None]) -> None:
        with self._lock:
            before, self._changing = self._changing, True
            try:
                change()
            finally:
                self._changing = before
        self.bury()

    # ------------------------------------------------------------------------------- opening and closing

    def open(self, make: Callable[[int, int], Account], flush: int) -> Account:
        """An account made by make(serial, phase), and kept."""
        self.bury()
        with self._lock:
            phases = self._phases.setdefault(flush, Phases(flush))
            number, phase = phases.take()
        serial = next(self._serials)
        self._numbers[serial] = phases, number
        try:
            account = make(serial, phase)
        except BaseException:
            self._give_back(serial)
            raise
        self._change(lambda: self._add(account))
        return account

    def _add(self, account: Account) -> None:
        found = self.allocations.get(storage_of(account.state))
        if found is None:
            found = self.allocations[storage_of(account.state)] = Allocation(account.state)
        account.allocation = found
        self.opened += 1
        found.add(account)
        self.accounts[account.key] = account
        self.by_alias[id(account.state)] = account

    def close(self, account: Account, why: str, heir: bool = False) -> None:
        """Settle and forget an account. why: for people. heir: another account goes on with its counts."""
        account.settle(why)
        self._remove(account)
        if not heir:
            self._remember(account)

    def _remember(self, account: Account) -> None:
        """Keep the counts of an account that nobody steps any more, for people."""
        with suppress(Exception):
            counts = account.history.now(account.so_far, wait=False)
            with self._lock:
                self.gone.add(counts)

    def _remove(self, account: Account) -> None:
        self._change(lambda: self._removed(account))

    def _removed(self, account: Account) -> None:
        account.leave()
        if self.accounts.get(account.key) is account:
            del self.accounts[account.key]
        self.by_alias.pop(id(account.state), None)
        for rival in list(account.rivals):
            if account in rival.rivals:
                rival.rivals.remove(account)
        account.allocation.remove(account)
        if not account.allocation.accounts:
            self.allocations.pop(account.allocation.storage.handle, None)
        self._give_back(account.serial)

    def _give_back(self, serial: int) -> None:
        phases, number = self._numbers.pop(serial, (None, 0))
        if phases is not None:
            with self._lock:
                phases.give_back(number)

    # ------------------------------------------------------------------------------------------ deaths

    def owner_died(self, account: weakref.ref[Account], owner: object = None) -> None:
        """What the garbage collector calls when the user's tensor is going: at any point, in any thread."""
        if sys.is_finalizing():
            return
        found = account()
        if found is None:
            return
        if not self._changing and found.lock.acquire(blocking=False):
            try:
                self._bury(found, dying=True)
            finally:
                found.lock.release()
        else:
            self._died.append(account)

    def bury(self) -> None:
        """Deal with the deaths that were only noted."""
        while self._died and not self._changing:
            try:
                found = self._died.popleft()()
            except IndexError:
                return
            if found is not None:
                self._bury(found, dying=False)

    def _bury(self, account: Account, dying: bool) -> None:
        """Free the rows of a state, folded in first if its memory lives on in another tensor."""
        if account not in account.allocation:
            return
        account.leave()  # it would keep tensors on the memory alive
        if account.allocation.outlives(dying):
            self._note_brief(account)
            account.settle("its tensor is gone, its memory is not")
        self._remove(account)
        self._remember(account)

    def _note_brief(self, account: Account) -> None:
        region, steps = region_of(account.state), account.so_far[0]
        times = self.brief.pop(region, 0) + 1  # of many regions, the latest are kept
        if isinstance(steps, int) and steps == 1:  # of no pool
            self.brief[region] = times
        if len(self.brief) > MOST_BRIEF:
            del self.brief[next(iter(self.brief))]

    # ----------------------------------------------------------------------------------------- finding

    def in_memory_of(self, t: Tensor) -> list[Account]:
        """The accounts of states in the same allocation, wherever there."""
        self.bury()
        found = self.allocations.get(storage_of(t))
        return [] if found is None else found.accounts

    def overlapping(self, t: Tensor) -> list[Account]:
        """The accounts of states of which a tensor is a part, or they of it."""
        return [a for a in self.in_memory_of(t) if overlap(a.state, t)]

    def reached(self, tensors: Iterable[Tensor], whole: bool = False) -> list[Account]:
        """The accounts of states that overlap with any of these tensors; whole: or share an allocation with one."""
        find = self.in_memory_of if whole else self.overlapping
        return list({a.serial: a for t in tensors for a in find(t)}.values())


LEDGER = Ledger()
