"""One tensor that a function writes: what was found of it and what was decided."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from math import prod
from typing import Literal

from torch import Tensor
from torch.fx import Node

from kvbuffer_compile.errors import Declined
from kvbuffer_compile.ir.plan import Plan
from kvbuffer_compile.passes.choice.choose import lane_sizes, state_tensor
from kvbuffer_compile.passes.choice.predict import Prediction
from kvbuffer_compile.passes.choice.working_set import hint
from kvbuffer_compile.passes.lifted import Lifted
from kvbuffer_compile.records import MENTIONED

Status = Literal["buffered", "recurrent", "declined", "kept"]
COMMENT = re.compile(r"  # .*")  # in a program: where an input of it comes from


@dataclass(frozen=True)
class StateReport:
    """One tensor that is written.

    name: what its user calls it. shape: ints, and symbols as text. status: "kept" is no matrix state, and left to the
    compiler. reason: why this was decided, one sentence. rule: identifier of a decline or of what it is kept as, ""
    otherwise. source: "file:line" of the model. program, plan: their text, "" when there is none. signature: one letter
    per op that touches the state. row_bytes: size of the rows it may owe. reads: the dtype of a shadow that is read in
    its place, "" for none; shadow_bytes: its size, with its scales. fresh_tokens: how many tokens a state that begins
    at zero decodes before it is made; unread_bytes: what reading it once for each of them would have moved.
    """

    name: str
    shape: tuple[int | str, ...]
    dtype: str
    status: Status
    reason: str
    rule: str = ""
    source: str = ""
    program: str = ""
    signature: str = ""
    plan: str = ""
    prediction: Prediction | None = field(default=None, repr=False)
    row_bytes: int = 0
    reads: str = ""
    shadow_bytes: int = 0
    fresh_tokens: int = 0
    unread_bytes: int = 0

    @property
    def kind(self) -> StateReport:
        """The same without names of the user's: what the layers of a model have in common."""
        reason = MENTIONED.sub("", self.reason)  # the others that it has to do with are of its own layer
        program = COMMENT.sub("", self.program)
        return replace(self, name="", reason=reason.replace(self.name, "it"), program=program)


def state_report(
    subject: Lifted | Node,
    decision: Plan | Declined,
    prediction: Prediction | None = None,
    kept: bool = False,
    pool: Node | None = None,
) -> StateReport:
    """The report of one tensor that is written: a lifted state with its plan or decline, or the placeholder of one that
    was refused.

    prediction: of the plan, or of the best that was not enough. kept: it is no matrix state. pool: the placeholder of
    the pool that the subject is some rows of; shape and memory are those of the whole pool.
    """
    if isinstance(subject, Node):
        assert isinstance(decision, Declined)
        return replace(_declined(subject, decision), status="kept" if kept else "declined")
    if isinstance(decision, Plan):
        return _planned(subject, pool or subject.state, decision, prediction)
    return replace(
        _declined(pool or subject.state, decision),
        source=decision.source or subject.source,
        program=str(subject.program),
        signature=subject.program.signature,
        prediction=prediction,
    )


def _planned(lifted: Lifted, tensor: Node, plan: Plan, prediction: Prediction | None) -> StateReport:
    rows = fresh = 0
    lanes = lane_sizes(plan.layout, state_tensor(lifted))
    if lifted.slots is not None:  # rows belong to slots, of which a step takes some
        lanes = (hint(tensor.meta["val"].shape[0]), *lanes[1:])
    if plan.variant != "recurrent":
        logged = zip(plan.program.logged, plan.row_dtypes, strict=True)
        rows = sum(prod(plan.row_shape(v, lanes)) * dtype.itemsize for v, dtype in logged)
        fresh = plan.fresh_rows(lanes)
    return StateReport(
        name=lifted.state.name,
        shape=_shape(tensor),
        dtype=_dtype(tensor),
        status="recurrent" if plan.variant == "recurrent" else "buffered",
        reason=plan.why,
        source=lifted.source,
        program=str(plan.program),
        signature=plan.program.signature,
        plan=str(plan),
        prediction=prediction,
        row_bytes=rows,
        reads=str(plan.read_dtype).removeprefix("torch.") if plan.read_dtype else "",
        shadow_bytes=plan.shadow_bytes(lanes),
        fresh_tokens=fresh * plan.program.tokens,
        unread_bytes=fresh * prod((*lanes, *plan.sizes)) * plan.state_dtype.itemsize,
    )


def _declined(node: Node, why: Declined) -> StateReport:
    return StateReport(node.name, _shape(node), _dtype(node), "declined", why.reason, why.rule, why.source)


def _shape(node: Node) -> tuple[int | str, ...]:
    value = node.meta.get("val")
    return tuple(d if isinstance(d, int) else str(d) for d in value.shape) if isinstance(value, Tensor) else ()


def _dtype(node: Node) -> str:
    value = node.meta.get("val")
    return str(value.dtype).removeprefix("torch.") if isinstance(value, Tensor) else "?"
