"""Ops of generated C++ kernels called without torch's dispatcher, where it would have nothing to do (direct.cpp)."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch

from kvbuffer_compile.errors import EmitError
from kvbuffer_compile.native.library import library

_WRAP = "_Z16THPVariable_WrapRKN2at10TensorBaseE"  # THPVariable_Wrap(const at::TensorBase&): a tensor for Python


def call_directly(op: torch._ops.OpOverload, kernel: int) -> None:
    """Let calls from Python of an op go straight to its kernel on CPUs. All else sees the same op as before.

    kernel: address of the boxed function, as torch's stable C ABI has it. Arguments and results of the op must be
    tensors. Nothing changes where the library cannot be built, or where torch's tensors look different inside.
    """
    functions = _functions()
    if functions is not None:
        schema = op._schema
        op._op = functions.kvbuffer_direct_call(op._op, kernel, len(schema.arguments), len(schema.returns))


@functools.cache
def _functions() -> Any:
    """The library, if it can be used for this."""
    try:
        found = library()
        torchs = ctypes.PyDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_python.so"))
        wrap = ctypes.cast(getattr(torchs, _WRAP), ctypes.c_void_p)
        found.kvbuffer_direct_start.argtypes = (ctypes.c_void_p, ctypes.py_object, ctypes.py_object)
        found.kvbuffer_direct_start.restype = None
        counts = (ctypes.c_ssize_t, ctypes.c_ssize_t)
        found.kvbuffer_direct_call.argtypes = (ctypes.py_object, ctypes.c_void_p, *counts)
        found.kvbuffer_direct_call.restype = ctypes.py_object
    except (EmitError, OSError, AttributeError):
        return None
    probe = torch.empty(1)
    inside = ctypes.c_void_p.from_address(id(probe) + object.__basicsize__).value
    if inside != probe._cdata:
        return None
    found.kvbuffer_direct_start(wrap, torch.Tensor, torch.nn.Parameter)
    return found
