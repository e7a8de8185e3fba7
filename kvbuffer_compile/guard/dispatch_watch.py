"""Calls below Python: a dispatch key on a tensor, and a callback before every ATen call that gets such a tensor.

The class of a tensor is asked by what goes through `__torch_function__`. `torch.tensor(state)`, the transforms of
`torch.func`, TorchScript and C++ extensions never ask it, but they all go through torch's dispatcher. `watch` builds a
small extension (native/dispatch_watch.cpp, compiled at the first use, kept in the cache of kernels) that listens there.

Seen: a marked tensor as an argument, in a list or keyword, from any thread, inside of another tensor (DTensor), and
views made of it: they are marked as well; copies are not. Not seen: what reads memory without calling an op
(`data_ptr()`, `untyped_storage()`, DLPack, pickling, a compiled kernel that was handed the pointer).
"""

from __future__ import annotations

import atexit
import ctypes
import threading
from collections.abc import Callable

import torch
import torch._ops
from torch import Tensor

from kvbuffer_compile.errors import EmitError
from kvbuffer_compile.native.library import library
from kvbuffer_compile.process import callers

Callback = Callable[[str, list[Tensor]], None]

KEY = torch._C._dispatch_key_parse("DeferredInit")
LOW = torch._C._dispatch_key_parse("CustomRNGKeyId")  # for calls that subclasses make in their __torch_dispatch__
_KEYS = torch._C.DispatchKeySet(KEY) | torch._C.DispatchKeySet(LOW)

_lock = threading.Lock()
_extension: ctypes.PyDLL | None = None
_failed = False
_callback: Callback | None = None
_OPS = torch.library.Library("kvbuffer_watch", "DEF")


def watch(callback: Callback) -> bool:
    """From now on `callback(op, tensors)` is called before each call that gets marked tensors. There is one callback.

    op: the name with its overload, `aten::sum.dim_IntList`. tensors: those marked, at most once for a call and all the
    calls it makes; with torch < 2.12 they may be other Python objects than the user's. An exception of the callback
    is raised in place of the call. Marked tensors that the callback itself works on are not reported.
    False, with one warning, where the extension cannot be built: then nothing can be marked.
    """
    global _callback, _extension, _failed
    _callback = callback
    with _lock:
        if _extension is None and not _failed:
            try:
                _extension = _load()
            except (EmitError, OSError) as error:
                _failed = True
                callers.warn(f"kvbuffer sees no reads of states below Python (README, Limits): {error}")
    return _extension is not None


def mark(tensor: Tensor) -> None:
    """Report calls with this tensor, and with views that are made of it from now on."""
    _set_key(tensor, True)


def unmark(tensor: Tensor) -> None:
    """Undo `mark`; views made before keep the mark."""
    _set_key(tensor, False)


def marked(tensor: Tensor) -> bool:
    """Whether calls with this tensor are reported."""
    return bool(torch._C._dispatch_keys(tensor).has(KEY))


def unwatched() -> torch._C._ExcludeDispatchKeyGuard:
    """A context in which this thread's calls with marked tensors are not reported."""
    return torch._C._ExcludeDispatchKeyGuard(_KEYS)


def again() -> None:
    """Report tensors that the calls this thread is in have reported before."""
    if _extension is not None:
        _extension.kvbuffer_watch_again()


def _set_key(tensor: Tensor, on: bool) -> None:
    if _extension is not None:
        with torch._C.DisableTorchFunction():
            _extension.kvbuffer_watch_mark(tensor._cdata, on)


def _load() -> ctypes.PyDLL:
    extension = library()
    extension.kvbuffer_watch_start.restype = ctypes.c_bool
    extension.kvbuffer_watch_mark.argtypes = (ctypes.c_void_p, ctypes.c_bool)
    extension.kvbuffer_watch_mark.restype = None
    extension.kvbuffer_watch_again.restype = None
    _OPS.define("touched(str op, Tensor[] tensors) -> ()")
    _OPS.impl("touched", _touched, "CompositeExplicitAutograd")
    if torch._C._dispatch_has_backend_fallback(KEY) or not extension.kvbuffer_watch_start():
        raise EmitError("another extension uses torch's dispatch key DeferredInit")
    atexit.register(extension.kvbuffer_watch_stop)  # nothing may call Python once it is going away
    _let_functions_through()
    return extension


def _touched(op: str, tensors: list[Tensor]) -> None:
    if _callback is not None:
        _callback(op, tensors)


def _let_functions_through() -> None:
    """Ops that take functions (`map`, `while_loop`, `cond`) choose by dispatch keys too, in Python, and refuse unknown
    ones. The calls that they make are seen."""
    torch._ops._HIGHER_ORDER_OP_DEFAULT_FALLTHROUGH_DISPATCH_KEYS.append(KEY)
    for op in torch._ops._higher_order_ops.values():
        op.fallthrough(KEY)
