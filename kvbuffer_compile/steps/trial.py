"""Timing the steps of one state as it is: its own kernels, its size and strides, found as cold as in its graph.

What was measured is kept on disk, by all that it depends on.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress

import torch
from torch import Tensor

from kvbuffer_compile.ir.plan import Plan
from kvbuffer_compile.machine import Machine
from kvbuffer_compile.machine.measure import seconds
from kvbuffer_compile.passes.choice.working_set import hint
from kvbuffer_compile.process import disk
from kvbuffer_compile.process.surroundings import neutral
from kvbuffer_compile.steps import targets
from kvbuffer_compile.steps.timing import filled

MOST_BYTES = 1 << 12  # of a file
MOST_STATES = 64  # that are stepped in turn
BUDGET = 0.15  # seconds for each plan


def times(plans: Sequence[Plan], state: Tensor, working_set: int, machine: Machine) -> Mapping[int, float]:
    """Seconds of a step under each of these plans of one state, the mean over a flush period, by flush length. Plans
    whose kernel cannot be built are left out.

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
            known = _measured(plan, plan.layout.sizes(shape)[:-2], working_set, machine)
            with suppress(OSError):
                disk.write(disk.folder() / path, json.dumps({"seconds": known, "plan": plan.settings}).encode())
        found[plan.flush] = known
    return found


def _name(plan: Plan, shape: Sequence[int], working_set: int, machine: Machine) -> str:
    parts = (plan.key, tuple(shape), working_set.bit_length(), machine.name, torch.__version__)
    return f"step-{hashlib.sha256(repr(parts).encode()).hexdigest()[:24]}.json"


def _kept(name: str) -> float | None:
    try:
        found = json.loads(disk.read(disk.folder() / name, MOST_BYTES) or b"")["seconds"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return found if isinstance(found, float) and 0 < found < 1e3 else None


@neutral
def _measured(plan: Plan, lanes: tuple[int, ...], working_set: int, machine: Machine) -> float:
    """As many states are stepped in turn as the working set holds, or as no cache does."""
    enough = min(working_set, 4 * machine.last)
    arguments = [_arguments(plan, lanes)]
    own = sum(t.nbytes for t in arguments[0])
    arguments += [_arguments(plan, lanes) for _ in range(min(enough // own, MOST_STATES - 1))]
    op, device = targets.step_op(plan), arguments[0][0].device
    turns = itertools.cycle(arguments)
    period = [next(turns) for _ in range(plan.flush * len(arguments))]

    def whole_period() -> None:
        for given in period:
            op(*given)

    return min(seconds(whole_period, device, budget=BUDGET)) / len(period)


def _arguments(plan: Plan, lanes: tuple[int, ...]) -> list[Tensor]:
    state, cursor, rows, operands = filled(plan, lanes)
    return [state, *operands] if plan.variant == "recurrent" else [state, cursor, *rows, *operands]
