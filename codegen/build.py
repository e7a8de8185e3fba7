"""From source text to a loaded op: compile once with g++, keep by content, register with PyTorch.

Flags. -O2 with the vectoriser's own cost model makes kernels that are as fast as with -O3 (equal within noise) in half
the compile time, 1.0 s against 2.1 s for a verify step; the hot loops are unrolled by hand. -fno-math-errno and
-fno-trapping-math allow vectors of sqrt, rint and conversions, and change no value. Nothing else of -ffast-math is
used: -ffinite-math-only would drop the NaN and inf that models rely on, -fassociative-math could turn products of
gates into other underflows (kernels say themselves which sums may be reordered), and linking with -ffast-math makes
g++ switch subnormals off for the whole process.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from kvbuffer_compile.codegen import cpp
from kvbuffer_compile.errors import EmitError
from kvbuffer_compile.plan import Plan

FLAGS = (
    "-std=c++17", "-O2", "-ftree-vectorize", "-fvect-cost-model=dynamic", "-march=native", "-fopenmp",
    "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared", "-w",
)  # fmt: skip
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g", "-O1")
INSTALL = "install a C++ compiler (Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++) or name one in CXX"
SEAL = 32  # a library ends with the SHA-256 of what is before it: loaders ignore it, and a torn file is noticed

_loaded: set[str] = set()


def load(plan: Plan) -> None:
    """Build the plan's kernel, or take it from the cache, and register it as the op's implementation on CPUs.

    The op must be defined (plan.schema). Calling again does nothing. EmitError with the compiler's message, or with
    what to install, when that cannot be done.
    """
    if plan.key in _loaded:
        return
    path = library(cpp.emit(plan))
    try:
        torch.ops.load_library(str(path))
    except OSError:  # sealed, and still not loadable: built for another machine or PyTorch
        path.unlink(missing_ok=True)
        _open(library(cpp.emit(plan)))
    _loaded.add(plan.key)


def _open(path: Path) -> None:
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise EmitError(f"the kernel was built but cannot be loaded: {error}") from error


def library(source: str, options: Sequence[str] = ()) -> Path:
    """The shared library of a source text, compiled unless a whole one is in the cache. options: go after FLAGS."""
    command = [*_command(), *options]
    key = hashlib.sha256("\0".join([source, _fingerprint(command)]).encode()).hexdigest()[:32]
    try:
        path = cache_folder() / f"{key}.so"
        if not is_whole(path):
            _compile(command, source, path)
    except OSError as error:
        raise EmitError(f"no folder for built kernels, set TORCHINDUCTOR_CACHE_DIR to one: {error}") from error
    return path


def cache_folder() -> Path:
    """Where libraries are kept: under Inductor's cache, so TORCHINDUCTOR_CACHE_DIR moves it."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir()) / "kvbuffer"


def is_whole(path: Path) -> bool:
    """Whether a library is complete and unchanged since it was written."""
    try:
        data = path.read_bytes()
    except OSError:
        return False
    return len(data) > SEAL and hashlib.sha256(data[:-SEAL]).digest() == data[-SEAL:]


def compiler() -> str | None:
    """Path and version of the compiler that kernels are built with; None when there is none."""
    command = _compiler_command()
    path = shutil.which(command[0]) if command else None
    if path is None:
        return None
    try:
        version = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{path}: {version.splitlines()[0] if version else 'unknown version'}"


def _compiler_command() -> list[str]:
    """CXX, which may carry arguments, or g++."""
    return shlex.split(os.environ.get("CXX", "")) or ["g++"]


def _command() -> list[str]:
    sanitize = SANITIZE if os.environ.get("KVBUFFER_SANITIZE") == "1" else ()
    return [*_compiler_command(), *FLAGS, *sanitize]


def _fingerprint(command: list[str]) -> str:
    """All besides the source that decides what a library holds and whether it runs here."""
    return "\n".join([*command, _version(tuple(_compiler_command())), torch.__version__, _cpu()])


@functools.cache
def _version(command: tuple[str, ...]) -> str:
    found = compiler()
    if found is None:
        raise EmitError(f"there is no C++ compiler {shlex.join(command)!r}: {INSTALL}")
    return found


@functools.cache
def _cpu() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine() + platform.processor()
    return "\n".join(sorted({x for x in lines if x.startswith(("flags", "model name", "Features", "CPU part"))}))


def _compile(command: list[str], source: str, path: Path) -> None:
    """Compile beside `path` and move the result there in one step: readers see a whole file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        text, built = Path(folder, "step.cpp"), Path(folder, "step.so")
        text.write_text(source, encoding="utf-8")
        libraries = [f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu"]
        _run([*command, str(text), "-o", str(built), *libraries], source)
        data = built.read_bytes()
        built.write_bytes(data + hashlib.sha256(data).digest())
        os.replace(built, path)
        os.replace(text, path.with_suffix(".cpp"))


def _run(command: list[str], source: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise EmitError(f"cannot run {command[0]!r} ({error}): {INSTALL}") from error
    if done.returncode:
        head = source.split("#include", 1)[0]
        raise EmitError(f"{shlex.join(command)} failed; {INSTALL}\n{done.stderr[-4000:]}\n{head}")
