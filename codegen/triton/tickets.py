"""Who writes what several programs of one launch share.

The programs of a launch run in any order. What they share may be written only when all of them have read the old
content: the cursor of a sequence, and, in a step that flushes, slot 0 of the rows that several tiles or lanes read.
So each program takes a ticket of its group once it has read them; the one that takes the last ticket writes.
Groups nest: the last of a group takes a ticket of the next larger one, and the last of a sequence writes the cursor.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvbuffer_compile.codegen.triton.values import Python, Values
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
        place = ""
        for lane in group.lanes:
            mine = "tile" if lane == "tile" else f"at_{lane}"
            place = f"({place}) * {self._size(lane)} + {mine}" if place else mine
        parts = ["tickets", "sequence * tickets_sequence", *self._before(group), *([place] if place else [])]
        return " + ".join(parts)

    def count(self) -> str:
        """How many tickets a sequence has."""
        return " + ".join(self._product(list(group.lanes)) for group in reversed(self.groups))

    def _before(self, group: Group) -> list[str]:
        index = self.groups.index(group)
        return [self._product(list(g.lanes)) for g in reversed(self.groups[index + 1 :])]

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


def place(out: Python, plan: Plan) -> None:
    """at_<lane>, lane (all lanes as one number) and tile: what this program is about."""
    out.line("program = tl.program_id(0)")
    out.line("tile = program % TILES")
    out.line("lane = (program // TILES).to(tl.int64)")
    rest = "lane"
    for name in reversed(plan.program.lanes[1:]):
        out.line(f"at_{name} = {rest} % size_{name}")
        rest = f"{rest} // size_{name}"
    if plan.program.lanes:
        out.line(f"at_{plan.program.lanes[0]} = {rest}")
