"""The ordinary tensor behind each guarded state: what compiled code gets in its place, and how it is told from others.

An alias has the memory, shape and strides of its owner, the user's tensor. It does not keep the owner alive.
"""

from __future__ import annotations

import ctypes
import functools
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kvbuffer_compile.errors import EmitError
from kvbuffer_compile.guard import dispatch_watch
from kvbuffer_compile.guard.guarded import GuardedState, plain_calls
from kvbuffer_compile.guard.overlap import has_memory
from kvbuffer_compile.native.library import library

Place = tuple[tuple[int, int], ...]  # a slice of a tensor: a dim and the position in it, once for each index

_aliases: dict[int, Tensor] = {}  # by the id of the owner
_owners: dict[int, weakref.ref[Tensor]] = {}  # by the id of the alias
_registering = threading.RLock()


def plain(x: Tensor) -> Tensor:
    """The alias of a guarded state; any other tensor itself. Guards of compiled graphs look at states through this, so
    that the class of a state makes no other graph."""
    if type(x) is not GuardedState:
        return x
    found = _aliases.get(id(x))
    return _registered(x) if found is None else found


@functools.cache
def quickly() -> tuple[Callable[[Any], Any], Callable[..., list[Any]]]:
    """`plain`, and plain_all(*arguments) -> list: for every call of a graph, so in C++ where the library can be had."""
    try:
        make = library().kvbuffer_aliases
    except (EmitError, OSError, AttributeError):
        return plain, lambda *arguments: [plain(x) for x in arguments]
    make.argtypes, make.restype = (ctypes.py_object,) * 3, ctypes.py_object
    return make(GuardedState, _aliases, _registered)  # type: ignore[no-any-return]


def owner_of(x: Tensor) -> Tensor:
    """The user's tensor behind an alias; any other tensor itself."""
    found = _owners.get(id(x))
    owner = found() if found is not None else None
    return x if owner is None else owner


def is_alias(x: object) -> bool:
    """Whether a tensor stands for one of the user's."""
    return id(x) in _owners


def known_alias(owner: Tensor) -> Tensor | None:
    """The alias of a tensor, if it has one."""
    return _aliases.get(id(owner))


def forget(key: int, owner: object = None) -> None:
    """Forget the alias of the tensor with this id: it died, or its shape or memory changed."""
    found = _aliases.get(key)
    if found is not None:
        _owners.pop(id(found), None)
        _aliases.pop(key, None)


def _registered(owner: Tensor) -> Tensor:
    key = id(owner)
    with _registering:
        if key not in _aliases:
            made = alias(owner)
            _owners[id(made)] = weakref.ref(owner, functools.partial(forget, key))
            _aliases[key] = made
        return _aliases[key]


def _unmarked(view: Tensor) -> Tensor:
    dispatch_watch.unmark(view)
    return view


def alias(owner: Tensor, place: Place | None = None) -> Tensor:
    """An ordinary tensor on the memory of a tensor or of a slice of it.

    Not a view, which would keep its base, the owner, alive; except of an owner that is a view itself: compiled graphs
    with several views of one base ask them for it.
    """
    with torch.inference_mode(False), torch.no_grad(), plain_calls(), dispatch_watch.unwatched():
        if place is None and owner._is_view():
            return _unmarked(Tensor.as_subclass(owner, Tensor))
        if not has_memory(owner):
            return _unmarked(owner.data)  # set_ would provide memory
        offset, sizes, strides = owner.storage_offset(), list(owner.shape), list(owner.stride())
        for dim, at in place or ():
            offset += at * strides.pop(dim)
            del sizes[dim]
        made = torch.empty(0, dtype=owner.dtype, device=owner.device)
        made.set_(owner.untyped_storage(), offset, sizes, strides)
        return made.requires_grad_(owner.requires_grad) if owner.is_leaf else made
