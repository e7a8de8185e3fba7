"""What was found in a function, and what was decided: for people (text, HTML, plot) and for programs (dict)."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from kvbuffer_compile.report import html, text
from kvbuffer_compile.report import plot as report_plot
from kvbuffer_compile.report.state import StateReport, Status
from kvbuffer_compile.report.whole import WholeCall

STATUSES: tuple[Status, ...] = ("buffered", "recurrent", "declined")  # of matrix states; kept is what is none


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
        return text.page(self.headline, [*map(str, self.calls)], self.notes, self.groups())

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
            html.page(self.headline, [*map(str, self.calls)], self.notes, groups, text.LEGEND), encoding="utf-8"
        )

    def plot(self, path: str | Path) -> None:
        """Draw bytes and predicted time per step against the flush length; the ending of `path` picks the format.

        ImportError without matplotlib; ValueError when no state has a prediction.
        """
        curves = [(text.label(first, names), first.prediction) for first, names in self.groups() if first.prediction]
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


def _plural(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"
