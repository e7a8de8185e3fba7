"""How a generated kernel is launched: the tile a program takes and how many warps it has."""

from __future__ import annotations

from dataclasses import dataclass

from kvbuffer_compile.codegen.triton_values import power_of_two
from kvbuffer_compile.ir import Kind, Update
from kvbuffer_compile.plan import Plan


@dataclass(frozen=True)
class Config:
    """block: elements of the split axis (a power of two). warps, stages: as Triton takes them."""

    block: int
    warps: int
    stages: int = 1


LINE = 128  # bytes that one warp should at least read of the state side by side
VALUES = 64  # float32 values of the state, the owed rows and the new ones that a thread may hold


def configure(plan: Plan, split: Kind | None) -> Config:
    """A launch that keeps everything in registers, by a model of what a program holds."""
    axis = 1 if split is None else ("key", "value").index(split)
    size = power_of_two(plan.sizes[axis])
    if split is None:
        return Config(size, _warps(plan, axis, size))
    block = min(size, max(16, LINE // plan.state_dtype.itemsize))
    return Config(block, _warps(plan, axis, block))


def _warps(plan: Plan, axis: int, block: int) -> int:
    held = values(plan, axis, block)
    return next((w for w in (1, 2, 4, 8) if held <= VALUES * 32 * w), 16)


def values(plan: Plan, axis: int, block: int) -> int:
    """How many values one program holds at once: its tile of the state and all rows."""
    whole = power_of_two(plan.sizes[1 - axis])
    tile = whole * block
    if plan.variant == "recurrent":
        return tile
    events = plan.program.events
    wide = sum(isinstance(e, Update) or e.factor.kind != "scalar" for e in events)
    rows = power_of_two(plan.capacity) * (wide * whole + sum(isinstance(e, Update) for e in events) * block)
    return tile + rows
