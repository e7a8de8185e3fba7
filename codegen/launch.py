"""How a generated kernel is launched: the tile a program takes, how many warps it has, and what it does by products."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from kvbuffer_compile.codegen.triton_rows import CHUNK
from kvbuffer_compile.codegen.triton_values import power_of_two
from kvbuffer_compile.ir import Kind, Update
from kvbuffer_compile.plan import Plan


@dataclass(frozen=True)
class Config:
    """block: elements of the split axis, a power of two; fold: how many of them at once in a flush.

    warps, stages: as Triton takes them. matrix: tokens from which on a verify step reads by matrix products, 0: never.
    """

    block: int
    warps: int
    fold: int = 16
    stages: int = 1
    matrix: int = 0


# float32 values that a thread may hold in each phase of a kernel, beside what it needs to work on them: from compiling
# the recurrences of real models ahead of time (benchmarks/triton_aot.py), with nothing spilled.
LIMITS = {"recurrent": 64, "state": 128, "rows": 150, "fold": 160, "products": 180}
DRAFTS = 8  # tokens of a verify step that the model counts on
MATRIX = 4  # tokens from which on products are worth it: by then they take half the instructions of the vector form
VECTOR = 4  # elements of a tile that one thread holds side by side
WARPS = (1, 2, 4, 8, 16)


def configure(plan: Plan, split: Kind | None) -> Config:
    """A launch that keeps everything in registers, by a model of what a program holds in each phase.

    As few warps as can hold it: sums over an axis that several warps share wait for all of them. On an H100, GDN at
    batch 128 and L=16 took 124 us a step with one warp for 32 columns, 139 with two and 155 with four; KDA 134 and 199.
    """
    axis, size = _axis(plan, split)
    block = size if split is None else min(size, 64 if plan.variant == "recurrent" else 32)
    folds = (block, 16) if split else (block,)
    matrices = (MATRIX, 0) if plan.variant == "verify" and plan.compute.itemsize == 4 else (0,)
    for matrix in matrices:
        for warps in WARPS[:3] if matrix else WARPS:
            for fold in folds:
                config = Config(block, warps, fold, matrix=matrix)
                if fits(plan, axis, config):
                    return config
    return Config(block, WARPS[-1], folds[-1])


def space(plan: Plan, split: Kind | None) -> list[Config]:
    """The launches worth trying on a GPU, the model's own first: other tiles, more and fewer warps, the other form."""
    axis, size = _axis(plan, split)
    start = configure(plan, split)
    blocks = [b for b in (16, 32, 64, 128) if b <= size] if split else [start.block]
    matrices = (0, 2, MATRIX) if plan.variant == "verify" and plan.compute.itemsize == 4 else (0,)
    found = [start]
    for block in blocks:
        for matrix in matrices:
            fitting = [c for c in _by_warps(start, block, matrix) if fits(plan, axis, c)]
            found += [c for c in fitting[:2] if c not in found]
    return found


def _by_warps(start: Config, block: int, matrix: int) -> Iterator[Config]:
    for warps in WARPS[:-1]:
        yield replace(start, block=block, warps=warps, fold=min(start.fold, block), matrix=matrix)


def _axis(plan: Plan, split: Kind | None) -> tuple[int, int]:
    """Which axis is split, the value axis if none is, and its length as a power of two."""
    axis = 1 if split is None else ("key", "value").index(split)
    return axis, power_of_two(plan.sizes[axis])


def fits(plan: Plan, axis: int, config: Config) -> bool:
    """Whether the model says that nothing spills."""
    held = phases(plan, axis, config)
    return all(held[phase] <= LIMITS[phase] * 32 * config.warps for phase in held)


def phases(plan: Plan, axis: int, config: Config) -> dict[str, int]:
    """How many values one program holds: reading owed rows, reading the state, folding rows into it, in products."""
    block, whole = config.block, power_of_two(plan.sizes[1 - axis])
    if plan.variant == "recurrent":
        return {"recurrent": whole * block}
    events = plan.program.events
    updates = sum(isinstance(e, Update) for e in events)
    gates = sum(not isinstance(e, Update) and e.factor.kind != "scalar" for e in events)
    sides = sum(v.kind == ("key", "value")[1 - axis] for v in plan.program.logged)
    vectors = 2 * (sides + updates - 1) + (gates > 0)  # a slot and the next one, and what decays leave
    fresh = DRAFTS * updates * (whole + block) if plan.variant == "verify" else 0
    held = {
        "rows": min(CHUNK, power_of_two(plan.capacity)) * (whole * (updates + gates) + block * updates),
        "state": whole * block + fresh,
        "fold": whole * config.fold + whole * vectors * max(1, config.fold // VECTOR),
    }
    if config.matrix:  # both operands in two parts each; every warp has all of the queries, and once more for a gram
        held["products"] = 2 * whole * (block + 16 * config.warps + 16 * (gates == 0))
    return held
