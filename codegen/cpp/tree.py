"""The item of a tree step: drafts that branch, one pass over the state for all queries that need no read.

As in a verify step, but what comes before a node is its path: its ancestors, newest first, then the owed rows. They are
gathered anew for each node, ancestors from `room`, because rows of the log that items share may not be there yet.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvbuffer_compile.codegen.cpp.log import fade_name
from kvbuffer_compile.codegen.cpp.values import FULL
from kvbuffer_compile.codegen.cpp.verify import VerifyItem
from kvbuffer_compile.ir.program import Kind, Var


class TreeItem(VerifyItem):
    """Prints `run_item` for a tree of T nodes, T known at run time."""

    # ------------------------------------------------------------------------------------ before the pass

    def _later(self, faded: Sequence[Kind]) -> None:
        """Each node begins where its parent ends."""

    def _later_of_token(self, faded: Sequence[Kind]) -> None:
        if faded:
            self.out.line("const int64_t parent = call.parent(sequence, t);")
        for kind in faded:
            path = f"room.path_{kind} + parent * {FULL[kind]}"
            self.out.line(f"const Real* const later_{kind} = parent < 0 ? {fade_name(kind)} : {path};")

    def _later_of_next(self, decays: Sequence[Var], faded: Sequence[Kind]) -> None:
        for kind in faded:
            parts = [f"later_{kind}[i]", *(f"{self.values.name(v)}[i]" for v in decays if v.kind == kind)]
            self.values.each(kind, f"room.path_{kind}[t * {FULL[kind]} + i] = {' * '.join(parts)};")

    # ------------------------------------------------------------------------------------------ each node

    def _before_token(self) -> None:
        self.rows.gather_path()

    def _after_token(self) -> None:
        """The node's logged values become rows of the nodes below it."""
        for v in self.plan.program.logged:
            if v.kind == "scalar":
                self.out.line(f"room.kept_{v}[t] = {self.values.name(v)};")
            else:
                self.values.each(v.kind, f"room.kept_{v}[t * {FULL[v.kind]} + i] = {self.values.name(v)}[i];")
