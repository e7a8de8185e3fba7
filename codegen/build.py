"""From source text to a loaded op: compile once with g++, keep by content, register with PyTorch.

Flags. -O2 with the vectoriser's own cost model makes kernels that are as fast as with -O3 (equal within noise) in half
the compile time, 1.0 s against 2.1 s for a verify step; the hot loops are unrolled by hand. -fno-math-errno and
-fno-trapping-math allow vectors of sqrt, rint and conversions, and change no value. Nothing else of -ffast-math is
used: -ffinite-math-only would drop the NaN and inf that models rely on, -fassociative-math could turn products of
gates into other underflows (kernels say themselves which sums may be reordered), and linking with -ffast-math makes
g++ switch subnormals off for the whole process.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import torch

from kvbuffer_compile.codegen.cpp import compiler as cxx
from kvbuffer_compile.codegen.cpp import cpp
from kvbuffer_compile.errors import EmitError
from kvbuffer_compile.ir.plan import Plan
from kvbuffer_compile.process import disk

FLAGS = (
    "-std=c++17", "-O2", "-ftree-vectorize", "-fvect-cost-model=dynamic", "-march=native", "-fopenmp",
    "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared", "-w", "-Wno-psabi",
)  # fmt: skip
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g", "-O1")
INSTALL = cxx.INSTALL
SEAL = 32  # bytes of the SHA-256 of name and contents at a library's end: loaders ignore it, a torn file is noticed
MOST = 1 << 28  # bytes of a library

_loaded: dict[str, ctypes.CDLL] = {}
L = TypeVar("L")


def load(plan: Plan) -> ctypes.CDLL:
    """Build the plan's kernel, or take it from the cache, and register it as the op's implementation on CPUs.

    The library exports the step under a name of its own (`cpp.entry.exported`).

    The op must be defined (plan.schema). Calling again does nothing. EmitError with the compiler's message, or with
    what to install, when that cannot be done.
    """
    if plan.key in _loaded:
        return _loaded[plan.key]
    source = cpp.emit(plan)
    try:
        found = loaded(library(source), ctypes.CDLL)
    except OSError:  # whole, and still not loadable: built for another machine or PyTorch, or by a broken compiler
        try:
            found = loaded(library(source, afresh=True), ctypes.CDLL)
        except OSError as error:
            name = shlex.join(cxx.command())
            raise EmitError(f"what the C++ compiler {name!r} makes cannot be loaded: {INSTALL}\n{error}") from error
    _loaded[plan.key] = found
    return found


def loaded(path: Path, loader: Callable[[str], L]) -> L:
    """A library whose bytes have just been checked, of a folder where nobody else can change them. OSError."""
    with disk.opened(path.parent) as place:
        data = disk.read_in(place, path.name, MOST)
        if data is None or not _sealed(path.name, data):
            raise OSError(f"{path} was changed after it was built")
        within = f"/proc/self/fd/{place}"  # the folder that was checked, whatever stands at its path by now
        return loader(f"{within}/{path.name}" if os.path.isdir(within) else str(path))


def library(source: str, options: Sequence[str] = (), afresh: bool = False) -> Path:
    """The shared library of a source text, compiled unless a whole one is in the cache; afresh: even then. options: for
    the compiler, behind FLAGS.

    Of processes that want the same one at once, one compiles and the others wait for it.
    """
    key = hashlib.sha256("\0".join([source, fingerprint(options)]).encode()).hexdigest()[:32]
    name = f"{key}.so"
    try:
        found = None if afresh else _kept(name)
        if found is None:
            with disk.alone(name, cxx.limit()):
                found = None if afresh else _kept(name)
                found = found or _built(name, source, options)
    except OSError as error:
        raise EmitError(
            f"no room for built kernels ({error.strerror or error}); {disk.ADVICE}, and TMPDIR as well"
        ) from error
    return found


def _kept(name: str) -> Path | None:
    return next((place / name for place in disk.places() if is_whole(place / name)), None)


def _built(name: str, source: str, options: Sequence[str]) -> Path:
    path = disk.keep(name, _seal(name, _compile(source, options)))
    with suppress(OSError):  # for people
        disk.write(path.with_suffix(".cpp"), source.encode())
    return path


def is_whole(path: Path) -> bool:
    """Whether a library is ours, complete, and that of its name."""
    data = disk.read(path, MOST)
    return data is not None and _sealed(path.name, data)


def _seal(name: str, data: bytes) -> bytes:
    return data + hashlib.sha256(name.encode() + data).digest()


def _sealed(name: str, data: bytes) -> bool:
    return len(data) > SEAL and _seal(name, data[:-SEAL]) == data


def compiler() -> str | None:
    """Path and version of the compiler that kernels are built with; None when there is none."""
    return None if no_compiler() else _version(cxx.command(), os.environ.get("PATH"))


def no_compiler() -> str:
    """Why there is none, and what to do; "" when there is one."""
    try:
        _version(cxx.command(), os.environ.get("PATH"))
    except EmitError as error:
        return str(error)
    return ""


@functools.cache
def _version(command: tuple[str, ...], path: str | None) -> str:
    """Path and version of the compiler, asked once. path: where it is looked for."""
    return cxx.find(command)


def _flags() -> list[str]:
    sanitize = SANITIZE if os.environ.get("KVBUFFER_SANITIZE") == "1" else ()
    return [*FLAGS, *sanitize]


def fingerprint(options: Sequence[str] = ()) -> str:
    """All besides the source that decides what a library holds and whether it runs here. EmitError without compiler."""
    command = cxx.command()
    version = _version(command, os.environ.get("PATH"))
    return "\n".join([*command, *_flags(), *options, version, torch.__version__, _cpu()])


@functools.cache
def _cpu() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.machine() + platform.processor()
    return "\n".join(sorted({x for x in lines if x.startswith(("flags", "model name", "Features", "CPU part"))}))


def _compile(source: str, options: Sequence[str]) -> bytes:
    """The library of a source text. Compilers keep their own files in the temporary folder too."""
    with tempfile.TemporaryDirectory(prefix="kvbuffer_") as folder:
        text, built = Path(folder, "step.cpp"), Path(folder, "step.so")
        text.write_text(source, encoding="utf-8")
        libraries = [f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu"]
        command = cxx.command()
        try:
            cxx.run(command, [*_flags(), *options, str(text), "-o", str(built), *libraries])
        except EmitError as error:
            raise EmitError(f"{error}\n{source.split('#include', 1)[0]}") from error
        if not built.is_file():
            raise EmitError(f"the C++ compiler {shlex.join(command)!r} ended well and wrote no library: {INSTALL}")
        return built.read_bytes()
