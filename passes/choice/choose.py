"""Lifted state -> Plan, or Declined with the numbers: which variant, which flush length, which dtypes for the rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from math import prod

import torch
from torch import Tensor

from kvbuffer_compile.errors import Declined
from kvbuffer_compile.ir.plan import Layout, Plan
from kvbuffer_compile.ir.program import Decay, Program, Read, Update, Var
from kvbuffer_compile.machine import Machine
from kvbuffer_compile.options import Options
from kvbuffer_compile.passes.choice.case import Case
from kvbuffer_compile.passes.choice.dtypes import exact_dtype
from kvbuffer_compile.passes.choice.predict import (
    FLUSHES,
    FLUSHES_TRITON,
    Prediction,
    predict,
    with_measured,
)
from kvbuffer_compile.passes.choice.reads import possible_read
from kvbuffer_compile.passes.choice.words import no_gain, why
from kvbuffer_compile.passes.choice.working_set import hint
from kvbuffer_compile.passes.lifted import ALONE, Call, Lifted

aten = torch.ops.aten
Times = Mapping[int, float]
EQUAL = 1.04  # times as long as the fastest: predictions are not better than that
ARGUMENTS = 64  # the limit of c10 for function schemas


def choose(
    lifted: Lifted, options: Options, machine: Machine, target: str, call: Call = ALONE, times: Times | None = None
) -> Plan | Declined:
    """The plan of one lifted state on one machine.

    target: who will implement the step, "aten", "cpp" or "triton" ("auto" is resolved before). call: what else one call
    of the graph does. times: measured seconds of a step by flush length, which are believed instead of the model's.
    flush="auto" declines with rule "no-gain" when nothing is predicted to beat Inductor; an integer is obeyed.
    """
    return explain_choice(lifted, options, machine, target, call, times)[0]


def explain_choice(
    lifted: Lifted, options: Options, machine: Machine, target: str, call: Call = ALONE, times: Times | None = None
) -> tuple[Plan | Declined, Prediction]:
    """The same, with the candidates that were compared."""
    compute = _compute_dtype(lifted)
    rows = row_dtypes(lifted, options, compute)
    wanted = () if isinstance(options.flush, str) else (options.flush,)
    most = lifted.most_tokens if lifted.several else 1
    case = make_case(lifted, rows, compute, options.capacity, target, call)
    case, read = _shadowed(case, machine, options, possible_read(lifted, options))
    prediction = predict(case, machine, (*_ladder(case, times or ()), *wanted))
    if times:
        prediction = with_measured(prediction, times)
    chosen = _asked(prediction, wanted[0]) if wanted else _fastest(prediction, case, machine)
    if most is None:
        reason = (
            "nothing bounds the number of tokens of one call, and their rows must fit in the buffer: give it a bound "
            "by torch._dynamo.mark_dynamic(x, dim, min=1, max=16), or compile with dynamic=False"
        )
        return Declined(lifted.state.name, "dynamic-size", reason, lifted.source), prediction
    if chosen is None:
        return no_gain(lifted, prediction), prediction
    prediction = replace(prediction, chosen=chosen)
    best = prediction.candidates[chosen]
    plan = Plan(
        program=lifted.program,
        layout=lifted.layout.at_run_time(),
        variant=best.variant,
        sizes=lifted.sizes,
        flush=best.flush,
        capacity=max(best.flush, options.capacity or 0, most) if best.variant != "recurrent" else 1,
        state_dtype=state_tensor(lifted).dtype,
        row_dtypes=rows,
        compute=compute,
        target=target,
        slots=lifted.slots is not None,
        read_dtype=read if best.variant != "recurrent" else None,
        why=why(prediction, best, asked=bool(wanted)),
    )
    return _too_wide(lifted, plan) or plan, prediction


def _too_wide(lifted: Lifted, plan: Plan) -> Declined | None:
    """torch refuses ops with too many arguments: state, cursor, rows and operands are one each."""
    rows = plan.sides + 1 if plan.variant != "recurrent" else 0
    count = 1 + rows + plan.slots + len(plan.program.inputs)
    if count <= ARGUMENTS:
        return None
    events = Counter(type(op) for op in plan.program.ops)
    reason = (
        f"one call makes {events[Update]} updates and {events[Read]} reads of each head that are no tokens one after "
        f"the other, which takes {count} tensors; an op of torch takes at most {ARGUMENTS}: decode fewer tokens in one "
        "call"
    )
    return Declined(lifted.state.name, "too-many-operands", reason, lifted.source)


def plans_of(
    lifted: Lifted, options: Options, machine: Machine, target: str, flushes: Sequence[int], call: Call = ALONE
) -> list[Plan]:
    """The plans with these flush lengths, as far as there are such."""
    asked = (choose(lifted, replace(options, flush=flush), machine, target, call) for flush in flushes)
    return [plan for plan in asked if isinstance(plan, Plan)]


def state_tensor(lifted: Lifted) -> Tensor:
    """The fake tensor of the state."""
    value = lifted.state.meta["val"]
    assert isinstance(value, Tensor)
    return value


def _compute_dtype(lifted: Lifted) -> torch.dtype:
    return torch.float64 if state_tensor(lifted).dtype == torch.float64 else torch.float32


# ------------------------------------------------------------------------------------------------ choosing


def _ladder(case: Case, timed: Iterable[int]) -> tuple[int, ...]:
    """Flush lengths to compare, beside 1. timed: those whose steps were."""
    if case.block:  # whole blocks, at least one
        return tuple(range(case.tokens, max(FLUSHES[-1], case.tokens) + 1, case.tokens))
    return tuple(timed) if case.target == "triton" and case.tokens == 1 else _flushes(case)


def _flushes(case: Case) -> tuple[int, ...]:
    return FLUSHES_TRITON if case.target == "triton" else FLUSHES


def likely_flush(lifted: Lifted, options: Options, machine: Machine, target: str, call: Call = ALONE) -> int:
    """The flush length that the model would take if it had to buffer: that of several tokens at once, in any case."""
    compute = _compute_dtype(lifted)
    case = make_case(lifted, row_dtypes(lifted, options, compute), compute, options.capacity, target, call)
    return _shared_flush(case, machine)


def _shared_flush(case: Case, machine: Machine) -> int:
    """The flush length of several tokens at once: that which one token would take, so that both graphs share their
    rows."""
    alone = predict(replace(case, tokens=1, shadow_width=0), machine, _flushes(case))
    return next(alone.candidates[i].flush for i in _order(alone) if alone.candidates[i].variant == "buffered")


def _order(prediction: Prediction) -> list[int]:
    """Candidates, the fastest first; of equals, that differ by a few percent of what the op of one takes, the shorter
    buffer."""
    spent = [c.seconds for c in prediction.candidates]
    first = min(prediction.candidates, key=lambda c: c.seconds)
    enough = first.seconds + (EQUAL - 1) * (first.seconds - first.around)
    equal = [i for i, seconds in enumerate(spent) if seconds <= enough]
    return equal + sorted(range(len(spent)), key=spent.__getitem__)


def _shadowed(
    case: Case, machine: Machine, options: Options, read: torch.dtype | None
) -> tuple[Case, torch.dtype | None]:
    """The case with the shadow that its steps read, if any: one that was asked for, or one that pays for one token."""
    if read is None:
        return case, None
    shadowed = replace(case, shadow_width=read.itemsize)
    with_it, without = (_least(replace(c, tokens=1), machine, _flushes(case)) for c in (shadowed, case))
    return (shadowed, read) if options.read_dtype != "auto" or with_it * EQUAL <= without else (case, None)


def _least(case: Case, machine: Machine, flushes: tuple[int, ...]) -> float:
    """Seconds of the best buffered step."""
    return min(c.seconds for c in predict(case, machine, flushes).candidates if c.variant == "buffered")


def _asked(prediction: Prediction, flush: int) -> int:
    return next(i for i, c in enumerate(prediction.candidates) if c.flush == flush)


def _fastest(prediction: Prediction, case: Case, machine: Machine) -> int | None:
    """The fastest candidate when it promises enough. A block is another recurrence than its tokens one by one, and not
    timed on GPUs."""
    if case.block and case.target == "triton":
        return None
    if case.tokens == 1 or case.block:
        best = _order(prediction)[0]
    else:
        best = _asked(prediction, _shared_flush(case, machine))
    return best if prediction.candidates[best].gain >= prediction.needed else None


# ------------------------------------------------------------------------------------------------ numbers


def make_case(
    lifted: Lifted,
    rows: tuple[torch.dtype, ...],
    compute: torch.dtype,
    capacity: int | None,
    target: str,
    call: Call = ALONE,
) -> Case:
    """The numbers a prediction needs; symbolic sizes by their hints, without guards."""
    state = state_tensor(lifted)
    operands = [n.meta["val"] for n in lifted.operands if isinstance(n.meta.get("val"), Tensor)]
    own = prod(map(hint, state.shape)) * state.dtype.itemsize
    return Case(
        program=lifted.program,
        sequence=lifted.layout.sequence,
        lanes=lane_sizes(lifted.layout, state),
        sizes=lifted.sizes,
        state_width=state.dtype.itemsize,
        row_widths=tuple(d.itemsize for d in rows),
        operand_width=max((x.dtype.itemsize for x in operands), default=compute.itemsize),
        compute_width=compute.itemsize,
        strided=strided_reads(lifted.program, lifted.layout),
        capacity=capacity or 0,
        target=target,
        tokens=hint(lifted.tokens) if lifted.several else 1,
        slots=lifted.slots is not None,
        others=max(call.bytes - own, 0),
        states=max(call.states, 1),
        block=lifted.block,
        within=sum(o.plus is not None for o in lifted.outputs),
        float16=state.dtype == torch.float16,
    )


def lane_sizes(layout: Layout, state: Tensor) -> tuple[int, ...]:
    """Sizes of the lanes of a state, in the order of program.lanes."""
    parts: list[int] = []
    for size, split in zip(state.shape, layout.dims, strict=True):
        known = 1
        for part in split:
            known *= 1 if part is None else part
        parts += [hint(size) // known if part is None else part for part in split]
    return tuple(parts[i] for i in layout.order[:-2])


def strided_reads(program: Program, layout: Layout) -> int:
    """Reads that sum over an axis which is not the state's innermost (states are taken to be contiguous)."""
    innermost = "value" if layout.order[-1] > layout.order[-2] else "key"
    return sum(isinstance(op, Read) and op.x.kind != innermost for op in program.ops)


# ------------------------------------------------------------------------------------------------- dtypes


def row_dtypes(lifted: Lifted, options: Options, compute: torch.dtype) -> tuple[torch.dtype, ...]:
    """A dtype for each of program.logged.

    Gates (factors of a Decay) and scalars: the compute dtype, always. Keys and values: options.row_dtype; else, for
    operands, the narrowest dtype that holds them exactly; for computed ones the compute dtype of a float32 state, else
    the state's own (16 bits at least).
    """
    gates = {op.factor for op in lifted.program.events if isinstance(op, Decay)}
    operands = dict(zip(lifted.program.inputs, lifted.operands, strict=True))
    state = state_tensor(lifted).dtype

    def of(v: Var) -> torch.dtype:
        if v in gates or v.kind == "scalar":
            return compute
        if options.row_dtype is not None:
            return options.row_dtype
        if v in operands:
            return exact_dtype(operands[v], compute)
        return state if state.itemsize > 1 else torch.bfloat16

    return tuple(of(v) for v in lifted.program.logged)
