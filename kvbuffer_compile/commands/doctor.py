"""What this installation can do: versions, compiler, cache, machine, entry point."""

from __future__ import annotations

import platform
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import Literal

GROUP, NAME = "torch_dynamo_backends", "kvbuffer"
PYTHON = ((3, 11), (3, 13))  # the first and the last
TORCH, TRANSFORMERS = (2, 11), (5, 17)


@dataclass(frozen=True)
class Finding:
    """One line. level: "ok", "note" (something is slower or missing, decoding works), "bad" (it does not)."""

    level: Literal["ok", "note", "bad"]
    what: str
    found: str

    def __str__(self) -> str:
        return f"{self.level:<5} {self.what:<13} {self.found}"


def findings(remeasure: bool = False) -> Iterator[Finding]:
    """Everything that is looked at, in order. Nothing raises: what cannot be had is a finding. remeasure: what was kept
    of this machine is not believed, but measured again and kept."""
    yield _python()
    yield _version("torch", TORCH, needed=True)
    yield _version("transformers", TRANSFORMERS, needed=False)
    yield _version("triton", None, needed=False)
    yield _entry_point()
    try:
        import torch  # noqa: F401
    except Exception as error:
        yield Finding("bad", "import torch", f"{type(error).__name__}: {error}")
        return
    yield _compiler()
    yield _cache()
    yield from _machines(remeasure)


def _python() -> Finding:
    sound = PYTHON[0] <= sys.version_info[:2] <= PYTHON[1]
    first, last = (".".join(map(str, version)) for version in PYTHON)
    wanted = "" if sound else f": {first} to {last} are supported"
    return Finding("ok" if sound else "note", "python", platform.python_version() + wanted)


def _version(package: str, least: tuple[int, int] | None, needed: bool) -> Finding:
    try:
        found = metadata.version(package)
    except metadata.PackageNotFoundError:
        return Finding("bad" if needed else "note", package, "not installed")
    if least is None or _release(found) >= least:
        return Finding("ok", package, found)
    wanted = ".".join(map(str, least))
    return Finding("bad" if needed else "note", package, f"{found}: {wanted} or later is needed")


def _release(version: str) -> tuple[int, ...]:
    parts = version.split("+")[0].split(".")[:2]
    return tuple(int("".join(c for c in part if c.isdigit()) or 0) for part in parts)


def _compiler() -> Finding:
    from kvbuffer_compile.codegen import build

    found = build.compiler()
    if found is None:
        import torch

        lost = "steps on a CPU are slower, and Inductor itself, which compiles all the rest of a graph, fails on a CPU"
        level: Literal["note", "bad"] = "note" if torch.cuda.is_available() else "bad"
        return Finding(level, "C++ compiler", f"none: {lost}; {build.no_compiler()}")
    return Finding("ok", "C++ compiler", found)


def _cache() -> Finding:
    from kvbuffer_compile.process import disk

    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            found = str(disk.folder())
    except OSError as error:
        return Finding("note", "cache", f"none, kernels and measurements are not kept ({error}); {disk.ADVICE}")
    return Finding("note", "cache", f"{found}: {said[0].message}") if said else Finding("ok", "cache", found)


def _entry_point() -> Finding:
    registered = [e.value for e in metadata.entry_points(group=GROUP) if e.name == NAME]
    if registered:
        return Finding("ok", "entry point", f'backend="{NAME}" is {registered[0]}')
    return Finding("bad", "entry point", f'backend="{NAME}" is not registered; install the package: pip install -e .')


def _machines(remeasure: bool) -> Iterator[Finding]:
    import torch

    from kvbuffer_compile.machine import machine_for, measured_again
    from kvbuffer_compile.steps.timing import with_kernels

    devices = ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    for device in devices:
        try:
            if remeasure:
                measured_again(device)
            machine = with_kernels(machine_for(device))
            yield Finding("note" if machine.busy else "ok", device, str(machine))
        except RuntimeError as error:
            yield Finding("note", device, f"could not be measured: {error}")
