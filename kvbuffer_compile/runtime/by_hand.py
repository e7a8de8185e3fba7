"""The states that are found in the user's objects, and what can be done with them by hand.

Rows belong to the state tensor, never to a graph or a module: an `Account` (accounts/) is opened when a rewritten graph
first meets a state (opening.py), found by the tensor or its memory (ledger.py), settled by whoever else looks
(access.py, entry.py), and goes with the tensor.
"""

from __future__ import annotations

import functools
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from types import FunctionType, ModuleType
from typing import Any

from torch import Tensor

from kvbuffer_compile.accounts.account import Account
from kvbuffer_compile.accounts.fresh import declare_zero, zero_state
from kvbuffer_compile.accounts.ledger import LEDGER
from kvbuffer_compile.accounts.rollback import Counts, note, take_back
from kvbuffer_compile.guard.guarded import plain_calls
from kvbuffer_compile.guard.overlap import covers, storage_of
from kvbuffer_compile.guard.wrapped import inside, is_wrapper
from kvbuffer_compile.process.locks import under_locks
from kvbuffer_compile.runtime.access import touch

__all__ = [
    "accounts_of", "check_holder", "declare_zero", "mark_rowless", "materialize", "rollback", "rowless_in",
    "tensors_in", "touch", "whole_accounts", "zero_state",
]  # fmt: skip


def materialize(obj: Any) -> None:
    """Fold the rows owed to a tensor, or to every state found in a cache, module or container, into the state now.

    ValueError for what can hold no state: a function, a string or a number.
    """
    check_holder(obj, "materialize(obj)")
    with plain_calls():
        for tensor in tensors_in(obj):
            touch(tensor)


def check_holder(obj: Any, call: str) -> None:
    """ValueError for an object that can hold no state, for which nothing would be done or told without a word."""
    if isinstance(obj, str | bytes | int | float | FunctionType):
        text = "a function" if isinstance(obj, FunctionType) else repr(obj)
        raise ValueError(
            f"{call}: obj is {text}, which holds no states: give a tensor, a cache, a module or a container of them, "
            "what a compiled function is called with"
        )


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
            if is_wrapper(x):
                stack.extend(inside(x))
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
        found = list(dict.fromkeys(a for t in tensors_in(obj) for a in LEDGER.overlapping(t)))
        for account in found:
            with account.lock:
                account.reconcile()
    return found


def rollback(obj: Any, n: Counts) -> None:
    """Take back the last n tokens of every buffered state in obj, as if they had never been.

    obj: a tensor, a cache, a module or a container. n: one count, or one per sequence. ValueError, with everything as
    it was, when a count is negative or more than can be taken back from one of the states, or when obj holds no
    buffered state, a part of one, or a state that is stepped without rows. A tensor n on a state's own device is not
    brought to the host: a wrong one fails on the device.
    """
    check_holder(obj, "rollback(obj, n)")
    with plain_calls():
        accounts = whole_accounts(list(tensors_in(obj)), "rollback(obj, n)")
        under_locks(accounts, lambda: _reconciled(accounts, lambda: take_back(accounts, n)))
        note(accounts, n)


def _reconciled(accounts: Sequence[Account], call: Callable[[], None]) -> None:
    for account in accounts:
        account.reconcile()
    call()


_WITHOUT = (
    "obj holds a state that is stepped without a buffer, by a plan of flush length 1; compile with an integer flush, "
    "options={'flush': 16} say, where tokens are to be taken back"
)
_NOTHING = (
    "obj holds no state with buffered tokens: it was not yet stepped by what was compiled with backend='kvbuffer', or "
    "it was declined (kvbuffer_compile.explain(fn, *args) says why; where it says 'no-gain', compile with an integer "
    "flush, options={'flush': 16} say), or obj is a copy of what is stepped"
)


def whole_accounts(tensors: Sequence[Tensor], call: str) -> list[Account]:
    """The accounts of the states in a list of tensors; ValueError when a state is there in part, or has no rows."""
    accounts = list(dict.fromkeys(a for t in tensors for a in LEDGER.overlapping(t)))
    for account in accounts:
        if not any(t is account.owner() or _covers(t, account) for t in tensors):
            raise ValueError(f"{call}: obj holds a part of a state, of which no tokens can be taken back by themselves")
    if not accounts:
        rowless = any(id(t) in _rowless for t in tensors)
        raise ValueError(f"{call}: {_WITHOUT if rowless else _NOTHING}")
    owners = {id(a.owner()) for a in accounts}
    if any(id(t) in _rowless and id(t) not in owners for t in tensors):
        raise ValueError(f"{call}: {_WITHOUT}")
    return accounts


def _covers(tensor: Tensor, account: Account) -> bool:
    return storage_of(tensor) == storage_of(account.state) and covers(tensor, account.state)


_rowless: dict[int, weakref.ref[Tensor]] = {}  # states that recurrent steps write: no token of theirs can be taken back


def rowless_in(obj: Any) -> int:
    """How many states of obj are stepped without rows; None asks for all there are."""
    if obj is None:
        return len(_rowless)
    return sum(id(t) in _rowless for t in tensors_in(obj))


def mark_rowless(owner: Tensor) -> None:
    """Remember a state that is stepped without rows."""
    key = id(owner)
    if key not in _rowless:
        _rowless[key] = weakref.ref(owner, functools.partial(_rowless.pop, key))
