"""Who else can reach the memory of a state: such memory must hold the truth after every step."""

from __future__ import annotations

import sys
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


_OWN_USES = _OWN_REFERENCES = 0
_seen = Storage(_one := torch.empty(1))  # one user, and nobody keeps the object: how torch counts differs by version
_OWN_USES, _OWN_REFERENCES = _seen.users - 1, sys.getrefcount(_seen.object)
del _seen, _one


def shared_with(owner: Tensor) -> str | None:
    """Who, besides the tensors that torch counts, can reach the memory of a state that is met for the first time.

    To be asked with plain calls, and before anything of ours holds the tensor. A pointer taken earlier leaves no trace.
    """
    storage = Storage(owner)
    if owner.device.type == "cpu" and storage.object.is_shared():
        return "other processes (shared memory)"
    if not storage.object.resizable():
        return "whoever made it: NumPy, DLPack, a file, torch.load (clone() the state once to have it buffered)"
    if owner._use_count() > 1 and storage.users == 1:  # type: ignore[attr-defined]
        # not views of it: they would hold its storage as well
        return "a DLPack capsule, or C++ code that holds the tensor"
    return None
