"""Measuring a device: how fast it moves bytes at several sizes, and what starting an op costs. Under a second on a CPU.

Other work only ever adds to a time, so the best of several is taken; how far the median lies from it tells how busy the
machine was.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path

import torch
from torch import Tensor

from kvbuffer_compile.machine.numbers import Machine, Speed
from kvbuffer_compile.process import progress
from kvbuffer_compile.process.surroundings import neutral

TRIES = 3  # at most, of measuring everything on a busy machine
LARGE_GPU = 512 << 20  # bytes of the arrays that no cache should hold
LARGEST_CPU = 256 << 20  # at most: containers may have little memory, whatever the system says is free
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


@neutral
def measure(device: torch.device, name: str) -> Machine:
    """Measure a device; takes 0.5 s on a CPU, up to three times as long on a busy one. Compilers call this with fake
    tensors in force."""
    progress.stage("measuring this machine")
    found = [_measured(device, name)]
    while found[-1].busy and len(found) < TRIES:
        found.append(_measured(device, name))
    return min(found, key=lambda machine: (machine.busy, machine.spread))


@neutral
def probe(machine: Machine) -> float:
    """How fast copies within the last level of cache are now, as a multiple of what was measured; takes 10 ms."""
    device = torch.device(machine.device)
    size = machine.speeds[len(machine.speeds) // 2].bytes
    return _speed(_copy(size, device), size, device, budget=0.01)[0] / machine.speed("copy", size)


def _measured(device: torch.device, name: str) -> Machine:
    cache, last = cache_bytes(device), last_level_bytes(device)
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    load = load_average()
    speeds, spread = [], 0.0
    for size in sizes(device, cache, last):
        speed, spread = _at(device, size, within=size <= cache)
        speeds.append(speed)
    with one_thread():
        return Machine(
            name=name, device=device.type, threads=threads, speeds=tuple(speeds), cache=cache, last=last,
            launch=_launch_seconds(device), rate=_operation_rate(device, cache // threads) * threads,
            measured=date.today().isoformat(), load=load, spread=spread,
        )  # fmt: skip


def load_average() -> float:
    """Processes that want to run, for each core, over the last minute."""
    return os.getloadavg()[0] / (os.cpu_count() or 1)


def sizes(device: torch.device, cache: int, last: int) -> list[int]:
    """Bytes to measure at: within the caches of the cores, within the last level, beyond it."""
    if device.type != "cpu":
        return [cache // 4, LARGE_GPU]
    beyond = max(min(4 * last, LARGEST_CPU, _memory() // 8), 2 * cache)
    return sorted({cache // 2, *(s for s in (2 * cache, last // 2, last) if cache < s < beyond), beyond})


def _at(device: torch.device, size: int, within: bool) -> tuple[Speed, float]:
    """The speeds at a size, and the spread of the copies.

    What the caches of the cores hold is measured on one thread, times the threads: on two busy cores a barrier of two
    threads waits whole time slices, and the best of a hundred short calls was 300 times too slow.
    """
    if device.type == "cpu" and within:
        with one_thread() as threads:
            alone, spread = _at(device, max(size // threads, 1 << 14), within=False)
        return Speed(size, alone.read * threads, alone.copy * threads, alone.update * threads), spread
    copy, spread = _speed(_copy(size, device), size, device)
    x = torch.ones(size // 4, dtype=torch.float32, device=device)
    read, _ = _speed(lambda: x.sum(), size, device)
    update, _ = _speed(lambda: x.mul_(1.0), 2 * size, device)
    return Speed(size, read, copy, update), spread


def _copy(size: int, device: torch.device) -> Callable[[], Tensor]:
    """A copy that touches so many bytes in all."""
    source = torch.ones(size // 8, dtype=torch.float32, device=device)
    target = torch.zeros_like(source)
    return lambda: target.copy_(source)


def _speed(call: Callable[[], Tensor], moved: int, device: torch.device, budget: float = 0.03) -> tuple[float, float]:
    times = seconds(call, device, budget=budget)
    return moved / min(times), statistics.median(times) / min(times) - 1


def _launch_seconds(device: torch.device) -> float:
    x = torch.ones(8, 4, 4, dtype=torch.float32, device=device)
    return min(seconds(lambda: torch.bmm(x, x), device, inner=50))


def _operation_rate(device: torch.device, size: int) -> float:
    matrices = torch.ones(max(size // (4 * 4 * 128 * 128), 1), 128, 128, dtype=torch.float32, device=device)
    vectors = torch.ones(matrices.shape[0], 2, 128, dtype=torch.float32, device=device)
    return 2 * 2 * matrices.numel() / min(seconds(lambda: torch.bmm(vectors, matrices), device))


def seconds(call: Callable[[], object], device: torch.device, inner: int = 1, budget: float = 0.03) -> list[float]:
    """The times of one call, after a warm-up, until the budget is spent; three at least."""
    call()
    _wait(device)
    times: list[float] = []
    end = time.perf_counter() + budget
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        for _ in range(inner):
            call()
        _wait(device)
        times.append((time.perf_counter() - start) / inner)
    return times


def captured(call: Callable[[], object], device: torch.device) -> Callable[[], None]:
    """The same kernels with nothing of Python between them: what they take the GPU, however fast the host is.

    Other threads may go on using the GPU, and the current stream is as before, also after an error.
    """
    with torch.cuda.device(device):
        call()  # whatever is compiled or loaded at the first time
        before, graph = torch.cuda.current_stream(device), torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=torch.cuda.Stream(device), capture_error_mode="thread_local"):
                call()
        finally:
            torch.cuda.set_stream(before)
    return graph.replay


@contextmanager
def one_thread() -> Iterator[int]:
    """Run on one thread; gives the number there were before."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


def cache_bytes(device: torch.device) -> int:
    """What lies closest and is not shared with strangers: the second-level caches of all cores in use, L2 of a GPU."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    return (_cache(2) or 1 << 20) * torch.get_num_threads()


def last_level_bytes(device: torch.device) -> int:
    """The last level of cache, which all cores share, and others than us as well."""
    if device.type != "cpu":
        return cache_bytes(device)
    return max(_cache(3), cache_bytes(device))


def _cache(level: int) -> int:
    """Bytes of a cache of the first core that holds data; 0 where the system does not say."""
    for index in CACHES.glob("index*"):
        try:
            found, kind, size = ((index / x).read_text(encoding="utf-8").strip() for x in ("level", "type", "size"))
            if int(found) == level and kind != "Instruction":
                return int(size.removesuffix("K")) << 10
        except (OSError, ValueError):
            continue
    return 0


def _memory() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
