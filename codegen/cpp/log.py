"""What a plan's log is to C++ kernels: its axes, the rows of a token, who owns them, in which types they are read."""

from __future__ import annotations

from kvbuffer_compile.ir.plan import Plan
from kvbuffer_compile.ir.program import Decay, Kind, Update, Var


def axes(plan: Plan) -> tuple[Kind, Kind]:
    """The outer and the inner canonical axis of the state: the inner one is innermost in memory."""
    key, value = plan.layout.order[-2:]
    return ("value", "key") if key > value else ("key", "value")


def owned(plan: Plan, v: Var, split: Kind | None) -> bool:
    """Whether the rows of a logged value are read by the item that writes them and by no other."""
    lanes = set(plan.program.lanes) - ({plan.program.lanes[0]} if plan.layout.sequence else set())
    return lanes <= set(v.lanes) and split in (None, v.kind)


def updates(plan: Plan) -> list[Update]:
    """The rows that a token adds."""
    return [op for op in plan.program.events if isinstance(op, Update)]


def row_types(plan: Plan) -> tuple[str, str]:
    """C++ types of the elements of left and right rows: what the log holds where rows are used in place, else Real."""
    fades = {op.factor.kind for op in plan.program.events if isinstance(op, Decay)}
    dtypes = dict(zip(plan.program.logged, plan.row_dtypes, strict=True))
    types = []
    for kind, side in (("key", [op.left for op in updates(plan)]), ("value", [op.right for op in updates(plan)])):
        in_place = plan.variant == "buffered" and kind not in fades and all(v.kind == kind for v in side)
        alike = len({dtypes[v] for v in side}) == 1
        types.append(f"Row_{side[0]}" if in_place and alike else "Real")
    return types[0], types[1]


def uses_of(event: Decay | Update) -> tuple[Var, ...]:
    return (event.factor,) if isinstance(event, Decay) else (event.left, event.right)


def fade_name(kind: Kind) -> str:
    return "fade" if kind == "scalar" else f"fade_{kind}"
