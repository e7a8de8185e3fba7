"""Timing the steps of one state as it is: its own kernels, its size and strides, found as cold as in its graph.

What was measured is kept on disk, by all that it depends on.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from math import prod

import torch
from torch import Tensor

from kvbuffer_compile.ir.plan import Plan
from kvbuffer_compile.machine import Machine
from kvbuffer_compile.machine.measure import captured, seconds
from kvbuffer_compile.passes.choice.working_set import hint
from kvbuffer_compile.process import disk
from kvbuffer_compile.process.surroundings import neutral
from kvbuffer_compile.steps import targets
from kvbuffer_compile.steps.timing import filled

log = logging.getLogger("kvbuffer_compile")

MOST_BYTES = 1 << 12  # of a file
MOST_STATES = 64  # that are stepped in turn
LAUNCHES = 32  # of a state, at least, that are timed at once on a GPU
LARGEST = 1 << 29  # bytes of a state: more sequences take longer in proportion
BUDGET = 0.15  # seconds for each plan


def times(plans: Sequence[Plan], state: Tensor, working_set: int, machine: Machine) -> Mapping[int, float]:
    """Seconds of a step under each of these plans of one state, the mean over a flush period, by flush length. Plans
    whose kernel cannot be built or run are left out.

    state: a tensor like the user's, which may be fake. working_set: bytes that a call of its graph touches.
    """
    shape = [hint(n) for n in state.shape]
    found = {}
    for plan in plans:
        if targets.build(plan) != plan.target:
            continue
        path = _name(plan, shape, working_set, machine)
        known = _kept(path)
        if known is None:
            try:
                known = _measured(plan, plan.layout.sizes(shape)[:-2], working_set, machine, state.device)
            except Exception as error:  # no memory for it, most likely; Triton's errors have a base of their own
                log.info("not timed, L=%d of %s: %s", plan.flush, plan.program.signature, error)
                continue
            with suppress(OSError):
                disk.write(disk.folder() / path, json.dumps({"seconds": known, "plan": plan.settings}).encode())
        found[plan.flush] = known
    return found


def may_measure() -> bool:
    """Whether steps may be timed without being asked to: not in Triton's interpreter, whose times tell nothing of a
    GPU, nor where KVBUFFER_TUNE=0 forbids it."""
    return os.environ.get("TRITON_INTERPRET") != "1" and os.environ.get("KVBUFFER_TUNE") != "0"


def _name(plan: Plan, shape: Sequence[int], working_set: int, machine: Machine) -> str:
    text = targets.source(plan)  # an emitter that was changed makes another kernel
    parts = (plan.key, text, tuple(shape), working_set.bit_length(), machine.name, torch.__version__)
    return f"step-{hashlib.sha256(repr(parts).encode()).hexdigest()[:24]}.json"


def _kept(name: str) -> float | None:
    try:
        found = json.loads(disk.read(disk.folder() / name, MOST_BYTES) or b"")["seconds"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return found if isinstance(found, float) and 0 < found < 1e3 else None


@neutral
def _measured(plan: Plan, lanes: tuple[int, ...], working_set: int, machine: Machine, device: torch.device) -> float:
    """As many states are stepped in turn as the working set holds, or as no cache does."""
    lanes, share = _smaller(plan, lanes)
    enough = min(working_set, 4 * machine.last)
    arguments = [_arguments(plan, lanes, device)]
    own = sum(t.nbytes for t in arguments[0])
    arguments += [_arguments(plan, lanes, device) for _ in range(min(enough // own, MOST_STATES - 1))]
    op = targets.step_op(plan)
    turns = itertools.cycle(arguments)
    # on a GPU as many for each plan: the host's time for a replay is spread over them
    steps = math.lcm(plan.flush, LAUNCHES) if device.type == "cuda" else plan.flush
    period = [next(turns) for _ in range(steps * len(arguments))]

    def whole_period() -> None:
        for given in period:
            op(*given)

    call = captured(whole_period, device) if device.type == "cuda" else whole_period
    return min(seconds(call, device, budget=BUDGET)) / len(period) / share


def _smaller(plan: Plan, lanes: tuple[int, ...]) -> tuple[tuple[int, ...], float]:
    """Lanes of a state that is not too large to be made beside the user's, and which share of the whole that is."""
    total = prod((*lanes, *plan.sizes)) * plan.state_dtype.itemsize
    if not lanes or total <= LARGEST:
        return lanes, 1.0
    first = max(lanes[0] * LARGEST // total, 1)
    return (first, *lanes[1:]), first / lanes[0]


def _arguments(plan: Plan, lanes: tuple[int, ...], device: torch.device) -> list[Tensor]:
    state, cursor, rows, operands = filled(plan, lanes, device)
    return [state, *operands] if plan.variant == "recurrent" else [state, cursor, *rows, *operands]
