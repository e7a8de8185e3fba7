"""The nodes of a tree step: a verify step in which a node sees those above it instead of all that come before it.

As in verify.py the state is read once and the rows of the nodes stay in registers; no node waits for what another has
stored. What is different is the order: parents come first, so the nodes of a path are in order of their numbers, and
what lies between two of them is a running product in which other branches count as 1.

above                          for each node a number whose bits are the nodes above it
path_<kind>                    what the decays from the root down to each node leave, its own among them
now_<kind>                     the same for the parent of node t: what is left of the state and of the owed rows
shown                          whether a node is above node t
fresh_left_n, fresh_right_n    the rows of the nodes so far, as they were made
fresh_gate_<kind>              the decays of the nodes so far, each in the place before its node
fresh_after_<kind>             what the decays below a node leave on the way to node t
"""

from __future__ import annotations

from contextlib import nullcontext

from kvbuffer_compile.codegen.schedule import Old
from kvbuffer_compile.codegen.triton.tiles.values import AXES
from kvbuffer_compile.codegen.triton.verify import SIDES, Fresh
from kvbuffer_compile.ir.program import Kind

NODES = 64  # of a tree: as many as `above` has bits


class Branches(Fresh):
    """Prints the parts of the loop over nodes that deal with what the nodes above have left."""

    # ---------------------------------------------------------------------------------------- which are above

    def ask(self) -> None:
        self.out.line("token = tl.arange(0, TOKENS)")
        lanes = self.plan.program.lanes
        at = f" + at_{lanes[0]} * parents_sequence" if self.plan.layout.sequence else ""
        self.out.line(f"over = tl.load(parents{at} + token * parents_t, mask=token < T, other=-1)")

    def number(self) -> None:
        """Each node takes over what is above the one it looks at, `over`, and looks at what that one looks at."""
        one = "tl.full([TOKENS], 1, tl.int32 if TOKENS <= 32 else tl.int64)"
        self.out.line(f"above = tl.where(over < 0, 0, {one} << tl.maximum(over, 0))")
        with self.out.block(f"for jump in tl.static_range({(NODES - 1).bit_length()})"):
            with self.out.block("if TOKENS > 2**jump"):
                self.out.line("higher = tl.gather(above, tl.maximum(over, 0), 0)")
                self.out.line("above = above | tl.where(over < 0, 0, higher)")
                self.out.line("over = tl.where(over < 0, -1, tl.gather(over, tl.maximum(over, 0), 0))")

    def _find_path(self) -> None:
        self.out.line("path = tl.sum(tl.where(token == t, above, 0), 0)")

    # ------------------------------------------------------------------------------------------------- decays

    def start_fading(self) -> None:
        self._ones("path")

    def follow(self) -> None:
        if any(self.factors.values()):
            self._find_path()
            self._begin_with_parent()

    def _begin_with_parent(self) -> None:
        """The parent is the last node of the path."""
        for kind, v in self.factors.items():
            if v:
                of_parent = f"tl.where({self._each('(path >> token) == 1', kind)}, path_{kind}, 0.0)"
                self.out.line(f"now_{kind} = tl.sum({of_parent}, 0) + (path == 0).to({self.values.real})")

    def fade_on(self) -> None:
        self._insert_decays("path", "now_{kind} * ", "token == t")

    def _ones(self, name: str) -> None:
        for kind, v in self.factors.items():
            if v:
                sizes = "[TOKENS]" if kind == "scalar" else f"[TOKENS, {self.values.length(kind)}]"
                self.out.line(f"{name}_{kind} = tl.full({sizes}, 1.0, {self.values.real})")

    def _insert_decays(self, name: str, factor: str, place: str) -> None:
        for kind, v in self.factors.items():
            if v:
                row = f"({factor.format(kind=kind)}{self.values.name(v)})" + ("[None, :]" if kind != "scalar" else "")
                self.out.line(f"{name}_{kind} = tl.where({self._each(place, kind)}, {row}, {name}_{kind})")

    def _each(self, condition: str, kind: Kind) -> str:
        """A condition on nodes as a mask of a tile of this kind."""
        return condition if kind == "scalar" else f"({condition})[:, None]"

    # -------------------------------------------------------------------------------------------- fresh rows

    def start(self) -> None:
        self._start_rows()
        self._ones("fresh_gate")
        self.start_fading()

    def meet(self) -> None:
        self._find_path()
        self._begin_with_parent()
        self.out.line("shown = ((path >> token) & 1) > 0")
        if any(self.factors.values()):
            self.out.line("behind = ((path >> token) & 2) > 0")
        for kind, v in self.factors.items():
            if v:
                gates = f"tl.where({self._each('behind', kind)}, fresh_gate_{kind}, 1.0)"
                self.out.line(f"fresh_after_{kind} = tl.cumprod({gates}, 0, reverse=True)")

    def _add_fresh(self, out: str, read: Old, n: int) -> None:
        kind = read.x.kind
        other: Kind = "value" if kind == "key" else "key"
        gram = self.matrix if self.matrix and n in self.matrix.grams else None
        if gram:
            with self.out.block("if MATRIX"):
                self.out.line(f"dot = {gram.gram(read, n)}")
        with self.unless_matrix("else") if gram else nullcontext():
            met = f"{self._faded(kind, n)} * {self.values.name(read.x)}[None, :]"
            self.out.line(f"dot = {self.values.total(met, kind, 1, 2)}")
        weighted = "(dot * fresh_after_scalar)" if self.fold.scalar else "dot"
        part = f"tl.where(shown[:, None], {weighted}[:, None] * {self._faded(other, n)}, 0.0)"
        self.out.line(f"{out} += tl.sum({part}, 0)")

    def _faded(self, kind: Kind, n: int) -> str:
        """One side of the n-th rows as node t sees it, but for scalar decays."""
        after = f" * fresh_after_{kind}" if self.factors.get(kind) else ""
        return f"fresh_{SIDES[kind]}_{n}{after}"

    def append(self) -> None:
        self.fade_on()
        for n, row in enumerate(self.seen):
            for kind, v in zip(AXES, row, strict=True):
                self._insert(kind, n, [], self.values.name(v))
        self._insert_decays("fresh_gate", "", "token == t - 1")
