"""States that are zero, whatever their memory holds: it is neither read nor written before they have a base."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from kvbuffer_compile.accounts.account import Account
from kvbuffer_compile.accounts.ledger import LEDGER
from kvbuffer_compile.guard.aliases import alias, known_alias
from kvbuffer_compile.guard.guarded import guard, plain_calls
from kvbuffer_compile.guard.overlap import provide, storage_of
from kvbuffer_compile.guard.sharing import Storage, shared_with
from kvbuffer_compile.process.surroundings import neutral

# States of no account yet that are zero, whatever their memory holds: by their storage, then by id.
_fresh: dict[int, dict[int, weakref.ref[Tensor]]] = {}


def declare_zero(state: Tensor) -> None:
    """A state is zero from now on, whatever its memory holds: that is neither read nor written before it has a base.

    For caches that make their states themselves: torch.empty will do. Memory that others hold as well is made zero.
    """
    with plain_calls():
        accounts = LEDGER.overlapping(state)
        own = [a for a in accounts if a.owner() is state and a.place is None]
        if not _alone(state, accounts) or len(own) < len(accounts) or not guard(state):
            make_zero(state)
            for account in accounts:
                account.settle()
            state.zero_()
        elif own:
            own[0].begin()
        else:
            _remember_fresh(state)


def is_fresh(state: Tensor) -> bool:
    """Whether a state without an account is known to be zero."""
    return bool(_fresh) and id(state) in _fresh.get(storage_of(state), {})


def forget_fresh(place: int, key: int, state: object = None) -> None:
    """What the state with this id, in this storage, holds is true, or known to its account; or the state died."""
    others = _fresh.get(place, {})
    others.pop(key, None)
    if not others:
        _fresh.pop(place, None)


def _alone(state: Tensor, accounts: list[Account]) -> bool:
    if accounts:
        return not any(a.shared or a.allocation.check() for a in accounts)
    return Storage(state).users <= 1 + (known_alias(state) is not None) and shared_with(state) is None


def _remember_fresh(state: Tensor) -> None:
    place, key = storage_of(state), id(state)
    _fresh.setdefault(place, {})[key] = weakref.ref(state, functools.partial(forget_fresh, place, key))


def zero_state(sizes: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A new state that is zero, with no memory before a step that may flush or anyone else needs it."""
    with torch.inference_mode(False):
        state = torch.empty(*sizes, dtype=dtype, device=device)
    declare_zero(state)
    with plain_calls():
        state.untyped_storage().resize_(0)
    return state


@neutral
def _zeroed(state: Tensor) -> None:
    provide(state)
    alias(state).zero_()


def make_zero(tensor: Tensor, known_zero: bool = False) -> None:
    """Someone looks at fresh states in this memory, or changes them. known_zero: by making this one zero."""
    fresh = _fresh.get(storage_of(tensor)) if _fresh else None
    for key, found in list(fresh.items()) if fresh else ():
        state = found()
        if state is not None and (key, None) not in LEDGER.accounts:  # else its account knows
            if known_zero and state is tensor:
                provide(state)
                continue
            _zeroed(state)
        forget_fresh(storage_of(tensor), key)
