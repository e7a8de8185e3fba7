"""A report as text: a table, what is to be said of each line, and the words that stand in it."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence

from rich.box import Box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from kvbuffer_compile.report.state import StateReport
from kvbuffer_compile.report.whole import in_bytes

WIDTH = 100  # columns of the table
NAMES = 28  # columns of a state's name, at most, where it can be broken
FORMULA = (
    ("L*", "the flush length that moves the fewest bytes; the choice is by predicted time"),
    ("s", "bytes of one element of the state"),
    ("slot", "bytes of what one token adds to the rows of a head: keys, values, gates"),
)
LEGEND = (
    ("L", "flush length, the tokens between two writes of a state; 1 writes it at every token"),
    *FORMULA,
    ("gain", "predicted time of Inductor's step of this state, divided by ours"),
)
RULED = Box("    \n    \n -- \n    \n    \n    \n    \n    \n", ascii=True)  # one line under the header


def page(
    headline: str, calls: Sequence[str], notes: Sequence[str], groups: Sequence[tuple[StateReport, list[str]]]
) -> str:
    """The text. calls: about whole graphs. groups: states, each with the names of those that it stands for."""
    out = io.StringIO()
    console = Console(file=out, width=WIDTH, color_system=None, legacy_windows=False, emoji=False)
    console.print(Text(f"kvbuffer: {headline}"))
    for call in calls:
        console.print(Text(f"whole: {call}"))
    for note in notes:
        console.print(Text(f"note: {note}"))
    if groups:
        console.print(_table(groups))
        for number, (state, _) in enumerate(groups, 1):
            console.print(Padding(_details(number, state), (0, 0, 0, 1)))
        seen = [state.prediction for state, _ in groups if state.prediction]
        terms = LEGEND if any(p.choice for p in seen) else FORMULA if seen else ()
        console.print(Text("\n".join(f"{term}: {meaning}" for term, meaning in terms)))
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()).rstrip()


def _table(groups: Sequence[tuple[StateReport, list[str]]]) -> Table:
    table = Table(box=RULED, pad_edge=False, padding=(0, 1))
    table.add_column("#", justify="right")
    table.add_column("state", overflow="fold")
    for title in ("shape", "dtype", "status", "ops"):
        table.add_column(title, overflow="fold", max_width=22)
    numbers = [_numbers(state) for state, _ in groups]
    shown = [title for title in numbers[0] if any(found[title] for found in numbers)]
    for title in shown:
        table.add_column(title, justify="right", no_wrap=True)
    for number, ((state, names), found) in enumerate(zip(groups, numbers, strict=True), 1):
        about = ("x".join(map(str, state.shape)), state.dtype, state.status, state.signature or "-")
        cells = (str(number), _broken(label(state, names)), *about, *(found[title] or "-" for title in shown))
        table.add_row(*map(Text, cells))
    return table


def _numbers(state: StateReport) -> dict[str, str]:
    """The last columns, "" where there is nothing to say."""
    choice = state.prediction.choice if state.prediction else None
    return {
        "L": str(choice.flush) if choice else "",
        "rows": in_bytes(state.row_bytes) if state.row_bytes else "",
        "reads": state.reads,
        "gain": f"{choice.gain:.2f}x" if choice else "",
    }


def _broken(name: str) -> str:
    """A name in lines that end where a word of it does."""
    lines = [""]
    for word in re.findall(r"[.\[ ]?[^.\[ ]+", name):
        if lines[-1] and len(lines[-1] + word) > NAMES:
            lines.append("")
        lines[-1] += word
    return "\n".join(line.strip() for line in lines)


def _details(number: int, state: StateReport) -> Text:
    where = f" [{state.source}]" if state.source else ""
    rule = f"{state.rule}: " if state.rule else ""
    fresh = ""
    if state.fresh_tokens:
        fresh = f"; from zero the first {state.fresh_tokens} tokens read no state, {in_bytes(state.unread_bytes)} less"
    shadow = f"; steps read it in {state.reads}, {in_bytes(state.shadow_bytes)} more memory" if state.reads else ""
    return Text(f"{number}  {rule}{state.reason}{shadow}{fresh}{where}")


def label(state: StateReport, names: list[str]) -> str:
    """The name of a state, and of how many others."""
    return state.name if len(names) == 1 else f"{state.name} and {len(names) - 1} more"
