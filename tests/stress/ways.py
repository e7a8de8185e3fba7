"""Ways to read a state, to write it, to hold on to its memory, and what is going on around somebody who reads."""

from __future__ import annotations

import copy
import ctypes
import io
import pickle
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.stress.graphs import whole


def _saved(s: Tensor) -> Any:
    buffer = io.BytesIO()
    torch.save([s], buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def _out(s: Tensor) -> Tensor:
    return torch.add(s, 1, out=torch.empty(s.shape))


def _copied(s: Tensor) -> Tensor:
    return torch.empty(s.shape).copy_(s)


READS: dict[str, Callable[[Tensor], Any]] = {
    "add": lambda s: s + 1,
    "reversed sub": lambda s: 1 - s,
    "clone": torch.clone,
    "sum by keyword": lambda s: torch.sum(input=s, dim=-1),
    "max": lambda s: s.max(),
    "sort": lambda s: s.sort(-1),
    "stack": lambda s: torch.stack([s, s]),
    "einsum": lambda s: torch.einsum("...ij,...ij->...", [s, torch.ones_like(s)]),
    "where": lambda s: torch.where(torch.tensor(True), input=s, other=torch.zeros(())),
    "foreach": lambda s: torch._foreach_add([s, s], 1),
    "out=": _out,
    "copy_": _copied,
    "slice": lambda s: s[0] + 0,
    "list": lambda s: [x + 0 for x in s],
    "unbind": lambda s: torch.stack(s.unbind(1)),
    "gather": lambda s: s[torch.tensor([1, 0])],
    "index_select": lambda s: s.index_select(0, torch.tensor([1, 0])),
    "to": lambda s: s.to(torch.float64),
    "numpy": lambda s: s.numpy().copy(),
    "asarray": lambda s: np.asarray(s).copy(),
    "dlpack": lambda s: torch.from_dlpack(s).clone(),
    "tolist": Tensor.tolist,
    "item": lambda s: s.flatten()[3].item(),
    "repr": repr,
    "format": lambda s: f"{s.flatten()[5]:.1f} {s}",
    "pickle": lambda s: pickle.loads(pickle.dumps({"s": s})),
    "save": _saved,
    "deepcopy": lambda s: copy.deepcopy([s, s]),
    "detach": lambda s: s.detach() * 1,
    "data": lambda s: s.data * 1,
    "aten": lambda s: torch.ops.aten.neg.default(s),
}

EXPORTS = ("numpy", "asarray", "dlpack", "save", "pickle", "deepcopy", "data", "detach")

# Each is given a generator, of which it takes what it writes.
WRITES: dict[str, Callable[[Tensor, torch.Generator], Any]] = {
    "zero_": lambda s, g: s.zero_(),
    "fill_": lambda s, g: s.fill_(3),
    "fill_ with zero": lambda s, g: s.fill_(0),
    "copy_": lambda s, g: s.copy_(whole(-99, 99, tuple(s.shape), g)),
    "copy_ of itself": lambda s, g: s.copy_(s.flip(0)),
    "neg_": lambda s, g: s.neg_(),
    "add_": lambda s, g: s.add_(7),
    "clamp_": lambda s, g: s.clamp_(-900, 900),
    "one sequence": lambda s, g: s[1].zero_(),
    "setitem": lambda s, g: s.__setitem__((slice(None), 0), 11),
    "index_copy_": lambda s, g: s.index_copy_(0, torch.tensor([1]), whole(-9, 9, (1, *s.shape[1:]), g)),
    "index_put_": lambda s, g: s.index_put_((torch.tensor([0, 1]),), whole(-9, 9, (2, *s.shape[1:]), g)),
    "masked_fill_": lambda s, g: s.masked_fill_(s > 100, 1),
    "out=": lambda s, g: torch.neg(s, out=s),
    "foreach": lambda s, g: torch._foreach_neg_([s]),
    "numpy": lambda s, g: s.numpy().__setitem__(0, 4),
    "data": lambda s, g: s.data.add_(1),
    "through a view": lambda s, g: s.transpose(0, 1)[1:].add_(2),
    "through two": lambda s, g: torch._foreach_add_(list(s.unbind(1)), 3),
    "random order": lambda s, g: s.copy_(s[torch.randperm(len(s), generator=g)]),
}


def _pointer(s: Tensor) -> Any:
    if not s.is_contiguous():
        return s.numpy()
    return np.ctypeslib.as_array((ctypes.c_float * s.numel()).from_address(s.data_ptr()))


def _on_storage(s: Tensor) -> Tensor:
    return torch.empty(0).set_(s.untyped_storage(), s.storage_offset(), s.shape, s.stride())


# What lies in a state's memory and can be read and written later.
HOLDS: dict[str, Callable[[Tensor], Any]] = {
    "slice": lambda s: s[0],
    "view": lambda s: s.transpose(1, 2),
    "unbound": lambda s: s.unbind(0)[1],
    "detached": Tensor.detach,
    "data": lambda s: s.data,
    "copy.copy": copy.copy,
    "array": Tensor.numpy,
    "asarray": np.asarray,
    "import": torch.from_dlpack,
    "tensor on its storage": _on_storage,
    "memory at its address": _pointer,
    "iterated": lambda s: next(iter(s)),
    "parameter": lambda s: torch.nn.Parameter(s, requires_grad=False),
}

AROUND: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "nothing": nullcontext,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference mode": torch.inference_mode,
    "grad": torch.enable_grad,
    "default dtype": lambda: _Default(torch.float64),
    "another device": lambda: torch.device("meta"),
    "nothing again": nullcontext,
}
# Of these, what an ambient setting does not change.
STEADY = ("add", "clone", "stack", "foreach", "slice", "numpy", "to", "sort")


class _Default:
    """Another default dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __enter__(self) -> None:
        self.before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)

    def __exit__(self, *error: object) -> None:
        torch.set_default_dtype(self.before)
