"""Owed rows in Triton: loading them, reading through them, storing new ones. (triton_fold folds them.)

A log keeps each token's decays as they were; what is left of an old row is the product of all later decays. Rows are
held newest first (age 0, 1, ...), CHUNK at a time, or all of them as they lie in memory, and the products are running
products over the gates one slot later: only products are formed, no ratio and no exp of a sum, so that gates of 0 and 1
and underflow are harmless. Slots that are not owed are never loaded: they may hold NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvbuffer_compile.codegen.schedule import Old
from kvbuffer_compile.codegen.triton.tiles.values import DTYPES, Python, Values, power_of_two
from kvbuffer_compile.ir.plan import Plan
from kvbuffer_compile.ir.program import Decay, Kind, Update, Var

CHUNK = 16  # rows held at once
LEAST = 16  # slots that products take


@dataclass(frozen=True)
class Order:
    """How slots are numbered in a tile of rows, as texts over `kept`: the name of the number, which slot it is and
    which one comes after it, where there is such a later one, where the oldest slot is, how products are scanned."""

    name: str
    here: str
    next: str
    later: str
    oldest: str
    scan: str


# Newest first, in chunks: products run on from one chunk to the next.
AGE = Order("age", "kept - 1 - age", "kept - age", "(age > 0) & used", "age % {slots} == {last}", "0")
# As they lie in memory: no address waits for the cursor, only masks do.
SLOT = Order("slot", "slot", "slot + 1", "slot + 1 < kept", "slot == 0", "0, reverse=True")


class Rows:
    """Prints the parts of a kernel that deal with the log: `owed` rows belong to the tile `s` of the state, and `kept`
    of them still do after a flush.

    fades: kinds of decays there are. updates: where among the events the updates are.
    """

    def __init__(self, out: Python, plan: Plan, values: Values) -> None:
        self.out, self.plan, self.values = out, plan, values
        self.events = plan.program.events
        self.fades: list[Kind] = sorted({e.factor.kind for e in self.events if isinstance(e, Decay)})
        self.updates = [n for n, e in enumerate(self.events) if isinstance(e, Update)]
        self.slots = min(CHUNK, power_of_two(plan.capacity))
        self.order = AGE
        self._late: list[str] | None = None  # where lines that use loaded rows are kept, if not printed at once
        self._asked = 0
        self.all_slots = max(LEAST, power_of_two(plan.capacity))

    def address(self, v: Var, slot: str, tile: bool) -> str:
        """Where row `slot` of v is; `slot` is a tensor of slots for a tile [slots(, K or V)]."""
        at = [f"sequence * row_{v}_{self.plan.program.lanes[0]}"] if self.plan.layout.sequence else []
        skip = 1 if self.plan.layout.sequence else 0
        at += [f"at_{lane} * row_{v}_{lane}" for lane in self.plan.program.lanes[skip:] if lane in v.lanes]
        vector = v.kind != "scalar"
        at += [f"{slot}{'[:, None]' if tile and vector else ''} * ROW_{v}_SLOT"]
        at += [f"{self.values.index[v.kind]}{'[None, :]' if tile else ''} * ROW_{v}_LAST"] if vector else []
        return " + ".join([f"row_{v}", *at])

    # ------------------------------------------------------------------------------------------- loading

    def through(self, body: Callable[[], None]) -> None:
        """Go through the kept rows: `body` prints what is done with each chunk of them.

        S = diag(fade) s + the sum over rows of left right^T, with the rows of update n in left_n and right_n, what
        scalar gates leave of them in weight_n, and zeros for rows that hold nothing. Afterwards fade_scalar, fade_key
        and fade_value are the product of all kept decays, by kind.
        """
        if self.slots == power_of_two(self.plan.capacity):
            self._chunk("0", self.slots, first=True)
            body()
        else:
            for kind in self.fades:
                self.out.line(f"carry_{kind} = {self.values.full(kind, '1.0')}")
            with self.out.block(f"for chunk in range((kept + {CHUNK - 1}) // {CHUNK})"):
                self._chunk(f"chunk * {CHUNK}", self.slots, first=False)
                body()
        for kind in self.fades:
            self._whole_fade(kind)

    def at_once(self, kinds: Sequence[Kind], order: Order = AGE, ahead: bool = False) -> list[str]:
        """All kept rows as one chunk, but only what runs along an axis of `kinds`; first with "scalar" among them.

        ahead: print the loads alone, and return the lines that are to follow: who streams has other things to ask for.
        """
        self.order, self._late = order, [] if ahead else None
        self._chunk("0", self.all_slots, first=True, kinds=kinds)
        for kind in self.fades:
            if kind in kinds:
                self._whole_fade(kind)
        late, self.order, self._late = self._late, AGE, None
        return late or []

    def _say(self, line: str) -> None:
        """A line that uses loaded rows."""
        self.out.line(line) if self._late is None else self._late.append(line)

    def _loaded(self, address: str, mask: str, other: int) -> str:
        """What is loaded, as a number to compute with."""
        text = f"tl.load({address}, mask={mask}, other={other}.0)"
        if self._late is not None:
            self._asked += 1
            self.out.line(f"raw_{self._asked} = {text}")
            text = f"raw_{self._asked}"
        return f"{text}.to({self.values.real})"

    def _whole_fade(self, kind: Kind) -> None:
        oldest = " * ".join(self._oldest(v) for v in self._factors(kind))
        self._say(f"fade_{kind} = carry_{kind} * {oldest}")

    def once_more(self, body: Callable[[], None]) -> None:
        """Go through the rows again, for queries that were not known before; a single chunk is still there."""
        if self.slots == power_of_two(self.plan.capacity):
            body()
        else:
            self.through(body)

    def _chunk(self, start: str, slots: int, first: bool, kinds: Sequence[Kind] = ("scalar", "key", "value")) -> None:
        if "scalar" in kinds:
            self.out.line(f"{self.order.name} = {'' if first else f'{start} + '}tl.arange(0, {slots})")
            self.out.line(f"used = {self.order.name} < kept")
            if self.fades:
                self.out.line(f"later = {self.order.later}")
        for kind in self.fades:
            if kind in kinds:
                self._fade(kind, slots, first)
        after: dict[Kind, str] = {}
        for place, event in reversed(list(enumerate(self.events))):
            if isinstance(event, Update):
                self._row(self.updates.index(place), event, after, slots, kinds)
            elif any(n < place for n in self.updates) and event.factor.kind in kinds:
                self._within(place, event.factor, after)

    def _factors(self, kind: Kind) -> list[Var]:
        return [e.factor for e in self.events if isinstance(e, Decay) and e.factor.kind == kind]

    def _fade(self, kind: Kind, slots: int, first: bool) -> None:
        """later_<kind>: what the decays of all later slots leave of a row; carry_<kind>: of the oldest row so far."""
        tiles = " * ".join(self._tile(v, self.order.next, "later", 1) for v in self._factors(kind))
        carry = "" if first else f" * carry_{kind}" + ("" if kind == "scalar" else "[None, :]")
        self._say(f"later_{kind} = tl.cumprod({tiles}, {self.order.scan}){carry}")
        oldest = self.order.oldest.format(slots=slots, last=slots - 1)
        oldest = oldest if kind == "scalar" else f"({oldest})[:, None]"
        self._say(f"carry_{kind} = tl.sum(tl.where({oldest}, later_{kind}, 0.0), 0)")

    def _oldest(self, v: Var) -> str:
        """The gate of slot 0, the oldest one; 1 when nothing is owed."""
        mask = self._some(v.kind)
        if v.kind != "scalar" and self.values.padded(v.kind):
            mask += f" & {self.values.ok(v.kind)}"
        return self._loaded(self.address(v, "0", False), mask, 1)

    def _some(self, kind: Kind) -> str:
        """Whether anything is owed; a tensor for vectors, as the interpreter cannot widen a single truth value."""
        return "kept > 0" if kind == "scalar" else "(tl.full([1], kept, tl.int32) > 0)"

    def _tile(self, v: Var, slot: str, rows: str, other: int) -> str:
        """The slots of v, newest first, as a tile [slots(, K or V)]; `other` where the mask `rows` is false."""
        mask = f"{rows}[:, None]" if v.kind != "scalar" else rows
        if v.kind != "scalar" and self.values.padded(v.kind):
            mask += f" & {self.values.ok(v.kind)}[None, :]"
        return self._loaded(self.address(v, f"({slot})", True), mask, other)

    def _within(self, place: int, v: Var, after: dict[Kind, str]) -> None:
        """The decays behind the updates that come next in this walk, within their own token."""
        before = f" * {after[v.kind]}" if v.kind in after else ""
        after[v.kind] = f"after_{place}"
        self._say(f"after_{place} = {self._tile(v, self.order.here, 'used', 1)}{before}")

    def _row(self, n: int, event: Update, after: dict[Kind, str], slots: int, kinds: Sequence[Kind]) -> None:
        sides: list[tuple[str, Var, Kind]] = [("left", event.left, "key"), ("right", event.right, "value")]
        for side, v, kind in (s for s in sides if s[2] in kinds):
            tile = self._tile(v, self.order.here, "used", 0)
            if v.kind == "scalar":
                tile = f"tl.broadcast_to({tile}[:, None], [{slots}, {self.values.length(kind)}])"
            gates = [after[kind]] if kind in after else []
            gates += [f"later_{kind}"] if kind in self.fades else []
            self._say(f"{side}_{n} = " + " * ".join([tile, *gates]))
        if "scalar" in self.fades and "scalar" in kinds:
            gates = [after["scalar"]] if "scalar" in after else []
            self._say(f"weight_{n} = {' * '.join([*gates, 'later_scalar'])}")

    def side(self, n: int, side: str) -> Var:
        """One side of update n, "left" or "right"."""
        event = self.events[self.updates[n]]
        assert isinstance(event, Update)
        return event.left if side == "left" else event.right

    # ------------------------------------------------------------------------------------------- reading

    def read(self, read: Old, query: str) -> None:
        """read.out = the state at the start of the step, read with the vector `query`."""
        out = self.values.name(read.out)
        self.out.line(f"{out} = {self.values.full(read.out.kind, '0.0')}")
        self.once_more(lambda: self.add_rows(out, read, query))
        self.add_base(read, query)

    def add_rows(self, out: str, read: Old, query: str) -> None:
        """out += the part of a read that a chunk of rows makes."""
        for n in range(len(self.updates)):
            weight = f" * weight_{n}" if "scalar" in self.fades else ""
            self.add(out, query, read.x.kind, f"left_{n}", f"right_{n}", weight)

    def add_base(self, read: Old, query: str) -> None:
        """read.out += the part that `s` makes."""
        x, values = read.x, self.values
        faded = f"({query} * fade_{x.kind})" if x.kind in self.fades else query
        text = values.total(f"s * {faded}{values.across(x.kind)}", x.kind, 0 if x.kind == "key" else 1, 2)
        gates: list[Kind] = ["scalar", read.out.kind]
        factors = [f"fade_{k}" for k in gates if k in self.fades]
        self.out.line(f"{values.name(read.out)} += " + " * ".join([text, *factors]))

    def add(self, out: str, query: str, kind: Kind, left: str, right: str, weight: str = "") -> None:
        """out += what a tile of rows adds to a read."""
        met, free = (left, right) if kind == "key" else (right, left)
        dot = self.values.total(f"{met} * {query}[None, :]", kind, 1, 2)
        self.out.line(f"dot = {dot}{weight}")
        self.out.line(f"{out} += tl.sum(dot[:, None] * {free}, 0)")

    # ------------------------------------------------------------------------------------------- storing

    def store(self, v: Var, slot: str) -> None:
        """One logged value into a slot."""
        mask = self.values.mask(v.kind) if v.kind != "scalar" else ""
        dtype = DTYPES[self.plan.row_dtypes[self.plan.program.logged.index(v)]]
        self.out.line(f"tl.store({self.address(v, slot, False)}, {self.values.name(v)}.to({dtype}){mask})")
