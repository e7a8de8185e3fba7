"""Accounts are opened when a rewritten graph meets a state, and again when the state or its plan has changed."""

from __future__ import annotations

import logging
import threading

from torch import Tensor

from kvbuffer_compile.accounts.account import Account
from kvbuffer_compile.accounts.fresh import forget_fresh, is_fresh, make_zero
from kvbuffer_compile.accounts.history import ELSE, IN_A_ROW
from kvbuffer_compile.accounts.ledger import LEDGER, region_of
from kvbuffer_compile.guard.aliases import Place
from kvbuffer_compile.guard.guarded import GuardedState, guard, plain_calls
from kvbuffer_compile.guard.overlap import storage_of
from kvbuffer_compile.guard.sharing import Storage, hand_out, handed_out, shared_with
from kvbuffer_compile.ir.plan import Plan
from kvbuffer_compile.process.callers import warn_once
from kvbuffer_compile.process.locks import RLock

log = logging.getLogger("kvbuffer_compile")
_RIVAL = "another state in the same memory is stepped"


def open_account(owner: Tensor, plan: Plan, place: Place | None = None, lock: RLock = None) -> Account:
    """The account of a state, made if there is none; rows of another plan or alias are settled first.

    place: the slice of owner that is the state; None when it is all of it. lock: for a new account, that of the states
    it is stepped with.
    """
    account = LEDGER.accounts.get((id(owner), place))
    if account is not None and account.matches(owner, plan):
        account.history.single &= not plan.several
        for rival in account.rivals:
            rival.settle(_RIVAL)
        return account
    replaced = account
    if replaced is not None:
        LEDGER.close(replaced, "a graph with another plan steps the state, or it has moved in memory", heir=True)
    if place is not None:
        make_zero(owner)
    shared = _first_met(owner)
    mutex = lock or threading.RLock()
    account = LEDGER.open(lambda serial, phase: Account(owner, plan, place, mutex, LEDGER, serial, phase), plan.flush)
    account.shared = shared
    if replaced is not None:
        account.history.before = replaced.tally(wait=False)
    for rival in LEDGER.overlapping(account.state):
        if rival is not account:
            rival.settle(_RIVAL)
            rival.rivals.append(account)
            account.rivals.append(rival)
    if is_fresh(owner):
        account.begin()
        forget_fresh(storage_of(owner), id(owner))
    if plan.slots:
        account.provide()
    _warn_of_views(account)
    return account


def _warn_of_views(account: Account) -> None:
    """Once, where each call takes a new view of the same memory."""
    if LEDGER.brief and LEDGER.brief.get(region_of(account.state), 0) >= IN_A_ROW:
        shape = tuple(account.state.shape)
        warn_once(shape, f"kvbuffer: a new view of the same state, of shape {shape}, is made for every call: each gets "
                  "rows of its own, which are folded in when it is gone, and buffering gains nothing; make the view "
                  f"once and keep it, {ELSE}")  # fmt: skip


def reached_by(owner: Tensor) -> str | None:
    """Who else can reach the memory of a state, so that it is never owed anything; None when nobody can."""
    with plain_calls():
        if (why := handed_out(owner)) is not None:
            return why
        return _exported(owner) if type(owner) is GuardedState else shared_with(owner)


def _first_met(owner: Tensor) -> str | None:
    """Guard a state that is about to owe rows; who else can reach its memory, if anybody."""
    shared = reached_by(owner)
    if shared is not None:  # before it is guarded, at any point: then who holds it cannot be told from ourselves
        hand_out(owner, shared)
    base = owner._base if owner._is_view() else None
    if not guard(owner) or (base is not None and not guard(base)):
        shared = shared or f"code that knows nothing of its class, {type(owner).__name__}"
        hand_out(owner, shared)
    if shared is not None:
        log.debug("a state of shape %s owes nothing: its memory is shared with %s", tuple(owner.shape), shared)
    return shared


def _exported(owner: Tensor) -> str | None:
    """Of a state that is guarded: what has become of its memory itself. All else was noted when it was handed out."""
    storage = Storage(owner).object
    return shared_with(owner) if storage.is_shared() or not storage.resizable() else None
