"""Who writes what several programs of one launch share.

The programs of a launch run in any order. What they share may be written only when all of them have read the old
content: the cursor of a sequence, and, in a step that flushes, slot 0 of the rows that several tiles or lanes read.
So each program takes a ticket of its group once it has read them; the one that takes the last ticket writes.
Groups nest: the last of a group takes a ticket of the next larger one, and the last of a sequence writes the cursor.

Steps on slots of a pool have entries, the sequences of the call: operands and outputs are theirs. What lies in the pool
(state, cursor, rows, tickets) is found by the slot, `sequence`. Of entries with equal slots each reads the slot as it
was, and the last one is stored: programs of the others store nothing but outputs, and take a ticket when they have read
the slot; those of the last wait for these tickets before they overwrite what is read. A program only waits for programs
with smaller numbers, which GPUs start first: scans in one pass count on the same (CUB's decoupled look-back, Merrill
and Garland, NVIDIA NVR-2016-002). Where all slots differ nobody waits. Going through the step once more for the last
entry, in whichever program comes last, needs no such order, but with a loop around it a step of GDN took 255 registers
instead of 134 and was predicted at 162 us instead of 104.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from kvbuffer_compile.codegen.triton.tiles.values import Python, Values
from kvbuffer_compile.errors import EmitError
from kvbuffer_compile.ir.plan import Plan
from kvbuffer_compile.ir.program import Map, Read, Var, operands

ARRIVE = '''@triton.jit
def arrive(ticket, expected):
    """Whether this is the last of `expected` programs to come here. The ticket is then zero for the next launch.

    What others may overwrite has been read and used by then, so no order of memory has to be enforced.
    """
    tl.debug_barrier()
    last = tl.atomic_add(ticket, 1, sem="relaxed") == expected - 1
    if last:
        tl.store(ticket, 0)
    return last'''


@dataclass(frozen=True)
class Group:
    """The programs of a sequence that agree on `lanes` (among them "tile"), and the logged values they share."""

    lanes: tuple[str, ...]
    shared: tuple[Var, ...]


class Tickets:
    """The groups of a plan's kernel, finest first; the last one is the whole sequence.

    lanes: the lanes of one sequence. everything: the same and the tiles, if there are any.
    """

    def __init__(self, plan: Plan, values: Values) -> None:
        self.plan, self.values = plan, values
        self.lanes = plan.program.lanes[1:] if plan.layout.sequence else plan.program.lanes
        self.everything = (*self.lanes, *(("tile",) if values.split else ()))
        sharing: dict[tuple[str, ...], list[Var]] = {}
        for v in plan.program.logged:
            if not self.owned(v):
                sharing.setdefault(self.along(v), []).append(v)
        sharing.setdefault((), [])
        self.groups = tuple(Group(x, tuple(sharing[x])) for x in sorted(sharing, key=lambda x: (-len(x), x)))
        self._check()

    def along(self, v: Var) -> tuple[str, ...]:
        """The lanes, tiles among them, along which a row varies within a sequence."""
        return tuple(x for x in self.everything if x in v.lanes or (x == "tile" and v.kind == self.values.split))

    def owned(self, v: Var) -> bool:
        """Whether the program that writes a row is the only one to read it."""
        return self.along(v) == self.everything

    def feeder(self, group: Group) -> Group | None:
        """The smallest group whose last program takes this group's ticket; None when every program does."""
        finer = [g for g in self.groups if set(g.lanes) > set(group.lanes)]
        return min(finer, key=lambda g: len(g.lanes), default=None)

    def fed_by(self, group: Group | None) -> list[Group]:
        return [g for g in self.groups if self.feeder(g) == group]

    def expected(self, group: Group) -> str:
        """How many tickets of a group are taken in one launch."""
        feeder = self.feeder(group)
        lanes = feeder.lanes if feeder else self.everything
        return self._product([x for x in lanes if x not in group.lanes])

    def ticket(self, group: Group) -> str:
        """The address of this program's ticket."""
        place = self._place(group.lanes)
        before = self._counts(self.groups[self.groups.index(group) + 1 :])
        parts = ["tickets", "sequence * tickets_sequence", *before, *([place] if place else [])]
        return " + ".join(parts)

    def of_slot(self) -> str:
        """The address of the ticket that equal slots of a pool share (see Pool), behind those of the groups. Steps
        without a log share nothing else, so each part of a state has one of its own."""
        parts = ["tickets", "sequence * tickets_sequence", *self._counts(self._counting)]
        if self.plan.variant == "recurrent":
            parts.append(self._place(self.everything) or "0")
        return " + ".join(parts)

    def of_entry(self) -> str:
        """How many programs of an entry take such a ticket."""
        return "1" if self.plan.variant == "recurrent" else self._product([*self.everything])

    def count(self) -> str:
        """How many tickets a sequence has."""
        slot = self._product([*self.everything]) if self.plan.variant == "recurrent" else "1"
        return " + ".join([*self._counts(self._counting), *([slot] if self.plan.slots else [])])

    @property
    def _counting(self) -> tuple[Group, ...]:
        """The groups that take tickets."""
        return () if self.plan.variant == "recurrent" else self.groups

    def _counts(self, groups: tuple[Group, ...]) -> list[str]:
        """How many tickets these have, the largest group's first, as they lie in memory."""
        return [self._product([*group.lanes]) for group in reversed(groups)]

    def _place(self, lanes: tuple[str, ...]) -> str:
        """This program's number among those that differ along lanes; "" for none."""
        place = ""
        for lane in lanes:
            mine = "tile" if lane == "tile" else f"at_{lane}"
            place = f"({place}) * {self._size(lane)} + {mine}" if place else mine
        return place

    def _product(self, lanes: list[str]) -> str:
        return " * ".join(self._size(x) for x in lanes) or "1"

    def _size(self, lane: str) -> str:
        return "TILES" if lane == "tile" else f"size_{lane}"

    def _check(self) -> None:
        """The last program of a group writes what it alone computed, so no shared row may depend on a read."""
        program = self.plan.program
        read: set[Var] = set()
        for op in program.ops:
            if isinstance(op, Read) or (isinstance(op, Map) and read.intersection(operands(op))):
                read.add(op.out)
        bad = [v for group in self.groups for v in group.shared if v in read]
        if bad:
            raise EmitError(f"{bad[0]} depends on a read of the state but is shared by programs\n{program}")


CHOSEN = '''@triton.jit
def slot_of(given, pool):
    """A slot as a number from 0; negative ones count from the end of a pool of so many."""
    given = given.to(tl.int32)
    return tl.where(given < 0, given + pool, given)


@triton.jit
def rivals(slots, stride, entries, pool, slot, entry, ENTRIES: tl.constexpr):
    """Of the other entries with this slot, how many come before, and whether none comes after.

    Two counts in one sum, as warps wait for each other once: there are fewer than 2**15 entries.
    """
    other = tl.arange(0, ENTRIES)
    there = other < entries
    theirs = slot_of(tl.load(slots + other * stride, mask=there, other=0), pool)
    weight = tl.where(other < entry, 1, tl.where(other > entry, 65536, 0))
    total = tl.sum(tl.where(there & (theirs == slot), weight, 0), 0)
    return total & 65535, total < 65536


@triton.jit
def leave(ticket):
    """This program has read what the last entry of its slot overwrites."""
    tl.debug_barrier()
    tl.atomic_add(ticket, 1, sem="release")


@triton.jit
def wait(ticket, expected):
    """Until `expected` programs have left."""
    seen = tl.atomic_add(ticket, 0, sem="acquire")
    while seen < expected:
        seen = tl.atomic_add(ticket, 0, sem="acquire")
    tl.debug_barrier()'''


class Pool:
    """Prints where a program is, and the parts of a kernel that a pool needs; for a plan without one nothing else.

    earlier: how many entries with the same slot come before this one. writes: whether none comes after it.
    """

    def __init__(self, out: Python, plan: Plan, tickets: Tickets) -> None:
        self.out, self.plan, self.tickets = out, plan, tickets
        self.there = plan.slots
        if self.there and not plan.layout.sequence:
            raise EmitError(f"no Triton kernel for a pool whose slots are no sequences\n{plan.program}")

    def place(self) -> None:
        """at_<lane>, lane (all lanes as one number) and tile: what a program is about; sequence, its entry's slot."""
        self.out.line("program = tl.program_id(0)")
        self.out.line("tile = program % TILES")
        self.out.line("lane = (program // TILES).to(tl.int64)")
        rest = "lane"
        for name in reversed(self.plan.program.lanes[1:]):
            self.out.line(f"at_{name} = {rest} % size_{name}")
            rest = f"{rest} // size_{name}"
        if self.plan.program.lanes:
            self.out.line(f"at_{self.plan.program.lanes[0]} = {rest}")
        if self.there:
            entry = f"at_{self.plan.program.lanes[0]}"
            self.out.line(f"chosen = slot_of(tl.load(slots + {entry} * slots_entry), pool)")
            self.out.line('tl.device_assert((chosen >= 0) & (chosen < pool), "a slot is out of range for the pool")')
            self.out.line("sequence = chosen.to(tl.int64)")

    def compare(self) -> None:
        """Look at the slots of the other entries."""
        if self.there:
            first = self.plan.program.lanes[0]
            given = f"slots, slots_entry, size_{first}, pool, chosen, at_{first}.to(tl.int32), ENTRIES"
            self.out.line(f"earlier, writes = rivals({given})")

    def writers(self, condition: str) -> str:
        """A condition, for programs that store in the pool."""
        return f"({condition}) & writes" if self.there else condition

    def storing(self) -> AbstractContextManager[None]:
        """A block for what is stored in the pool."""
        return self.out.block("if writes") if self.there else nullcontext()

    def wait(self, condition: str = "", reset: bool = False) -> None:
        """Before what others read is overwritten, if a condition holds. reset: nobody waits behind this."""
        if self.there:
            found = f"({condition}) & (earlier > 0)" if condition else "earlier > 0"
            with self.out.block(f"if {found}"):
                self.out.line(f"wait({self.tickets.of_slot()}, earlier * {self.tickets.of_entry()})")
                if reset:
                    self.out.line(f"tl.store({self.tickets.of_slot()}, 0)")

    def leave(self) -> None:
        """A program that stores nothing has done what it does."""
        if self.there:
            with self.out.block("if writes == 0"):
                self.out.line(f"leave({self.tickets.of_slot()})")
