"""How a generated kernel is launched: the tile a program takes, how many warps it has, and what it does by products."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice

from kvbuffer_compile.codegen.schedule import Schedule
from kvbuffer_compile.codegen.triton.drafts import drafts
from kvbuffer_compile.codegen.triton.stream import streams
from kvbuffer_compile.codegen.triton.tiles.matrix import PART, applies, read_axis
from kvbuffer_compile.codegen.triton.tiles.rows import CHUNK, LEAST
from kvbuffer_compile.codegen.triton.tiles.values import AXES, power_of_two
from kvbuffer_compile.ir.plan import Plan
from kvbuffer_compile.ir.program import Update


@dataclass(frozen=True)
class Config:
    """block: elements of the split axis, a power of two; fold: how many of them at once in a flush.

    warps, stages: as Triton takes them. matrix: whether a verify step reads by matrix products.
    registers: that a thread may have on NVIDIA's GPUs, 0 as many as the assembler thinks best.
    part: of a buffered step that streams the state, elements of the contracted axis at a time, a power of two; stages
    of them are on their way. 0 for one that holds its tile at once.
    """

    block: int
    warps: int
    fold: int = 16
    stages: int = 1
    matrix: bool = False
    registers: int = 0
    part: int = 0


# float32 values that a thread may hold in each phase of a kernel, beside what it needs to work on them: from compiling
# the recurrences of real models ahead of time (benchmarks/triton_aot.py), with nothing spilled.
LIMITS = {"recurrent": 64, "state": 128, "rows": 150, "fold": 160, "products": 128, "stream": 132, "drafts": 32}
DRAFTS = 8  # tokens of a verify step that the model counts on
TYPICAL_NODES = 16  # of a tree, that the model counts on
STAGES = 2  # of the loop over parts in matrix products: the next part is asked for while one is used
VECTOR = 4  # elements of a tile that one thread holds side by side
WARPS = (1, 2, 4, 8, 16)
# A streamed step: elements of the free axis that a program takes, and of the contracted one at a time (as many as a
# tile of rows has slots, so that both are summed as one); bytes side by side where the latter is the contiguous one;
# parts on their way; elements of a part that a thread has; registers with which four programs of four warps fit.
WIDE, NARROW, SIDE_BY_SIDE, AHEAD, HELD, OCCUPIED = 128, 16, 64, 4, 16, 128
# The limit of a streamed step with vectors for gates: at 112 (GLA, 256 x 512) ptxas spilled 16 bytes of 255.
GATED = 100
MUCH = 90  # values that a thread holds, of float32 states: at 96 (KDA) ptxas aimed at 168 registers and spilled 8 bytes
# Registers of a thread for matrix products: many with vectors for gates or much to hold. Left to itself, ptxas aimed at
# 128 or 168 and spilled up to 32 bytes. 168 leave room for three programs of four warps, 255 for two.
REGISTERS = {"many": 255, "few": 168}
FEW = 64  # values that a thread may hold in products to do with few: at 76 one kernel spilled 8 bytes


def configure(plan: Plan, schedule: Schedule) -> Config:
    """A launch that keeps everything in registers, by a model of what a program holds in each phase.

    As few warps as can hold it: sums over an axis that several warps share wait for all of them. On an H100, GDN at
    batch 128 and L=16 took 124 us a step with one warp for 32 columns, 139 with two and 155 with four; KDA 134 and 199.
    Buffered and verify steps stream the state where they can: benchmarks/results/gpu_predicted.json has the comparison.
    """
    for config in _ahead(plan, schedule):
        # A step of one token has the rows beside each other: RWKV-7 at 64 x 64 has more of them than its state.
        if plan.several or _rows_held(plan, schedule, config) < plan.sizes[0] * plan.sizes[1]:
            return config
    return held(plan, schedule)


def held(plan: Plan, schedule: Schedule) -> Config:
    """The same for a step that holds its tile of the state at once.

    Products in a tree spill beyond 16 nodes and 32 rows. Still, GDN with 16 nodes and 64 rows, 704 bytes spilled, was
    predicted at 80 us, with twice the warps at 160 and by vectors, where nothing spills, at 580.
    """
    _, size = _axis(plan, schedule)
    block = size if schedule.split is None else min(size, 64 if plan.variant == "recurrent" else 32)
    if plan.variant == "tree" and applies(plan, schedule):
        return Config(block, 4, min(16, block), STAGES, True, REGISTERS["many"])
    return next(_fitting(plan, schedule, block, applies(plan, schedule)), Config(block, WARPS[-1]))


def space(plan: Plan, schedule: Schedule) -> list[Config]:
    """The launches worth trying on a GPU, the model's own first: other tiles, more warps, both forms, loads ahead.

    Streamed ones with other tiles, depths and occupancy; the model's own with as few registers as ptxas likes. Of a
    tree only the model's own: its kernel is built in the middle of a run.
    """
    if plan.variant == "tree":
        return [configure(plan, schedule)]
    _, size = _axis(plan, schedule)
    found = list(dict.fromkeys([configure(plan, schedule), *_ahead(plan, schedule)]))
    blocks = [b for b in (16, 32, 64, 128) if b <= size] if schedule.split else [found[0].block]
    for matrix in (True, False) if applies(plan, schedule) else (False,):
        for block in blocks:
            for config in islice(_fitting(plan, schedule, block, matrix), 2):
                ahead = [replace(config, stages=n) for n in (1, 3)] if matrix else []
                found += [c for c in (config, *ahead) if c not in found]
    return found + [replace(c, registers=0) for c in found[:1] if c.registers]


def _ahead(plan: Plan, schedule: Schedule) -> Iterator[Config]:
    """The launches that stream the state, the likeliest first."""
    yield from _drafting(plan, schedule) if plan.several else _streaming(plan, schedule)


def _drafting(plan: Plan, schedule: Schedule) -> Iterator[Config]:
    """The launches of a verify step that streams the state: one program a head, or a wide tile of it.

    Products take few registers, but where gates run along the contracted axis a thread has all rows of its elements.
    With those held down to three programs a multiprocessor ptxas spills 24 to 280 bytes, yet the model has it faster.
    """
    kind = read_axis(schedule) if drafts(plan, schedule) else None
    if kind is None:
        return
    contracted, free = (power_of_two(plan.sizes[n]) for n in (AXES.index(kind), 1 - AXES.index(kind)))
    inner = "key" if plan.layout.order[-2] > plan.layout.order[-1] else "value"
    size, gates = plan.state_dtype.itemsize, _gates(plan)
    wide = 2 * NARROW if gates or size == 2 else NARROW
    part = min(contracted, max(wide, SIDE_BY_SIDE // size if kind == inner else 0))
    block = min(free, WIDE) if schedule.split else free
    warps = 4 if gates else min(max(1, block // 32), 4)
    stages = AHEAD - 1 if wide > NARROW else AHEAD
    config = Config(block, warps, stages=stages, matrix=True, part=part, registers=REGISTERS["many"] if gates else 0)
    if block > WIDE or not fits(plan, schedule, config):
        return
    yield config
    yield replace(config, registers=REGISTERS["few"])
    yield replace(config, stages=2)


def _streaming(plan: Plan, schedule: Schedule) -> Iterator[Config]:
    """The launches that stream the state and fit, the likeliest first; none where it cannot be streamed."""
    kind = read_axis(schedule) if streams(plan, schedule) else None
    if kind is None:
        return
    whole, free = (power_of_two(plan.sizes[n]) for n in (AXES.index(kind), 1 - AXES.index(kind)))
    inner = "key" if plan.layout.order[-2] > plan.layout.order[-1] else "value"
    part = min(whole, max(NARROW, SIDE_BY_SIDE // plan.state_dtype.itemsize if kind == inner else 0))
    for block in (min(free, WIDE), min(free, WIDE) // 2) if schedule.split else (free,):
        least = max(1, part * block // (HELD * 32))
        found = (Config(block, w, stages=AHEAD, part=part) for w in WARPS if w >= least)
        for config in islice((c for c in found if fits(plan, schedule, c)), 1):
            held = phases(plan, schedule, config)["stream"] / (32 * config.warps)
            if held > MUCH and plan.state_dtype.itemsize == 4:
                config = replace(config, registers=REGISTERS["many"])
            elif plan.slots and plan.state_dtype.itemsize == 2 and not _gates(plan):
                config = replace(config, registers=OCCUPIED)  # GDN took 130 instead of 128, and 75 us instead of 57
            yield config
            yield replace(config, stages=AHEAD - 1)
            yield replace(config, registers=OCCUPIED)


def _rows_held(plan: Plan, schedule: Schedule, config: Config) -> int:
    """How many values of rows one program holds that streams the state."""
    updates = sum(isinstance(e, Update) for e in plan.program.events)
    contracted = power_of_two(plan.sizes[AXES.index(read_axis(schedule) or "key")])
    slots = max(LEAST, power_of_two(plan.capacity))
    return slots * (updates * (config.block + contracted) + _gates(plan) * contracted)


def _fitting(plan: Plan, schedule: Schedule, block: int, matrix: bool) -> Iterator[Config]:
    """The launches with a block that fit, each number of warps once."""
    for warps in WARPS[2:] if matrix else WARPS:  # four warps take 8 columns of a product each
        small = min(16, block)  # all that products leave room for: with more, ptxas took 128 registers and spilled one
        folds = dict.fromkeys((small,) if matrix else (block, small)) if schedule.split else (block,)
        candidates = (Config(block, warps, fold, STAGES if matrix else 1, matrix) for fold in folds)
        found = islice((c for c in candidates if fits(plan, schedule, c)), 1)
        yield from (replace(c, registers=_registers(plan, schedule, c)) for c in found)


def _registers(plan: Plan, schedule: Schedule, config: Config) -> int:
    if not config.matrix:
        return 0
    held = phases(plan, schedule, config)["products"]
    return REGISTERS["many" if _gates(plan) or held > FEW * 32 * config.warps else "few"]


def whole(plan: Plan, schedule: Schedule, config: Config) -> bool:
    """Whether one program streams all of a head: then it shares no rows with others."""
    return config.part > 0 and config.block >= _axis(plan, schedule)[1]


def _axis(plan: Plan, schedule: Schedule) -> tuple[int, int]:
    """Which axis is split, the value axis if none is, and its length as a power of two."""
    axis = 1 if schedule.split is None else ("key", "value").index(schedule.split)
    return axis, power_of_two(plan.sizes[axis])


def _gates(plan: Plan) -> int:
    """How many decays of a token are vectors."""
    return sum(not isinstance(e, Update) and e.factor.kind != "scalar" for e in plan.program.events)


def fits(plan: Plan, schedule: Schedule, config: Config) -> bool:
    """Whether the model says that nothing spills."""
    held = phases(plan, schedule, config)
    limits = LIMITS | ({"stream": GATED} if _gates(plan) else {})
    return all(held[phase] <= limits[phase] * 32 * config.warps for phase in held)


def phases(plan: Plan, schedule: Schedule, config: Config) -> dict[str, int]:
    """How many values one program holds in each phase: reading rows and state, both in products, or rows beside a state
    that is streamed; folding."""
    axis, _ = _axis(plan, schedule)
    block, whole = config.block, power_of_two(plan.sizes[1 - axis])
    if plan.variant == "recurrent":
        return {"recurrent": whole * block}
    events = plan.program.events
    updates = sum(isinstance(e, Update) for e in events)
    gates = _gates(plan)
    if config.part and plan.several:  # owed rows; the state passes by, and products take turns
        return {"drafts": max(LEAST, power_of_two(plan.capacity)) * updates * max(block, whole if gates else 0)}
    if config.part:
        tiles = config.part * block * (1 + len(schedule.stages[0].reads))
        return {"stream": tiles + _rows_held(plan, schedule, config)}
    sides = sum(v.kind == ("key", "value")[1 - axis] for v in plan.program.logged)
    vectors = 2 * (sides + updates - 1) + (gates > 0)  # a slot and the next one, and what decays leave
    held = {"fold": whole * config.fold + whole * vectors * max(1, config.fold // VECTOR)}
    if config.matrix:
        slots, part = power_of_two(plan.capacity), min(PART, whole)
        tiles = 16 * (block + (updates + 1) * slots) + slots * (part + block) * updates  # totals, and rows
        return held | {"products": tiles + 2 * part * (block + 16 + slots * gates)}
    fresh = {"verify": DRAFTS, "tree": TYPICAL_NODES}.get(plan.variant, 0) * updates * (whole + block)
    fresh += 4 * TYPICAL_NODES * gates * whole if plan.variant == "tree" else 0
    rows = min(CHUNK, power_of_two(plan.capacity)) * (whole * (updates + gates) + block * updates)
    return held | {"rows": rows, "state": whole * block + fresh}
