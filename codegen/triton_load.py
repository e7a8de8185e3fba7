"""From generated Triton text to a Python module: the text is kept on disk by content, for inspection and tracebacks."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType


def load(source: str, interpret: bool = False) -> ModuleType:
    """The module of a source text; the same text gives the same module.

    interpret: `launch` runs the kernel in Triton's interpreter, on CPU tensors, whatever the environment says, at
    about 10 ms a program: for tests and dry runs.
    """
    name = f"kvbuffer_triton_{hashlib.sha256(source.encode()).hexdigest()[:16]}{'_interpreted' if interpret else ''}"
    if name not in sys.modules:
        module = _import(name, _kept(name, source), interpret)
        if interpret:
            vars(module)["launch"] = _interpreted(vars(module)["launch"])
        sys.modules[name] = module
    return sys.modules[name]


def _kept(name: str, source: str) -> Path:
    """The file of a text; it appears whole or not at all, whoever else writes it."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    path = Path(cache_dir()) / "kvbuffer" / f"{name}.py"
    if not path.exists() or path.read_text(encoding="utf-8") != source:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}")
        part.write_text(source, encoding="utf-8")
        os.replace(part, path)
    return path


def _import(name: str, path: Path, interpret: bool) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    with _interpret(interpret):
        spec.loader.exec_module(module)
    return module


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
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    compiled = [(m, n, f) for m in (tl, tl.standard) for n, f in vars(m).items() if isinstance(f, JITFunction)]
    once = {id(f): InterpretedFunction(f.fn) for _, _, f in compiled}
    for module, name, function in compiled:
        setattr(module, name, once[id(function)])
    try:
        yield
    finally:
        for module, name, function in compiled:
            setattr(module, name, function)
