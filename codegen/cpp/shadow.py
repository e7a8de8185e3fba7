"""Shadows in C++: which block a pass reads, what is scaled behind it, and when a shadow is made anew.

One item, a lane or a tile of one, decides for itself: it has the scales of all that it holds, for lanes are cut along
the axis that reads leave free, and that is the one along which a shadow has its scales.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from kvbuffer_compile.codegen.cpp.log import axes
from kvbuffer_compile.codegen.cpp.values import FULL, Values
from kvbuffer_compile.codegen.source import Source
from kvbuffer_compile.ir.plan import Plan
from kvbuffer_compile.ir.program import Kind
from kvbuffer_compile.ir.shadow import scale_kind

Printer = Callable[[str, str], None]  # of a pass over a block of elements: their type, and the block


class Shadow:
    """Prints the parts of an item that deal with the shadow of its block; nothing where the plan has none."""

    def __init__(self, out: Source, plan: Plan, values: Values) -> None:
        self.out, self.plan, self.values = out, plan, values
        self.there = plan.shadowed
        self.kind: Kind = scale_kind(plan.program) or "value"
        self.outer, self.inner = axes(plan)

    def declare(self, first: bool) -> None:
        """`half`, the block's shadow, its scales, and `shadow`: what is to be done with it. first: the piece that
        flushes, and makes it."""
        if not self.there:
            return
        split = self.values.split
        offset = f" + first * call.shadow_{split}" if split else ""
        sizes = f"{self.values.length(self.outer)}, {self.values.length(self.inner)}"
        self.out.line(
            f"const Block<Half> half{{call.shadow + call.shadow_at(at){offset}, call.shadow_{self.outer}, "
            f"call.shadow_{self.inner}, {sizes}, false}};"
        )
        begin = "call.scale_begin[at[0]] + " if self.plan.slots else ""
        start = f" + {self.values.start(self.kind)}"
        self.out.line(f"Real* const scale = static_cast<Real*>(call.scale.data) + {begin}call.scale.at(at){start};")
        self.out.line(f"Shadowed shadow(scale, {self.values.length(self.kind)}, flush, block.bare);")
        if not first:
            self.out.line("shadow.make = false;")

    def read(self, results: Iterable[tuple[str, str]], read: Printer) -> None:
        """A pass that reads, over the base or over its shadow.

        results: names of what is read, each with how many there are where that is not one.
        """
        if not self.there:
            read("State", "block")
            return
        with self.out.block("if (shadow.exact)"):
            read("State", "block")
        with self.out.block("else"):
            read("Half", "half")
            for name, count in results:
                self._scale(name, count)

    def make(self) -> None:
        """Behind the first pass over the base, which has it as a flush leaves it."""
        if self.there:
            per_row = str(self.kind == self.outer).lower()
            self.out.line(f"if (shadow.make) shade<{per_row}>(block, half, scale);")

    def _scale(self, name: str, count: str) -> None:
        length, full = self.values.length(self.kind), FULL[self.kind]
        if not count:
            self.values.each(self.kind, f"{name}[i] *= scale[i];")
            return
        with self.out.block(f"for (int64_t n = 0; n < {count}; ++n)"):
            self.out.line(f"for (int64_t i = 0; i < {length}; ++i) {name}[n * {full} + i] *= scale[i];")
