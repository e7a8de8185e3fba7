"""The library itself: all C++ texts of this folder in one, so that torch's headers are read once."""

from __future__ import annotations

import ctypes
import functools
import sysconfig
from pathlib import Path

import torch

from kvbuffer_compile.codegen import build
from kvbuffer_compile.errors import EmitError

_INCLUDE = f"-I{Path(torch.__file__).parent / 'include'}"
_PYTHON = f"-I{sysconfig.get_path('include')}"
_OPTIONS = (_INCLUDE, _PYTHON, "-std=c++20", "-O1", f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}")


def library() -> ctypes.PyDLL:
    """Built at the first call. EmitError or OSError, at every call, when that could not be done: it is tried once, as
    several ask for it and a compiler may take its time to fail."""
    found = built_once()
    if isinstance(found, Exception):
        raise found
    return found


@functools.cache
def built_once() -> ctypes.PyDLL | EmitError | OSError:
    """The library, or why there is none."""
    texts = [path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parent.glob("*.cpp"))]
    try:
        return build.loaded(build.library("\n".join(texts), _OPTIONS), ctypes.PyDLL)
    except (EmitError, OSError) as error:
        return error
