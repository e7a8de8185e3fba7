"""Who owes what to which state. Rows belong to the state tensor, never to a graph or a module.

An `Account` is opened when a rewritten graph first meets a state tensor and goes with the tensor. `settle` folds its
rows into the state. Everything that reads a state elsewhere settles first (guard.py).
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from kvbuffer_compile.accounts import Account, Key, Place, alias, storage_users
from kvbuffer_compile.guard import GuardedState, on_touch, plain_calls
from kvbuffer_compile.overlap import covers, overlap
from kvbuffer_compile.plan import Plan
from kvbuffer_compile.take_back import Counts, take_back

_accounts: dict[Key, Account] = {}
_on_storage: dict[int, list[Account]] = {}  # by storage address: several states may share one allocation


def open_account(owner: Tensor, plan: Plan, phase: int, place: Place | None = None) -> Account:
    """The account of a state, made if there is none; rows of another plan or alias are settled first.

    place: the slice of owner that is the state; None when it is all of it.
    """
    account = _accounts.get((id(owner), place))
    if account is not None and account.matches(owner, plan):
        for rival in account.rivals:
            rival.settle()
        return account
    if account is not None:
        close(account)
    account = Account(owner, plan, phase, place, _owner_died)
    for rival in _overlapping(account.state):
        rival.settle()
        rival.rivals.append(account)
        account.rivals.append(rival)
    if place is not None:
        _make_zero(id(owner))
    _accounts[account.key] = account
    _on_storage.setdefault(account.storage, []).append(account)
    account.exposed = not guard(owner) or (account.base is not None and not guard(account.base))
    if _fresh.pop(id(owner), None) is not None:
        account.begin()
    return account


def guard(owner: Tensor) -> bool:
    """Make every later access to this tensor settle first. False for a class of tensors where that cannot be done."""
    # AOTAutograd's one-time check of custom ops gives up on tensor classes it does not know, with an error, whenever
    # a graph of any backend gets such a tensor.
    if getattr(torch._functorch.config, "check_custom_op_aliasing", False):
        torch._functorch.config.check_custom_op_aliasing = False
    if type(owner) in (Tensor, torch.nn.Buffer):
        owner.__class__ = GuardedState
    return type(owner) is GuardedState


def check_aliases(accounts: Sequence[Account]) -> None:
    """Find states whose storage someone else holds now: a tensor made before the state was guarded, a NumPy array, a
    view that another compiled graph returned."""
    for storage in {a.storage for a in accounts}:
        holders = _on_storage[storage]
        owners = {id(a.owner()) for a in holders}
        bases = {id(a.base) for a in holders if a.base is not None} - owners
        known = len(holders) + len(owners) + len(bases)
        aliased = holders[0].storage_users > known
        for account in holders:
            account.aliased = aliased


def close(account: Account) -> None:
    """Settle and forget an account."""
    account.settle()
    del _accounts[account.key]
    _forget_storage(account)


def _forget_storage(account: Account) -> None:
    for rival in account.rivals:
        rival.rivals.remove(account)
    holders = _on_storage[account.storage]
    holders.remove(account)
    if not holders:
        del _on_storage[account.storage]


def _owner_died(key: Key) -> None:
    """The user's tensor is going: free its rows, folding them in first if its storage lives on in another tensor."""
    account = _accounts.pop(key, None)
    if account is None or sys.is_finalizing():
        return
    # the dying owner and our aliases of it; a tensor that it was a view of may be the user's as well
    ours = 1 + sum(a.owner() is None for a in _on_storage[account.storage])
    if account.storage_users > ours:
        account.settle()
    _forget_storage(account)


def _overlapping(t: Tensor) -> Iterator[Account]:
    for account in tuple(_on_storage.get(t.untyped_storage().data_ptr(), ())):
        if overlap(account.state, t):
            yield account


def _reached(tensor: Tensor, exposed: bool) -> Iterable[Account]:
    """The accounts that an access to a tensor is about; to its memory as such, all that lie there."""
    return tuple(_on_storage.get(tensor.untyped_storage().data_ptr(), ())) if exposed else _overlapping(tensor)


def touch(
    tensor: Tensor, overwritten: bool = False, exposed: bool = False, zeros: bool = False
) -> list[Callable[[], None]]:
    """Called before a state's values are read or changed by anything but a rewritten graph.

    overwritten: as a whole; zeros: with nothing else. exposed: its memory is handed out. Returns what to call when the
    access has succeeded: rows are dropped only then.
    """
    later: list[Callable[[], None]] = []
    for key in [k for k, fresh in _fresh.items() if _same_memory(fresh(), tensor)] if _fresh else ():
        if not (zeros and key == id(tensor)):
            _make_zero(key)
    for account in _reached(tensor, exposed) if _on_storage else ():
        account.exposed |= exposed
        if overwritten and account.owner() is tensor:
            later.append(functools.partial(_overwritten, account, zeros))
        else:
            account.settle()
    return later


on_touch(touch)


def _overwritten(account: Account, zeros: bool) -> None:
    """What has been written as a whole from outside; if by zeros, nobody need look before there is a base, unless
    someone may write there unseen."""
    if zeros:
        check_aliases([account])
    account.drop(zeros and not (account.aliased or account.exposed))


# ------------------------------------------------------------------------------------------ fresh states

_fresh: dict[int, weakref.ref[Tensor]] = {}  # states of no account yet that are zero, whatever their memory holds


def declare_zero(state: Tensor) -> None:
    """A state is zero from now on, whatever its memory holds: that is neither read nor written before it has a base.

    For caches that make their states themselves: torch.empty will do. Memory that others hold as well is made zero.
    """
    with plain_calls():
        accounts = list(_overlapping(state))
        alone = storage_users(state.untyped_storage()._cdata) <= 1 + len(accounts)
        own = [a for a in accounts if a.owner() is state and a.place is None]
    if len(own) < len(accounts) or not alone or not guard(state):
        state.zero_()
    elif own:
        own[0].begin()
    else:
        key = id(state)
        _fresh[key] = weakref.ref(state, lambda _: _fresh.pop(key, None))


def zero_state(sizes: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A new state that is known to be zero."""
    with torch.inference_mode(False):
        state = torch.empty(*sizes, dtype=dtype, device=device)
    declare_zero(state)
    return state


def _make_zero(key: int) -> None:
    """Someone looks at a fresh state, or changes it."""
    found = _fresh.pop(key, None)
    state = found() if found is not None else None
    if state is not None:
        with _disable_current_modes(), torch.no_grad():
            alias(state).zero_()


def _same_memory(fresh: Tensor | None, tensor: Tensor) -> bool:
    return fresh is not None and fresh.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()


# ----------------------------------------------------------------------------------------- public calls


def materialize(obj: Any) -> None:
    """Fold the rows owed to a tensor, or to every state found in a cache, module or container, into the state now."""
    with plain_calls():
        for tensor in tensors_in(obj):
            touch(tensor)


def tensors_in(obj: Any) -> Iterator[Tensor]:
    """Every tensor reachable through containers and attributes, each object visited once."""
    seen: set[int] = set()
    stack = [obj]
    while stack:
        x = stack.pop()
        if id(x) in seen or isinstance(x, str | bytes | int | float | type):
            continue
        seen.add(id(x))
        if isinstance(x, Tensor):
            yield x
        elif isinstance(x, dict):
            stack.extend(x.values())
        elif isinstance(x, list | tuple | set | frozenset | deque):
            stack.extend(x)
        elif isinstance(x, ModuleType):
            continue
        elif hasattr(x, "__dict__") and not callable(getattr(x, "__code__", None)):
            stack.extend(vars(x).values())
        stack.extend(getattr(x, name) for name in getattr(type(x), "__slots__", ()) if hasattr(x, name))


def accounts_of(obj: Any) -> list[Account]:
    """The accounts of the states reachable from obj (a tensor, cache, module or container)."""
    with plain_calls():
        found = [a for t in tensors_in(obj) for a in _overlapping(t)]
    return list(dict.fromkeys(found))


def rollback(obj: Any, n: Counts) -> None:
    """Take back the last n tokens of every buffered state in obj, as if they had never been.

    obj: a tensor, a cache, a module or a container. n: one count, or one per sequence. ValueError, with everything as
    it was, when a count is negative or more than can be taken back from one of the states, or when obj holds no
    buffered state, a part of one, or a state that is stepped without rows. A tensor n on a state's own device is not
    brought to the host: a wrong one fails on the device.
    """
    with plain_calls():
        tensors = list(tensors_in(obj))
        take_back(whole_accounts(tensors, "rollback(obj, n)"), n)


def whole_accounts(tensors: Sequence[Tensor], call: str) -> list[Account]:
    """The accounts of the states in a list of tensors; ValueError when a state is there in part, or has no rows."""
    accounts = list(dict.fromkeys(a for t in tensors for a in _overlapping(t)))
    for account in accounts:
        if not any(t is account.owner() or _covers(t, account) for t in tensors):
            raise ValueError(f"{call}: obj holds a part of a state, of which no tokens can be taken back by themselves")
    if not accounts:
        raise ValueError(f"{call}: obj holds no state with buffered tokens")
    owners = {id(a.owner()) for a in accounts}
    if any(id(t) in _rowless and id(t) not in owners for t in tensors):
        raise ValueError(f"{call}: obj holds a state that is stepped without a buffer, by a plan of flush length 1")
    return accounts


def _covers(tensor: Tensor, account: Account) -> bool:
    same = tensor.untyped_storage().data_ptr() == account.storage
    return same and covers(tensor, account.state)


_rowless: dict[int, weakref.ref[Tensor]] = {}  # states that recurrent steps write: no token of theirs can be taken back


def mark_rowless(owner: Tensor) -> None:
    """Remember a state that is stepped without rows."""
    key = id(owner)
    if key not in _rowless:
        _rowless[key] = weakref.ref(owner, lambda _: _rowless.pop(key, None))
