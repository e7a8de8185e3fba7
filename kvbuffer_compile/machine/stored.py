"""What the cost model knows about a device: measured once, kept on disk.

The numbers are rough on purpose. They rank a few candidates whose costs differ by tens of percent; the measurement
takes a fraction of a second, so that the first compilation does not wait for it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from kvbuffer_compile.process import disk
from kvbuffer_compile.process.surroundings import neutral

FORMAT = 2  # raised when a number changes its meaning
MOST_BYTES = 1 << 16  # of a file
SMALLEST, LARGEST = 1e-12, 1e24  # of any number in it: no product or quotient of a few overflows
LARGE = {"cpu": 32 << 20, "cuda": 512 << 20}  # bytes of a copy that no cache should hold; CPU: small enough to be quick


@dataclass(frozen=True)
class Machine:
    """One device as it was found, with the threads it was measured with.

    device: torch device type. bandwidth: bytes/s of a large copy, read and written bytes together. cache: bytes that
    stay close to the cores; cache_bandwidth: bytes/s of a copy that fits. launch: seconds to start a small op from
    Python. rate: float32 operations/s of a batched product of two vectors with cached matrices, as a read does it.
    update_bandwidth: as bandwidth, of a large array that is changed in place; 0 where it is that of a copy. A CPU need
    not fetch what it is about to overwrite then: it may be twice as fast.
    """

    name: str
    device: str
    bandwidth: float
    cache_bandwidth: float
    cache: int
    launch: float
    rate: float
    update_bandwidth: float = 0.0

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.bandwidth / 1e9:.3g} GB/s, {self.cache_bandwidth / 1e9:.3g} GB/s within "
            f"{self.cache / 2**20:.3g} MiB of cache, {self.launch * 1e6:.2g} us a launch, {self.rate / 1e9:.3g} GFLOP/s"
        )


def machine_for(device: torch.device | str) -> Machine:
    """The numbers of a device: from memory, from disk, or measured now (and then kept)."""
    device = torch.device(device)
    return _known(device, _name(device))


@functools.cache
def _known(device: torch.device, name: str) -> Machine:
    try:
        path = machine_path(device, name)
    except OSError:  # no folder at all: a measurement costs a fraction of a second
        return measure(device, name)
    found = load(path)
    if found is None or (found.name, found.device) != (name, device.type):
        found = measure(device, name)
        store(found, path)
    return found


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


# ------------------------------------------------------------------------------------------------ on disk


def machine_path(device: torch.device, name: str) -> Path:
    """The file of one device; another torch, thread count or format is another file."""
    key = "\n".join((str(FORMAT), device.type, name, torch.__version__))
    return disk.folder() / f"machine-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def load(path: Path) -> Machine | None:
    """A stored machine, or None when there is none or the file cannot be trusted."""
    try:
        stored = json.loads(disk.read(path, MOST_BYTES) or b"")
        found = Machine(**{f.name: stored[f.name] for f in fields(Machine)})
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return found if _is_sound(found) else None


def _is_sound(found: Machine) -> bool:
    """Whether each field is of its type, and each number one that a machine could have."""
    numbers = (found.bandwidth, found.cache_bandwidth, found.cache, found.launch, found.rate)
    return (
        isinstance(found.name, str)
        and isinstance(found.device, str)
        and isinstance(found.cache, int)
        and all(_is_number(x) and SMALLEST < x for x in numbers)
        and _is_number(found.update_bandwidth)
        and (found.update_bandwidth == 0 or SMALLEST < found.update_bandwidth)
    )


def _is_number(x: object) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and x < LARGEST  # NaN is not


def store(machine: Machine, path: Path) -> None:
    """Write atomically; a folder that cannot be written only costs a measurement in the next process."""
    with suppress(OSError):
        disk.write(path, json.dumps(asdict(machine), indent=1).encode())


# ---------------------------------------------------------------------------------------------- measuring


@neutral
def measure(device: torch.device, name: str) -> Machine:
    """Measure a device; takes 0.3 s on a CPU. Compilers call this with fake tensors in force.

    CPU numbers within the cache are those of one thread, times the threads: on two busy cores a barrier of two threads
    waits whole time slices, and the best of a hundred short calls was 300 times too slow.
    """
    cache = cache_bytes(device)
    together = _copy_speed(device, LARGE.get(device.type, LARGE["cuda"]))
    update = _update_speed(device, LARGE["cpu"]) if device.type == "cpu" else 0.0
    with _one_thread() as threads:
        cores = threads if device.type == "cpu" else 1
        small = min(cache // (4 * cores), 16 << 20)
        return Machine(
            name=name,
            device=device.type,
            bandwidth=max(together, _copy_speed(device, LARGE["cpu"])) if device.type == "cpu" else together,
            cache_bandwidth=_copy_speed(device, small) * cores,
            cache=cache,
            launch=_launch_seconds(device),
            rate=_operation_rate(device, small) * cores,
            update_bandwidth=update,
        )


@contextmanager
def _one_thread() -> Iterator[int]:
    """Run on one thread; gives the number there were before."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


def cache_bytes(device: torch.device) -> int:
    """The last cache that is not shared with strangers: L2 of all cores in use on a CPU, L2 of a GPU."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    try:
        text = Path("/sys/devices/system/cpu/cpu0/cache/index2/size").read_text(encoding="utf-8").strip()
        return int(text.removesuffix("K")) * 1024 * torch.get_num_threads()
    except (OSError, ValueError):
        return (1 << 20) * torch.get_num_threads()


def _copy_speed(device: torch.device, size: int) -> float:
    source = torch.ones(size // 4, dtype=torch.float32, device=device)
    target = torch.zeros_like(source)
    return 2 * size / _seconds(lambda: target.copy_(source), device)


def _update_speed(device: torch.device, size: int) -> float:
    target = torch.ones(size // 4, dtype=torch.float32, device=device)
    return 2 * size / _seconds(lambda: target.mul_(1.0), device)


def _launch_seconds(device: torch.device) -> float:
    x = torch.ones(8, 4, 4, dtype=torch.float32, device=device)
    return _seconds(lambda: torch.bmm(x, x), device, inner=50)


def _operation_rate(device: torch.device, size: int) -> float:
    matrices = torch.ones(max(size // (4 * 128 * 128), 1), 128, 128, dtype=torch.float32, device=device)
    vectors = torch.ones(matrices.shape[0], 2, 128, dtype=torch.float32, device=device)
    return 2 * 2 * matrices.numel() / _seconds(lambda: torch.bmm(vectors, matrices), device)


def _seconds(call: Callable[[], Tensor], device: torch.device, inner: int = 1, budget: float = 0.04) -> float:
    """The best time of one call within the budget (seconds), after a warm-up: other work only ever adds."""
    call()
    _wait(device)
    best, end = float("inf"), time.perf_counter() + budget
    while True:
        start = time.perf_counter()
        for _ in range(inner):
            call()
        _wait(device)
        now = time.perf_counter()
        best = min(best, (now - start) / inner)
        if now > end:
            return best


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
