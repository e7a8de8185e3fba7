"""Who owes what to which state. Rows belong to the state tensor, never to a graph or a module.

An `Account` is opened when a rewritten graph first meets a state tensor and goes with the tensor. `settle` folds its
rows into the state. Everything that reads a state elsewhere settles first (guard.py).
"""

from __future__ import annotations

import functools
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from kvbuffer_compile.accounts import Account, Place, alias, storage_users
from kvbuffer_compile.guard import GuardedState, on_touch, plain_calls
from kvbuffer_compile.ledger import Ledger
from kvbuffer_compile.overlap import address, covers, provide
from kvbuffer_compile.plan import Plan
from kvbuffer_compile.take_back import Counts, take_back

_ledger = Ledger()


def open_account(owner: Tensor, plan: Plan, place: Place | None = None) -> Account:
    """The account of a state, made if there is none; rows of another plan or alias are settled first.

    place: the slice of owner that is the state; None when it is all of it.
    """
    account = _ledger.accounts.get((id(owner), place))
    if account is not None and account.matches(owner, plan):
        for rival in account.rivals:
            rival.settle()
        return account
    if account is not None:
        close(account)
    if place is not None:
        _make_zero(id(owner))
    account = Account(owner, plan, _ledger.phase(plan.flush), place, _ledger)
    for rival in _ledger.overlapping(account.state):
        rival.settle()
        rival.rivals.append(account)
        account.rivals.append(rival)
    _ledger.add(account)
    account.exposed = not guard(owner) or (account.base is not None and not guard(account.base))
    if _fresh.pop(id(owner), None) is not None:
        account.begin()
    if plan.slots:
        account.provide()
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
    """Find states whose storage someone else holds now."""
    for account in {a.storage: a for a in accounts}.values():
        _ledger.check_aliases(account)


def close(account: Account) -> None:
    """Settle and forget an account."""
    account.settle()
    _ledger.remove(account)


def touch(
    tensor: Tensor, overwritten: bool = False, exposed: bool = False, zeros: bool = False
) -> list[Callable[[], None]]:
    """Called before a state's values are read or changed by anything but a rewritten graph.

    overwritten: as a whole; zeros: with nothing else. exposed: its memory is handed out. Returns what to call when the
    access has succeeded: rows are dropped only then.
    """
    later: list[Callable[[], None]] = []
    for key in [k for k, fresh in _fresh.items() if _same_memory(fresh(), tensor)] if _fresh else ():
        if zeros and key == id(tensor):
            provide(tensor)
        else:
            _make_zero(key)
    for account in _ledger.reached(tensor, exposed) if _ledger else ():
        account.exposed |= exposed
        account.provide()
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
        accounts = list(_ledger.overlapping(state))
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
    """A new state that is zero, with no memory before a step that may flush or anyone else needs it."""
    with torch.inference_mode(False):
        state = torch.empty(*sizes, dtype=dtype, device=device)
    declare_zero(state)
    with plain_calls():
        state.untyped_storage().resize_(0)
    return state


def _make_zero(key: int) -> None:
    """Someone looks at a fresh state, or changes it."""
    found = _fresh.pop(key, None)
    state = found() if found is not None else None
    if state is not None:
        with _disable_current_modes(), torch.no_grad():
            provide(state)
            alias(state).zero_()


def _same_memory(fresh: Tensor | None, tensor: Tensor) -> bool:
    return fresh is not None and address(fresh) == address(tensor)


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
        found = [a for t in tensors_in(obj) for a in _ledger.overlapping(t)]
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
    accounts = list(dict.fromkeys(a for t in tensors for a in _ledger.overlapping(t)))
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
    return address(tensor) == account.storage and covers(tensor, account.state)


_rowless: dict[int, weakref.ref[Tensor]] = {}  # states that recurrent steps write: no token of theirs can be taken back


def mark_rowless(owner: Tensor) -> None:
    """Remember a state that is stepped without rows."""
    key = id(owner)
    if key not in _rowless:
        _rowless[key] = weakref.ref(owner, lambda _: _rowless.pop(key, None))
