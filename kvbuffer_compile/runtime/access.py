"""What happens when anything but a rewritten graph reads or changes a state: what is owed is folded in first."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket

from kvbuffer_compile.accounts.account import Account, geometry
from kvbuffer_compile.accounts.fresh import make_zero
from kvbuffer_compile.accounts.ledger import LEDGER
from kvbuffer_compile.guard import dispatch_watch
from kvbuffer_compile.guard.aliases import forget, known_alias, plain
from kvbuffer_compile.guard.guarded import GuardedState, is_export, is_inspecting, on_access, plain_calls, states_in
from kvbuffer_compile.guard.sharing import hand_out, handed_out
from kvbuffer_compile.guard.wrapped import inside, is_wrapper
from kvbuffer_compile.process.callers import Site
from kvbuffer_compile.process.locks import under_locks

_alias_of = torch._C._is_alias_of  # type: ignore[attr-defined]  # whether two tensors share a storage
_ZEROES: frozenset[Any] = frozenset([Tensor.zero_, torch.zero_])
# These ask a tensor for its dispatch key, and take a device from it.
_ALONE = (Tensor, GuardedState, torch.nn.Parameter, torch.nn.Buffer)
_TORCHS = ("aten", "prims", "prim", "quantized", "_c10d_functional")
_LEGACY: frozenset[Any] = frozenset(getattr(Tensor, n) for n in ("new", "new_tensor", "resize", "resize_as"))
_FILLS: frozenset[Any] = frozenset([Tensor.fill_, torch.fill_])


def touch(tensor: Tensor) -> None:
    """Called before a state's values are read or changed by anything but a rewritten graph."""
    make_zero(tensor)
    for account in LEDGER.overlapping(tensor) if LEDGER else ():
        account.settle()


def accessed(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A torch function on guarded tensors, run while nothing is owed to them and nobody steps them."""
    states = list(states_in((args, kwargs)))
    exported = is_export(func)
    zeros = _writes_zeros(func, args, kwargs)
    reached = LEDGER.reached(states, whole=exported)

    # An operator with graphs in it compiles them, and one of the user's may step states and read them: nobody must wait
    # for a lock of ours meanwhile. What is inside of other tensors is seen below Python only.
    users = _is_users(func) or any(map(_may_hold_others, (*args, *kwargs.values())))
    free = users or isinstance(func, HigherOrderOperator)

    def run() -> Any:
        for state in states:
            make_zero(state, known_zero=zeros and state is args[0])
        for account in reached:
            account.settle()
        if exported:
            _hand_out(states, reached, f"whoever called {getattr(func, '__name__', func)}() on it")
        with _watched() if users else dispatch_watch.unwatched():
            out = func(*_unmarked(args), **kwargs) if func in _LEGACY else func(*args, **kwargs)
        for state in states:
            _check_geometry(state)
        if zeros:
            _zeroed(args[0])
        return out

    out = run() if free else under_locks(reached, run)
    guard_views(out, states)
    return out


class _Thread(threading.local):
    watched = 0  # calls of this thread, one in another, whose own calls are looked at


_thread = _Thread()


@contextmanager
def _watched() -> Iterator[None]:
    _thread.watched += 1
    try:
        yield
    finally:
        _thread.watched -= 1


def stepped_within() -> None:
    """Called before states are stepped: the call that this happens in, if any, may read them again afterwards."""
    if _thread.watched:
        dispatch_watch.again()


def _is_users(func: Any) -> bool:
    """Whether a function is an operator whose kernel may be Python code of the user's."""
    return isinstance(func, OpOverload | OpOverloadPacket) and str(func).split(".")[0] not in _TORCHS


def _may_hold_others(x: object) -> bool:
    return isinstance(x, Tensor) and type(x) not in _ALONE


def _unmarked(args: tuple[Any, ...]) -> list[Any]:
    return [plain(a) if isinstance(a, Tensor) else a for a in args]


def touched_below(op: str, tensors: list[Tensor]) -> None:
    """Called before an operation that did not come by way of a state's class."""
    if not is_inspecting():
        with plain_calls():
            for tensor in tensors:
                touch(tensor)


def settle_memory(state: Tensor, exported: bool) -> None:
    """Fold in what is owed to all states in the memory of one. exported: others will read and write it unseen."""
    make_zero(state)
    for account in LEDGER.in_memory_of(state):
        account.settle()
    if exported:
        _hand_out([state], LEDGER.in_memory_of(state), "whoever was given it in another class, or in another process")


def _hand_out(states: Sequence[Tensor], accounts: Sequence[Account], why: str) -> None:
    """Remember who can reach the memory of states from now on: with the line of the first that got it."""
    new = [state for state in states if handed_out(state) is None]
    if not new and all(account.shared for account in accounts):
        return
    why = f"{why} ({site})" if (site := Site.find()) else why
    for account in accounts:
        account.shared = account.shared or why
    for state in new:
        hand_out(state, why)


on_access(accessed, settle_memory)


def _writes_zeros(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a state is overwritten with what is known to be zero without looking at it."""
    if func in _ZEROES:
        return isinstance(args[0], GuardedState)
    value = args[1] if len(args) > 1 else kwargs.get("value")
    return func in _FILLS and isinstance(value, int | float) and value == 0 and isinstance(args[0], GuardedState)


def _zeroed(state: Tensor) -> None:
    """Of a state that is zero nobody need look at the memory before there is a base, unless someone may write there
    unseen."""
    for account in LEDGER.overlapping(state):
        if account.owner() is state and account.place is None and not (account.allocation.check() or account.shared):
            account.drop(zero=True)


def _check_geometry(state: Tensor) -> None:
    """A state whose shape or memory was changed is another one from now on."""
    known = known_alias(state)
    if known is not None and geometry(known) != geometry(state):
        for account in [a for key, a in list(LEDGER.accounts.items()) if key[0] == id(state)]:
            LEDGER.close(account, "its shape or memory was changed")
        forget(id(state))


def guard_views(out: Any, states: Sequence[Tensor]) -> None:
    """Guard every tensor in a result that lies in the memory of one of these states: it may be read after later steps.

    By their storage: detach() and inference mode make views that autograd does not count as such.
    """
    if type(out) is Tensor:
        if out.layout is torch.strided and any(_alias_of(out, s) for s in states):
            out.__class__ = GuardedState
    elif isinstance(out, list | tuple):
        for x in out:
            guard_views(x, states)
    elif is_wrapper(out):
        guard_views(list(inside(out)), states)
