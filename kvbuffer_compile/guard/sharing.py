"""Who else can reach the memory of a state: such memory must hold the truth after every step."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


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
    """Who holds several storages, to be compared at every step: quicker than asking each."""

    __slots__ = ("_handles", "_seen", "_storages")

    def __init__(self, storages: Sequence[Storage]) -> None:
        self._handles = [s.handle for s in storages]
        self._storages = storages  # not the objects, whose holders are counted
        self._seen = self._now()

    def unchanged(self) -> bool:
        """Whether each is held as often as it was: nobody has come by one, or let it go."""
        return self._seen == self._now()

    def _now(self) -> list[int]:
        count = sys.getrefcount
        return [*map(torch._C._storage_Use_Count, self._handles), *[count(s.object) for s in self._storages]]


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


def shared_with(owner: Tensor) -> str | None:
    """Who, besides the tensors that torch counts, can reach the memory of a state that is met for the first time.

    To be asked with plain calls, and before anything of ours holds the tensor. A pointer taken earlier leaves no trace.
    """
    storage = Storage(owner)
    if owner.device.type == "cpu" and storage.object.is_shared():
        return "other processes (shared memory)"
    if not storage.object.resizable():
        return "whoever made it: NumPy, DLPack, a file, torch.load (clone() the state once to have it buffered)"
    # a view of it would hold the tensor and its storage; a view itself is held by no other view
    views = 0 if owner._is_view() else storage.users - 1
    if owner._use_count() > 1 + views:  # type: ignore[attr-defined]
        return "a DLPack capsule, or C++ code that holds the tensor"
    return None
