"""What has happened to a state at run time, for people.

A step notes nothing here. Steps are counted by the account anyway, and how often a kernel has flushed follows from
them: rows are folded in at a known count, then every L tokens. What breaks this rhythm (someone settles a state,
overwrites it, takes tokens back) is rare, dear by itself, and noted when it happens.
"""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kvbuffer_compile.process.callers import Site, warn_once
from kvbuffer_compile.process.surroundings import neutral

log = logging.getLogger("kvbuffer_compile")

Count = int | Tensor  # of a whole state, or of each slot of a pool
CAUSES = 8  # lines of code that are kept for each state
IN_A_ROW = 8  # steps, each with its rows folded in behind it, after which a loop is told that it gains nothing
ELSE = "or compile with options={'flush': 1}"


@dataclass
class Tally:
    """Counts of one state or of several. Of a pool, steps, flushes and folds are counted slot by slot.

    steps: calls that stepped it. flushes: folds inside of steps. settles: folds because someone else looked, by the
    line of code that did in `causes`, the latest last. exposed: folds after a step, because others hold the memory.
    folds: both kinds. fresh: steps that read no state, since there was none yet. rollbacks: calls that took tokens
    back. exact: False where flushes are an estimate, because tokens came several at a time or were taken back.
    """

    steps: Count = 0
    flushes: Count = 0
    folds: Count = 0
    fresh: Count = 0
    settles: int = 0
    exposed: int = 0
    overwrites: int = 0
    rollbacks: int = 0
    exact: bool = True
    causes: dict[str, int] = field(default_factory=dict)

    def add(self, other: Tally) -> None:
        """Count another's too."""
        self.steps = _sum(self.steps, other.steps)
        self.flushes = _sum(self.flushes, other.flushes)
        self.folds = _sum(self.folds, other.folds)
        self.fresh = _sum(self.fresh, other.fresh)
        self.settles += other.settles
        self.exposed += other.exposed
        self.overwrites += other.overwrites
        self.rollbacks += other.rollbacks
        self.exact = self.exact and other.exact
        for line, times in other.causes.items():
            self.caused(line, times)

    def caused(self, line: str, times: int = 1) -> None:
        """Remember who looked; of many, the last few."""
        self.causes[line] = self.causes.pop(line, 0) + times
        if len(self.causes) > CAUSES:
            del self.causes[next(iter(self.causes))]


@dataclass(frozen=True)
class Rhythm:
    """When the kernels of a state flush: first at `limit` rows, then every `flush` tokens, and whenever the slots of
    the buffer, `capacity`, would not do."""

    limit: int
    flush: int
    capacity: int

    def run(self, steps: Count, tokens: int) -> tuple[Count, Count, int]:
        """After so many steps of so many tokens: flushes, rows owed, and the steps before the first flush."""
        first = min(-(-self.limit // tokens), self.capacity // tokens)
        period = max(1, min(-(-self.flush // tokens), self.capacity // tokens))
        later = steps - first - 1  # steps after the one that flushed first
        if isinstance(later, int):
            flushed = max(0, later // period + 1)
            return flushed, tokens * (later % period + 1 if flushed else steps), first
        many = (later.div(period, rounding_mode="floor") + 1).clamp(min=0)
        return many, tokens * torch.where(many > 0, later % period + 1, steps), first


class History:
    """Of one account: the steps since it last owed nothing, its rhythm since then, and all that was before."""

    def __init__(self, cursor: Tensor, rhythm: Rhythm, single: bool) -> None:
        self.cursor = cursor
        self.single = single  # one token a step
        self.rhythm = rhythm
        self.before = Tally()
        self.start: Count = 0  # steps when the rhythm began
        self.zero = False  # whether the state was known to be zero then
        self.taken_back = 0
        self.disturbed = False
        self.exposed = 0  # steps after which the rows were folded in, since others hold the memory
        self._row: tuple[str, int] = ("", 0)  # who settled last, and how many times in a row after a single step

    @neutral
    def now(self, progress: tuple[Count, object, int], wait: bool) -> Tally:
        """The counts by an account's progress. wait: for the device, to know how many rows are owed."""
        steps, _, tokens = progress
        since, tokens = steps - self.start, max(1, tokens)
        if isinstance(since, int):
            since_quiet: Count = since - self.exposed
        else:
            since_quiet = since.clone() if not self.exposed else since * 0
        flushes, expected, first = self.rhythm.run(since_quiet, tokens)
        exact = self.single and not self.disturbed and self._as_expected(expected, wait)
        if self.disturbed:
            flushes = self.rhythm.run(_positive(since_quiet * tokens - self.taken_back), 1)[0]
        fresh = _at_most(since, first + 1) if self.zero else 0
        idle = isinstance(since, int) and since == 0
        found = Tally(steps, flushes, self.exposed, fresh, exposed=self.exposed, exact=exact or idle)
        found.add(self.before)
        return found

    def _as_expected(self, owed: Count, wait: bool) -> bool:
        """Whether so many rows are owed, where that can be known."""
        if self.cursor.numel() == 0 or not (wait or self.cursor.device.type == "cpu"):
            return True
        return max(0, int(self.cursor[0].max())) == (owed if isinstance(owed, int) else int(owed.max()))

    @neutral
    def begin(self, progress: tuple[Count, object, int], limit: int, zero: bool = False) -> Count:
        """A new rhythm: nothing is owed from here on. Gives the steps since the last time."""
        since = progress[0] - self.start
        counts = self.now(progress, wait=False)
        counts.steps = self.before.steps  # those of this account are counted by itself
        self.before = counts
        self.rhythm = Rhythm(limit, self.rhythm.flush, self.rhythm.capacity)
        self.start, self.zero = progress[0], zero
        self.taken_back = self.exposed = 0
        self.disturbed = False
        return since

    def overwritten(self, progress: tuple[Count, object, int], limit: int, zero: bool) -> None:
        """The rows were dropped, since the state was written as a whole."""
        since = self.begin(progress, limit, zero)
        self.before.overwrites += not isinstance(since, int) or since > 0

    def took_back(self, tokens: int) -> None:
        """So many tokens of every sequence will not be counted."""
        self.before.rollbacks += 1
        self.taken_back += tokens
        self.disturbed = True

    def rejected(self, tokens: int) -> None:
        """So many drafts of a tree were not accepted."""
        self.taken_back += tokens
        self.disturbed = True

    def settled(self, since: Count, why: str | None) -> None:
        """Somebody looked, and rows were folded in. since: the steps they are of. why: where no line of code did."""
        self.before.settles += 1
        self.before.folds = _sum(self.before.folds, _at_most(since, 1))
        site = Site.find() if why is None else None
        line = str(site) if site is not None else why or "code that cannot be told"
        self.before.caused(line)
        if log.isEnabledFor(logging.DEBUG):
            log.debug("settled a state after %s: %s", _steps(since), line)
        last, times = self._row
        times = times + 1 if isinstance(since, int) and since == 1 and last == line else 1
        self._row = line, times
        if times == IN_A_ROW and site is not None:
            warn_once(line, f"kvbuffer: {line} looks at a state after every step, so its rows are folded in each time "
                      f"and buffering it gains nothing; look less often, {ELSE}")  # fmt: skip

    def warn_of_sharing(self, shared: str | None) -> None:
        """Once, where rows are folded in behind every step. shared: who has the memory for ever; None: only for now."""
        if self.exposed + self.before.exposed >= IN_A_ROW:
            looked = f", last looked at by {next(reversed(self.before.causes))}" if self.before.causes else ""
            who = shared or f"an object that holds its storage (a NumPy array, say{looked})"
            warn_once(who, f"kvbuffer: the memory of a state is shared with {who}, so its rows are folded in after "
                      f"every step and buffering it gains nothing; step a clone() of it, {ELSE}")  # fmt: skip


def profiled(name: str) -> AbstractContextManager[Any]:
    """A named range while a profiler runs, nothing otherwise."""
    running = torch.autograd._profiler_enabled()  # type: ignore[attr-defined]
    return torch.autograd.profiler.record_function(name) if running else nullcontext()


def _steps(since: Count) -> str:
    if isinstance(since, Tensor):
        return "steps of some slots"
    return "1 step" if since == 1 else f"{since} steps"


def _positive(count: Count) -> Count:
    return max(count, 0) if isinstance(count, int) else count.clamp(min=0)


@neutral
def _sum(a: Count, b: Count) -> Count:
    """Counts of slots are summed up: other pools have others."""
    a, b = (x if isinstance(x, int) else x.sum() for x in (a, b))
    return a + b if isinstance(a, int) or isinstance(b, int) or a.device == b.device else int(a) + int(b)


@neutral
def _at_most(count: Count, most: int) -> Count:
    return min(count, most) if isinstance(count, int) else count.clamp(max=most)
