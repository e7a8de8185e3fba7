"""The plan of one lifted state: the cost model's or a measured choice, proven on numbers, with its kernel built."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from kvbuffer_compile.errors import Declined
from kvbuffer_compile.ir.plan import Plan
from kvbuffer_compile.machine import Machine, machine_for
from kvbuffer_compile.options import Options
from kvbuffer_compile.passes.choice.choose import explain_choice, likely_flush, plans_of, state_tensor
from kvbuffer_compile.passes.choice.predict import Prediction
from kvbuffer_compile.passes.choice.words import busy, duration
from kvbuffer_compile.passes.choice.working_set import hint
from kvbuffer_compile.passes.lift.words import EMPTY
from kvbuffer_compile.passes.lifted import Call, Lifted, LiftedGraph
from kvbuffer_compile.passes.proof.validate import validate
from kvbuffer_compile.passes.storage import pools
from kvbuffer_compile.process import callers
from kvbuffer_compile.steps import targets, trial
from kvbuffer_compile.steps.timing import calibrated

LOSS = 0.9  # of a predicted gain: below it a flush length that was asked for is warned of
_told_of_loss = False
TIMED = (1, 4, 8, 16, 32)  # flush lengths that tuning compares


Outcome = tuple[Plan | Declined, Prediction | None]


def plan_for(graph: LiftedGraph, found: Lifted, ours: Options, call: Call) -> Outcome:
    """Choose a plan for one lifted state and prove it on numbers before it may be used. And what was predicted of it,
    or of the best that was not enough."""
    if found.write is None and not ours.donate:
        reason = "the next state is returned, and the caller may still hold the old one: pass options={'donate': True}"
        return Declined(found.state.name, "not-donated", reason, found.source), None
    value = found.state.meta["val"]
    if 0 in value.shape:
        return Declined(found.state.name, "empty", EMPTY, found.source), None
    device = value.device
    target = targets.resolve(ours.target, device)
    if found.slots is not None and (elsewhere := pools.misplaced(found)) is not None:
        return elsewhere, None
    # timing kernels takes seconds, once for a machine: not for a flush length that is obeyed anyway
    machine = calibrated(device, target) if ours.flush == "auto" else machine_for(device)
    times = timed(found, ours, machine, target, call)
    chosen, prediction = explain_choice(found, ours, machine, target, call, times)
    if isinstance(chosen, Declined):
        return chosen, prediction if chosen.rule == "no-gain" else None
    problem = validate(graph, found)
    if problem is not None:
        return problem, None
    built = targets.build(chosen)
    if built == chosen.target:
        return chosen, prediction
    if chosen.shadowed:
        return plan_for(graph, found, replace(ours, read_dtype=None), call)
    return explain_choice(found, ours, machine, built, call)


def loss_of(prediction: Prediction, ours: Options) -> str:
    """That what was asked for is predicted to be slower than doing nothing, "" when it is not. Room beyond the flush
    length is for drafts (speculative decoding asks for it by itself), and gains by those that are accepted."""
    best = prediction.choice
    if not isinstance(ours.flush, int) or best is None or best.gain > LOSS or (ours.capacity or 0) > ours.flush:
        return ""
    return (
        f"flush={ours.flush} is predicted to take {duration(best.seconds)} a step, Inductor alone "
        f"{duration(prediction.plain.seconds)}, for a state of {prediction.state_bytes / 1e6:.3g} MB: flush='auto' "
        f"would leave it to Inductor{busy(prediction)} (this is said once)"
    )


def tell_of_loss(message: str) -> None:
    """Once for a process."""
    global _told_of_loss
    if not _told_of_loss:
        _told_of_loss = True
        callers.warn(message)


def timed(found: Lifted, ours: Options, machine: Machine, target: str, call: Call) -> Mapping[int, float]:
    """What steps of this state take, by flush length; nothing where that is not measured: several tokens take the flush
    length of one, pools on a CPU go by the model. On a GPU it always is, since nothing is buffered there that was not
    timed; on a CPU with options={"tune": True}, a flush length that was asked for too."""
    if found.several or (found.slots is not None and target != "triton"):
        return {}
    flushes: tuple[int, ...] = ()
    if target == "cpp" and ours.tune:
        flushes = (1, ours.flush) if isinstance(ours.flush, int) else TIMED
    elif target == "triton" and ours.flush == "auto" and trial.may_measure():
        flushes = (1, likely_flush(found, ours, machine, target, call))
    if not flushes:
        return {}
    plans = plans_of(found, ours, machine, target, flushes, call)
    times = trial.times(plans, _stepped(found), max(call.bytes, 1), machine)
    needed = {1} if target == "triton" else {ours.flush} if isinstance(ours.flush, int) else set()
    return times if needed <= times.keys() else {}  # what there is to be compared with, and what was asked for


def _stepped(found: Lifted) -> Tensor:
    """A tensor like what one call steps: of a pool, the slots that it takes."""
    state = state_tensor(found)
    if found.slots is None:
        return state
    return state.new_empty((hint(found.slots.meta["val"].shape[0]), *state.shape[1:]))
