"""What has happened to states at run time: stats(obj), for people (a table) and for programs (a dict)."""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from kvbuffer_compile.accounts.account import Account
from kvbuffer_compile.accounts.history import Count, Tally
from kvbuffer_compile.accounts.ledger import LEDGER
from kvbuffer_compile.guard.guarded import plain_calls
from kvbuffer_compile.report.whole import in_bytes
from kvbuffer_compile.runtime.by_hand import accounts_of, check_holder, rowless_in

WIDTH = 110  # columns of the table


@dataclass(frozen=True)
class StateStats:
    """One state that is stepped with rows, or a pool of states: its steps, flushes and folds are counted slot by slot.

    steps: calls that stepped it (of several tokens each, maybe). flushes: steps that folded the rows in and wrote the
    state; an estimate where `exact` is False, because tokens came several at a time or were taken back. settles: folds
    because somebody else looked at the state; `settled_by` has the lines of code that did, as {"file:line": times},
    the latest last. overwrites: rows that were dropped, since the state was written as a whole. rollbacks: calls that
    took tokens back. folded_after: steps after which the rows were folded in at once, because others hold the memory
    (`shared` says who, when that is for ever). bytes_not_written, bytes_not_read: of the state, against a kernel that
    reads and writes all of it at every step; below zero when settling has cost more. owed: rows now. row_bytes: memory
    of rows and cursor. shadow_bytes: memory of the 16-bit copy that is read in the state's place, 0 for none.
    """

    shape: tuple[int, ...]
    dtype: str
    device: str
    signature: str
    flush: int
    steps: int
    flushes: int
    exact: bool
    settles: int
    settled_by: dict[str, int]
    overwrites: int
    rollbacks: int
    folded_after: int
    bytes_not_written: int
    bytes_not_read: int
    owed: int
    row_bytes: int
    shadow_bytes: int
    shared: str | None


@dataclass(frozen=True)
class Stats:
    """Of the states that were asked for. rowless: how many of them are stepped without rows (flush length 1), of which
    nothing is counted. gone: counts of states that are no more, only where everything was asked for."""

    states: tuple[StateStats, ...]
    rowless: int = 0
    gone: dict[str, int] | None = None

    def total(self, name: str) -> int:
        """The sum of a count or a number of bytes over the states that are there. name: a field of StateStats."""
        return sum(int(getattr(state, name)) for state in self.states)

    @property
    def settled_by(self) -> dict[str, int]:
        """The lines of code that had rows folded in, and how many times, the most frequent first."""
        lines: dict[str, int] = {}
        for state in self.states:
            for line, times in state.settled_by.items():
                lines[line] = lines.get(line, 0) + times
        return dict(sorted(lines.items(), key=lambda item: -item[1]))

    def to_dict(self) -> dict[str, Any]:
        """Numbers, strings, lists and dicts only, ready for json.dump."""
        states = [{**asdict(s), "shape": list(s.shape)} for s in self.states]
        totals = {name: self.total(name) for name in TOTALS}
        return {"totals": totals, "settled_by": self.settled_by, "states": states, "rowless": self.rowless,
                "gone": self.gone}  # fmt: skip

    def __str__(self) -> str:
        return _text(self)


LEGEND = (
    ("L", "flush length, the tokens between two writes of a state; of several states in a row, all but steps are sums"),
    ("settles", "times that rows were folded in because something else than a step came to the state; below, what did"),
    ("owed", "rows that wait in the buffer now; rows: memory of the buffer"),
    ("not written, not read", "of states, against doing both at every step; below zero: settling cost more"),
    ("~", "an estimate: tokens came several at a time, or were taken back"),
)
TOTALS = ("steps", "flushes", "settles", "overwrites", "rollbacks", "bytes_not_written", "bytes_not_read", "row_bytes",
          "shadow_bytes")  # fmt: skip


def stats(obj: Any = None) -> Stats:
    """What has happened at run time to the buffered states of obj: a tensor, a cache, a module or a container; None for
    all there are.

    Nothing is counted for it while decoding: it is told from counts that steps need themselves. Waits for the device.
    ValueError for what can hold no state: a function, a string or a number.
    """
    check_holder(obj, "stats(obj)")
    with plain_calls():
        accounts = list(LEDGER.accounts.values()) if obj is None else accounts_of(obj)
        found = tuple(_state(account) for account in accounts)
        gone = _gone(LEDGER.gone) if obj is None else None
        return Stats(found, rowless_in(obj), gone)


def _state(account: Account) -> StateStats:
    tally = account.tally()
    plan, state = account.plan, account.state
    size = prod(state.shape) * state.element_size()
    size = size // max(1, account.cursor.shape[1]) if plan.slots else size
    steps, flushes, folds, fresh = map(_number, (tally.steps, tally.flushes, tally.folds, tally.fresh))
    return StateStats(
        shape=tuple(state.shape),
        dtype=str(state.dtype).removeprefix("torch."),
        device=str(state.device),
        signature=plan.program.signature,
        flush=plan.flush,
        steps=steps,
        flushes=flushes,
        exact=tally.exact,
        settles=tally.settles,
        settled_by=dict(tally.causes),
        overwrites=tally.overwrites,
        rollbacks=tally.rollbacks,
        folded_after=tally.exposed,
        bytes_not_written=(steps - flushes - folds) * size,
        bytes_not_read=(fresh - folds) * size,
        owed=max(0, int(account.cursor[0].max())) if account.cursor.numel() else 0,
        row_bytes=account.row_bytes,
        shadow_bytes=account.shadow_bytes,
        shared=account.shared,
    )


def _gone(tally: Tally) -> dict[str, int]:
    return {
        "steps": _number(tally.steps), "flushes": _number(tally.flushes), "settles": tally.settles,
        "overwrites": tally.overwrites, "rollbacks": tally.rollbacks,
    }  # fmt: skip


def _number(count: Count) -> int:
    return int(count.sum()) if isinstance(count, Tensor) else count


# --------------------------------------------------------------------------------------------------- text


def _text(found: Stats) -> str:
    out = io.StringIO()
    console = Console(file=out, width=WIDTH, color_system=None, legacy_windows=False, emoji=False)
    console.print(Text(f"kvbuffer: {len(found.states)} buffered state{'s' * (len(found.states) != 1)}"))
    if found.states:
        console.print(_table(found.states))
    elif not found.rowless and found.gone is None:
        console.print(Text("nothing in this object is stepped with rows: states are in what a step is called with, a "
                           "cache say; stats() has all, and explain(fn, *args) says why one is declined"))  # fmt: skip
    if after := found.total("folded_after"):
        console.print(Text(f"folded in behind a step, since others held the memory: {after} times"))
    if shadows := found.total("shadow_bytes"):
        console.print(Text(f"copies that steps read in the states' place: {in_bytes(shadows)}"))
    for line, times in found.settled_by.items():
        console.print(Text(f"settled {'once' if times == 1 else f'{times} times'}: {line}"))
    for why in dict.fromkeys(s.shared for s in found.states if s.shared):
        console.print(Text(f"folded in after every step, the memory is shared with {why}"))
    if found.rowless:
        console.print(Text(f"{found.rowless} more stepped without rows (L = 1): nothing is counted of them"))
    if found.gone and found.gone["steps"]:
        gone = ", ".join(f"{count} {name}" for name, count in found.gone.items() if count)
        console.print(Text(f"of states that are gone: {gone}"))
    if found.states:
        shown = LEGEND if any(not s.exact for s in found.states) else LEGEND[:-1]
        console.print(Text("\n".join(f"{term}: {meaning}" for term, meaning in shown)))
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()).rstrip()


def _table(states: Iterable[StateStats]) -> Table:
    """States of one kind with the same steps in one line: flushes and the rest are sums."""
    kinds: dict[tuple[Any, ...], list[StateStats]] = {}
    for s in states:
        kinds.setdefault((s.shape, s.dtype, s.signature, s.flush, s.steps), []).append(s)
    table = Table(box=None, pad_edge=False, padding=(0, 1))
    table.add_column("states")
    for title in ("L", "steps", "flushes", "settles", "rollbacks", "owed", "rows", "not written", "not read"):
        table.add_column(title, justify="right", no_wrap=True)
    for (shape, dtype, signature, flush, steps), members in kinds.items():
        name = f"{'x'.join(map(str, shape))} {dtype} {signature}"
        about = "" if all(s.exact for s in members) else "~"
        sums = Stats(tuple(members)).total
        table.add_row(
            name if len(members) == 1 else f"{len(members)} of {name}", str(flush), str(steps),
            f"{about}{sums('flushes')}", str(sums("settles")), str(sums("rollbacks")), str(sums("owed")),
            in_bytes(sums("row_bytes")), in_bytes(sums("bytes_not_written")), in_bytes(sums("bytes_not_read")),
        )  # fmt: skip
    return table
