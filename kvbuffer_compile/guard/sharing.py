"""Who else can reach the memory of a state: such memory must hold the truth after every step."""

from __future__ import annotations

import ctypes
import functools
import sys
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kvbuffer_compile.errors import EmitError
from kvbuffer_compile.native.library import library


class Storage:
    """The storage of a state: torch has one Python object for each, and so do we."""

    __slots__ = ("handle", "object")

    def __init__(self, t: Tensor) -> None:
        self.object: Any = t.untyped_storage()
        self.handle = int(self.object._cdata)

    @property
    def users(self) -> int:
        """How many tensors, arrays and views hold it."""
        return int(torch._C._storage_Use_Count(self.handle)) - _OWN_USES

    @property
    def held(self) -> bool:
        """Whether somebody else keeps its Python object."""
        return sys.getrefcount(self.object) > _OWN_REFERENCES


class Watch:
    """Who holds several storages, to be compared at every step: quicker than asking each.

    unchanged: whether each is held as often as it was, so that nobody has come by one, or let it go.
    """

    __slots__ = ("_storages", "unchanged")

    def __init__(self, storages: Sequence[Storage]) -> None:
        self._storages = storages  # for as long as they are watched
        self.unchanged = _comparison()(storages)


@functools.cache
def _comparison() -> Callable[[Sequence[Storage]], Callable[[], bool]]:
    """What makes `unchanged`: in C++ where the library can be had. It does not hold the storages, which would count."""
    try:
        make = library().kvbuffer_holders
    except (EmitError, OSError, AttributeError):
        return _compared_here
    make.argtypes, make.restype = (ctypes.py_object,) * 2, ctypes.py_object
    return lambda storages: make([s.handle for s in storages], [s.object for s in storages])


def _compared_here(storages: Sequence[Storage]) -> Callable[[], bool]:
    def held() -> list[int]:
        uses, references = torch._C._storage_Use_Count, sys.getrefcount
        return [n for s in storages for n in (uses(s.handle), references(s.object))]

    seen = held()
    return lambda: seen == held()


_OWN_USES = _OWN_REFERENCES = 0
_seen = Storage(_one := torch.empty(1))  # one user, and nobody keeps the object: how torch counts differs by version
_OWN_USES, _OWN_REFERENCES = _seen.users - 1, sys.getrefcount(_seen.object)
del _seen, _one


# Why memory can be reached by others, by the storage's handle: for as long as there is the storage.
_handed_out: dict[int, str] = {}


def hand_out(owner: Tensor, why: str) -> None:
    """Remember that others can reach the memory of a state from now on, whatever becomes of its account."""
    storage = Storage(owner)
    if storage.handle not in _handed_out:
        weakref.finalize(storage.object, _handed_out.pop, storage.handle, None).atexit = False
    _handed_out[storage.handle] = why


def handed_out(owner: Tensor) -> str | None:
    """Who is known to reach the memory of a state."""
    return _handed_out.get(Storage(owner).handle) if _handed_out else None


MOMENTS = (0.0, 1e-4, 1e-3, 1e-2)  # seconds: a call of another thread holds the tensor too, but not for long


def shared_with(owner: Tensor) -> str | None:
    """Who, besides the tensors that torch counts, can reach the memory of a state that is met for the first time.

    To be asked with plain calls, and before anything of ours holds the tensor. A pointer taken earlier leaves no trace.
    """
    storage = Storage(owner)
    if owner.device.type == "cpu" and storage.object.is_shared():
        return "other processes (shared memory)"
    if not storage.object.resizable():
        return "whoever made it: NumPy, DLPack, a file, torch.load (clone() the state once to have it buffered)"
    for pause in MOMENTS:
        if pause:
            time.sleep(pause)
        if not _is_held_below_python(owner, storage):
            return None
    return "a DLPack capsule, or C++ code that holds the tensor"


def _is_held_below_python(owner: Tensor, storage: Storage) -> bool:
    # a view of it would hold the tensor and its storage; a view itself is held by no other view
    views = 0 if owner._is_view() else storage.users - 1
    return bool(owner._use_count() > 1 + views)  # type: ignore[attr-defined]
