"""Machines on disk: measured when first needed, kept, and measured again where what was kept cannot be true."""

from __future__ import annotations

import functools
import hashlib
import json
import platform
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from kvbuffer_compile.machine.measure import load_average, measure, probe
from kvbuffer_compile.machine.numbers import Kernels, Machine, Speed
from kvbuffer_compile.process import disk

FORMAT = 6  # raised when a number changes its meaning
MOST_BYTES = 1 << 16  # of a file
SMALLEST, LARGEST = 1e-12, 1e24  # of any number in it: no product or quotient of a few overflows
MAY_BE_ZERO = (
    "fork", "load", "spread", "kernel_read", "kernel_update", "kernel_twice", "kernel_rows", "bfloat16",
    "exposed",
)  # fmt: skip
MAY_BE_NEGATIVE = ("bfloat16",)
LOWEST = -1e-8  # seconds of an element
DISAGREES = 2.0  # times faster or slower than was measured


def machine_for(device: torch.device | str) -> Machine:
    """The numbers of a device: from memory, from disk, or measured now (and then kept)."""
    device = torch.device(device)
    key = device.type, _name(device)
    if key not in _machines:
        _machines[key] = _found(device, key[1])
    return _machines[key]


def identity(device: torch.device | str, measured: bool) -> str:
    """What tells this machine from others, for as long as nothing is measured again. measured: the numbers as well,
    but those of kernels, which are timed later and once for each measurement."""
    device = torch.device(device)
    name = _name(device)
    if not measured:
        return name
    known = _machines.get((device.type, name)) or load(machine_path(device, name)) or machine_for(device)
    speeds = [(s.bytes, s.read, s.copy, s.update) for s in known.speeds]
    return repr((name, known.threads, known.cache, known.last, known.launch, known.rate, speeds))


def measured_again(device: torch.device | str) -> Machine:
    """The numbers of a device as it is now, in place of those that were kept."""
    device = torch.device(device)
    found = measure(device, _name(device))
    keep(found)
    return found


def keep(machine: Machine) -> None:
    """Let these be the numbers of their device, from now on and in other processes."""
    with suppress(OSError):
        store(machine, machine_path(torch.device(machine.device), machine.name))
    _machines[machine.device, machine.name] = machine


_machines: dict[tuple[str, str], Machine] = {}  # that this process knows, by device type and name


def _found(device: torch.device, name: str) -> Machine:
    """From disk, or measured now."""
    try:
        path = machine_path(device, name)
    except OSError:  # no folder at all: a measurement costs a fraction of a second
        return measure(device, name)
    found = load(path)
    if found is None or (found.name, found.device) != (name, device.type) or _is_outdated(found):
        found = measure(device, name)
        store(found, path)
    return found


def _is_outdated(found: Machine) -> bool:
    """Whether it should be measured again: it was busy then and is much less so now, or a quick look disagrees. Where
    it was busy and still is, every look would disagree, and every process find something else."""
    if found.busy:
        return load_average() < found.load / 2
    return _disagrees(found)


def _disagrees(found: Machine) -> bool:
    """Whether a quick look tells something else: it was measured on a busy machine, or on another one. A look that is
    slower is taken again, as a machine that is busy now is no reason."""
    seen = probe(found)
    if seen < 1 / DISAGREES:
        seen = max(probe(found) for _ in range(3))
    return not 1 / DISAGREES <= seen <= DISAGREES


def _name(device: torch.device) -> str:
    if device.type == "cpu":
        return f"{_cpu_model()}, {torch.get_num_threads()} threads"
    module = getattr(torch, device.type, None)
    get_name = getattr(module, "get_device_name", None)
    return str(get_name(device)) if get_name is not None else device.type


@functools.cache
def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def machine_path(device: torch.device, name: str) -> Path:
    """The file of one device; another torch, thread count or format is another file."""
    key = "\n".join((str(FORMAT), device.type, name, torch.__version__))
    return disk.folder() / f"machine-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def load(path: Path) -> Machine | None:
    """A stored machine, or None when there is none or the file cannot be trusted."""
    try:
        stored = json.loads(disk.read(path, MOST_BYTES) or b"")
        given = {f.name: stored[f.name] for f in fields(Machine)}
        speeds = tuple(Speed(**{f.name: speed[f.name] for f in fields(Speed)}) for speed in given.pop("speeds"))
        timed = given.pop("kernels")
        kernels = None if timed is None else Kernels(**{f.name: timed[f.name] for f in fields(Kernels)})
        found = Machine(speeds=speeds, kernels=kernels, **given)
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    parts: list[Machine | Speed | Kernels] = [found, *speeds, *([] if kernels is None else [kernels])]
    return found if speeds and all(_is_sound(part) for part in parts) and _grows(speeds) else None


def _is_sound(found: Machine | Speed | Kernels) -> bool:
    """Whether each field is of its type, and each number one that a machine could have."""
    plain = [f for f in fields(found) if f.name not in ("speeds", "kernels")]
    return all(_makes_sense(f.name, str(f.type), getattr(found, f.name)) for f in plain)


def _makes_sense(name: str, kind: str, value: Any) -> bool:
    if kind == "str":
        return isinstance(value, str)
    number = isinstance(value, int if kind == "int" else int | float) and not isinstance(value, bool)
    if number and name in MAY_BE_NEGATIVE and LOWEST < value < 0:
        return True
    return number and ((name in MAY_BE_ZERO and value == 0) or SMALLEST < value < LARGEST)  # NaN is not


def _grows(speeds: tuple[Speed, ...]) -> bool:
    return all(a.bytes < b.bytes for a, b in zip(speeds, speeds[1:], strict=False))


def store(machine: Machine, path: Path) -> None:
    """Write atomically; a folder that cannot be written only costs a measurement in the next process."""
    with suppress(OSError):
        disk.write(path, json.dumps(asdict(machine), indent=1).encode())
