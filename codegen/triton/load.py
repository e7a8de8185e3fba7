"""From generated Triton text to a Python module. The text is kept on disk for people; what runs is the text itself."""

from __future__ import annotations

import functools
import hashlib
import linecache
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from kvbuffer_compile.process import disk


def load(source: str, interpret: bool = False) -> ModuleType:
    """The module of a source text; the same text gives the same module.

    interpret: `launch` runs the kernel in Triton's interpreter, on CPU tensors, whatever the environment says, at
    about 10 ms a program: for tests and dry runs.
    """
    name = f"kvbuffer_triton_{hashlib.sha256(source.encode()).hexdigest()[:16]}{'_interpreted' if interpret else ''}"
    if name not in sys.modules:
        module = _module(name, source, interpret)
        if interpret:
            vars(module)["launch"] = _interpreted(vars(module)["launch"])
        sys.modules[name] = module
    return sys.modules[name]


def _module(name: str, source: str, interpret: bool) -> ModuleType:
    path = _shown_at(name, source)
    # Triton and tracebacks ask for the lines of a file; with no time of its own an entry is never compared with one.
    linecache.cache[path] = (len(source), None, source.splitlines(keepends=True), path)
    module = ModuleType(name)
    module.__file__ = path
    with _interpret(interpret):
        exec(compile(source, path, "exec"), vars(module))
    return module


def _shown_at(name: str, source: str) -> str:
    """Where people find a text: a file, unless none can be kept."""
    try:
        path = disk.folder() / f"{name}.py"
        if disk.read(path, len(source) * 4) != source.encode():
            disk.write(path, source.encode())
        return str(path)
    except OSError:
        return f"<{name}>"


@contextmanager
def _interpret(wanted: bool) -> Iterator[None]:
    """What triton.jit decorates inside is interpreted."""
    import triton

    before = triton.knobs.runtime.interpret
    triton.knobs.runtime.interpret = wanted or before
    try:
        yield
    finally:
        triton.knobs.runtime.interpret = before


def _interpreted(launch: object) -> object:
    """`launch` in a process that was not started for the interpreter."""
    assert callable(launch)

    @functools.wraps(launch)
    def run(*args: object, **kwargs: object) -> object:
        with _interpret(True), _interpreted_language():
            return launch(*args, **kwargs)

    return run


@contextmanager
def _interpreted_language() -> Iterator[None]:
    """Triton's own functions (tl.sum, tl.cumprod, ...) were made for compilation when triton was imported."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder
    from triton.runtime.jit import JITFunction

    compiled = [(m, n, f) for m in (tl, tl.standard) for n, f in vars(m).items() if isinstance(f, JITFunction)]
    once = {id(f): InterpretedFunction(f.fn) for _, _, f in compiled}
    for module, name, function in compiled:
        setattr(module, name, once[id(function)])
    before, InterpreterBuilder.create_dot = InterpreterBuilder.create_dot, _dot
    try:
        yield
    finally:
        InterpreterBuilder.create_dot = before
        for module, name, function in compiled:
            setattr(module, name, function)


def _dot(_builder: object, a: Any, b: Any, total: Any, precision: object, _imprecise: object) -> Any:
    """A product of matrices as tensor cores take it.

    Triton's own multiplies the bits of bfloat16 numbers, as numpy has no such type, and knows nothing of tf32.
    """
    import numpy
    from triton.runtime.interpreter import TensorHandle

    left, right = (_taken(x, precision) for x in (a, b))
    return TensorHandle(numpy.matmul(left, right, dtype=total.data.dtype) + total.data, total.dtype.scalar)


def _taken(x: Any, precision: object) -> Any:
    """The numbers of an operand that a tensor core sees: of float32 in tf32 the upper 19 bits."""
    import numpy
    import triton.language as tl
    from triton._C.libtriton.ir import INPUT_PRECISION

    if x.dtype.scalar == tl.bfloat16:
        return (x.data.astype(numpy.uint32) << 16).view(numpy.float32)
    if x.dtype.scalar == tl.float32 and precision == INPUT_PRECISION.TF32:
        return (x.data.view(numpy.uint32) & numpy.uint32(0xFFFFE000)).view(numpy.float32)
    return x.data
