"""What was found in a function, and what was decided: for people (text, HTML, plot) and for programs (dict)."""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch
from rich.box import Box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text
from torch import Tensor
from torch.fx import Node

from kvbuffer_compile.errors import Declined
from kvbuffer_compile.ir.plan import Plan
from kvbuffer_compile.passes.choice.choose import lane_sizes, state_tensor
from kvbuffer_compile.passes.choice.predict import Prediction
from kvbuffer_compile.passes.choice.working_set import hint
from kvbuffer_compile.passes.lifted import Lifted
from kvbuffer_compile.records import MENTIONED
from kvbuffer_compile.report import html
from kvbuffer_compile.report import plot as report_plot
from kvbuffer_compile.report.whole import WholeCall, in_bytes

Status = Literal["buffered", "recurrent", "declined", "kept"]
STATUSES: tuple[Status, ...] = ("buffered", "recurrent", "declined")  # of matrix states; kept is what is none
WIDTH = 100  # columns of the table


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
    prediction: Prediction | None = None
    row_bytes: int = 0
    reads: str = ""
    shadow_bytes: int = 0
    fresh_tokens: int = 0
    unread_bytes: int = 0

    @property
    def kind(self) -> StateReport:
        """The same without its name: what the layers of a model have in common."""
        reason = MENTIONED.sub("", self.reason)  # the others that it has to do with are of its own layer
        return replace(self, name="", reason=reason.replace(self.name, "it"))


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


@dataclass(frozen=True)
class Report:
    """Every tensor that a function writes. graphs: how many were captured. options: what was asked for. notes: what
    concerns a whole graph, e.g. that it needs gradients. calls: what a call of each graph moves and gains as a whole,
    of equal ones the first."""

    states: tuple[StateReport, ...]
    graphs: int = 1
    options: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    calls: tuple[WholeCall, ...] = ()

    def count(self, status: Status) -> int:
        """How many states have this status."""
        return sum(state.status == status for state in self.states)

    @property
    def headline(self) -> str:
        """One line: how many matrix states, and what became of them."""
        counts = ", ".join(f"{self.count(s)} {s}" for s in STATUSES if self.count(s))
        kept = self.count("kept")
        found = f"{_plural(len(self.states) - kept, 'state')} in {_plural(self.graphs, 'graph')}"
        rest = f" ({_plural(kept, 'other tensor')} written, no matrix state: kept)" if kept else ""
        return f"{found}: {counts or 'nothing to buffer'}{rest}"

    def groups(self) -> list[tuple[StateReport, list[str]]]:
        """Each kind of state once, with the names of the states of that kind, in order."""
        groups: dict[StateReport, list[StateReport]] = {}
        for state in self.states:
            groups.setdefault(state.kind, []).append(state)
        return [(members[0], [m.name for m in members]) for members in groups.values()]

    def __str__(self) -> str:
        return _text(self)

    def to_dict(self) -> dict[str, Any]:
        """Numbers, strings, lists and dicts only, ready for json.dump."""
        return {
            "headline": self.headline,
            "graphs": self.graphs,
            "options": {name: _plain(value) for name, value in self.options.items()},
            "notes": list(self.notes),
            "calls": [{**asdict(call), "share": call.share} for call in self.calls],
            "states": [_plain(asdict(state)) for state in self.states],
        }

    def to_html(self, path: str | Path) -> None:
        """Write one page that needs no other file."""
        groups = [(_plain(asdict(first)), names) for first, names in self.groups()]
        Path(path).write_text(
            html.page(self.headline, [*map(str, self.calls)], self.notes, groups, LEGEND), encoding="utf-8"
        )

    def plot(self, path: str | Path) -> None:
        """Draw bytes and predicted time per step against the flush length; the ending of `path` picks the format.

        ImportError without matplotlib; ValueError when no state has a prediction.
        """
        curves = [(_label(first, names), first.prediction) for first, names in self.groups() if first.prediction]
        report_plot.draw(curves, path, " \N{MIDDLE DOT} ".join([self.headline, *map(str, self.calls)]))


def _plain(value: Any) -> Any:
    """A value in JSON's types; what has none becomes its text."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if value is None or isinstance(value, str | bool | int | float):
        return value
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else str(value)


# --------------------------------------------------------------------------------------------------- text

LEGEND = (
    ("L", "flush length, the tokens between two writes of a state; 1 writes it at every token"),
    ("L*", "the flush length that moves the fewest bytes; the choice is by predicted time"),
    ("s", "bytes of one element of the state"),
    ("slot", "bytes of what one token adds to the rows of a head: keys, values, gates"),
    ("gain", "predicted time of Inductor's step of this state, divided by ours"),
)
RULED = Box("    \n    \n -- \n    \n    \n    \n    \n    \n", ascii=True)  # one line under the header


def _text(report: Report) -> str:
    out = io.StringIO()
    console = Console(file=out, width=WIDTH, color_system=None, legacy_windows=False, emoji=False)
    console.print(Text(f"kvbuffer: {report.headline}"))
    for call in report.calls:
        console.print(Text(f"whole: {call}"))
    for note in report.notes:
        console.print(Text(f"note: {note}"))
    groups = report.groups()
    if groups:
        console.print(_table(groups))
        for number, (state, _) in enumerate(groups, 1):
            console.print(Padding(_details(number, state), (0, 0, 0, 1)))
        if any(state.prediction for state, _ in groups):
            console.print(Text("\n".join(f"{term}: {meaning}" for term, meaning in LEGEND)))
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()).rstrip()


def _table(groups: list[tuple[StateReport, list[str]]]) -> Table:
    table = Table(box=RULED, pad_edge=False, padding=(0, 1))
    table.add_column("#", justify="right")
    table.add_column("state", overflow="fold", ratio=1)
    for title in ("shape", "dtype", "status", "ops"):
        table.add_column(title, overflow="fold", max_width=22)
    for title in ("L", "rows", "reads", "gain"):
        table.add_column(title, justify="right", no_wrap=True)
    for number, (state, names) in enumerate(groups, 1):
        table.add_row(*map(Text, (str(number), _label(state, names), *_cells(state))))
    return table


def _cells(state: StateReport) -> Iterable[str]:
    choice = state.prediction.choice if state.prediction else None
    yield "x".join(map(str, state.shape))
    yield state.dtype
    yield state.status
    yield state.signature or "-"
    yield str(choice.flush) if choice else "-"
    yield in_bytes(state.row_bytes) if state.row_bytes else "-"
    yield state.reads or "-"
    yield f"{choice.gain:.2f}x" if choice else "-"


def _details(number: int, state: StateReport) -> Text:
    where = f" [{state.source}]" if state.source else ""
    rule = f"{state.rule}: " if state.rule else ""
    fresh = ""
    if state.fresh_tokens:
        fresh = f"; from zero the first {state.fresh_tokens} tokens read no state, {in_bytes(state.unread_bytes)} less"
    shadow = f"; steps read it in {state.reads}, {in_bytes(state.shadow_bytes)} more memory" if state.reads else ""
    return Text(f"{number}  {rule}{state.reason}{shadow}{fresh}{where}")


def _label(state: StateReport, names: list[str]) -> str:
    return state.name if len(names) == 1 else f"{state.name} and {len(names) - 1} more"


def _plural(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"
