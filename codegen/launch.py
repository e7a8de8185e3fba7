"""How a generated kernel is launched: the tile a program takes and how many warps it has."""

from __future__ import annotations

from dataclasses import dataclass

from kvbuffer_compile.codegen.triton_rows import CHUNK
from kvbuffer_compile.codegen.triton_values import power_of_two
from kvbuffer_compile.ir import Kind, Update
from kvbuffer_compile.plan import Plan


@dataclass(frozen=True)
class Config:
    """block: elements of the split axis, a power of two; fold: how many of them at once in a flush.

    warps, stages: as Triton takes them.
    """

    block: int
    warps: int
    fold: int = 16
    stages: int = 1


# float32 values that a thread may hold in each phase of a kernel, beside what it needs to work on them: from compiling
# the recurrences of real models ahead of time (benchmarks/triton_aot.py), with nothing spilled.
LIMITS = {"recurrent": 64, "state": 128, "rows": 150, "fold": 160}
DRAFTS = 8  # tokens of a verify step that the model counts on
VECTOR = 4  # elements of a tile that one thread holds side by side


def configure(plan: Plan, split: Kind | None) -> Config:
    """A launch that keeps everything in registers, by a model of what a program holds in each phase.

    As few warps as can hold it: sums over an axis that several warps share wait for all of them. On an H100, GDN at
    batch 128 and L=16 took 124 us a step with one warp for 32 columns, 139 with two and 155 with four; KDA 134 and 199.
    """
    axis = 1 if split is None else ("key", "value").index(split)
    size = power_of_two(plan.sizes[axis])
    block = size if split is None else min(size, 64 if plan.variant == "recurrent" else 32)
    for warps in (1, 2, 4, 8, 16):
        for fold in (block, 16) if split else (block,):
            held = phases(plan, axis, block, fold)
            if warps == 16 or all(held[phase] <= LIMITS[phase] * 32 * warps for phase in held):
                return Config(block, warps, fold)
    raise AssertionError("the last number of warps is always taken")


def phases(plan: Plan, axis: int, block: int, fold: int) -> dict[str, int]:
    """How many values one program holds: reading owed rows, reading the state, folding rows into it."""
    whole = power_of_two(plan.sizes[1 - axis])
    if plan.variant == "recurrent":
        return {"recurrent": whole * block}
    events = plan.program.events
    updates = sum(isinstance(e, Update) for e in events)
    gates = sum(not isinstance(e, Update) and e.factor.kind != "scalar" for e in events)
    sides = sum(v.kind == ("key", "value")[1 - axis] for v in plan.program.logged)
    vectors = 2 * (sides + updates - 1) + (gates > 0)  # a slot and the next one, and what decays leave
    fresh = DRAFTS * updates * (whole + block) if plan.variant == "verify" else 0
    return {
        "rows": min(CHUNK, power_of_two(plan.capacity)) * (whole * (updates + gates) + block * updates),
        "state": whole * block + fresh,
        "fold": whole * fold + whole * vectors * max(1, fold // VECTOR),
    }
