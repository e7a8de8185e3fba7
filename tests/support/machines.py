"""Machines with given numbers, for predictions that do not depend on where tests run."""

from __future__ import annotations

from kvbuffer_compile.machine import Machine, Speed


def machine(
    name: str, device: str, bandwidth: float, cached: float, cache: int, launch: float, rate: float, update: float = 0.0
) -> Machine:
    """bandwidth, cached: bytes/s of copies beyond and within a cache of so many bytes. update: of changes in place."""
    near = Speed(cache, cached, cached, cached)
    far = Speed(cache + 1, bandwidth, bandwidth, update or bandwidth)
    return Machine(name, device, 2, (near, far), cache, cache, launch, rate)


CPU = machine("test CPU", "cpu", 12e9, 85e9, 2 << 20, 1.5e-6, 70e9)
H100 = machine("test H100", "cuda", 3e12, 6e12, 50 << 20, 7e-6, 5e13)
