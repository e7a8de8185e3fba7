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


LINE = 128  # bytes of the state that should at least be read side by side
VALUES = 80  # float32 values of a tile that a thread can hold beside what it needs to work on them
DRAFTS = 8  # tokens of a verify step that the model counts on


def configure(plan: Plan, split: Kind | None) -> Config:
    """A launch that keeps everything in registers, by a model of what a program holds at its fullest."""
    axis = 1 if split is None else ("key", "value").index(split)
    size = power_of_two(plan.sizes[axis])
    block = size if split is None else min(size, max(16, LINE // plan.state_dtype.itemsize))
    held = values(plan, axis, block)
    return Config(block, next((w for w in (1, 2, 4, 8) if held <= VALUES * 32 * w), 16))


def values(plan: Plan, axis: int, block: int) -> int:
    """How many values one program holds: a tile of the state with the rows of this step, or, before, the owed rows."""
    whole = power_of_two(plan.sizes[1 - axis])
    if plan.variant == "recurrent":
        return whole * block
    events = plan.program.events
    updates = sum(isinstance(e, Update) for e in events)
    gates = sum(not isinstance(e, Update) and e.factor.kind != "scalar" for e in events)
    owed = power_of_two(plan.capacity) * (whole * (updates + gates) + block * updates)
    fresh = DRAFTS * updates * (whole + block) if plan.variant == "verify" else 0
    return max(whole * block + fresh, owed)
