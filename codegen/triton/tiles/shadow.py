"""The shadow of a tile in Triton: a copy in half precision that a program reads in the tile's place."""

from __future__ import annotations

from kvbuffer_compile.codegen.triton.tiles.values import DTYPES, Python, Values
from kvbuffer_compile.ir.plan import Plan
from kvbuffer_compile.ir.program import Kind
from kvbuffer_compile.ir.shadow import scale_kind

SHADOW = "shadow + {key}[:, None] * SHADOW_KEY + {value}[None, :] * SHADOW_VALUE"


class Shadow:
    """Prints the parts of a kernel that deal with the shadow of a tile; plain loads where the plan has none.

    A shadow is what a program reads in its tile's place, and a flush makes it anew. A program has the scales of all it
    holds: lanes are cut along the axis that reads leave free. A tile without a shadow is folded with no rows, which
    makes one.
    """

    def __init__(self, out: Python, plan: Plan, values: Values) -> None:
        self.out, self.plan, self.values = out, plan, values
        self.there = plan.shadowed
        self.kind: Kind = scale_kind(plan.program) or "value"

    def find(self) -> None:
        """`scale` of this tile, `exact`: whether the tile itself is read, and `lacks`: whether it gets a shadow."""
        for name, strides in (("shadow", "half"), ("shadow_scale", "scale")):
            if self.plan.program.lanes:
                offset = self.values.offset(strides)
                self.out.line(f"{name} += {offset}")
        other = ", other=1.0" if self.values.padded(self.kind) else ""
        self.out.line(f"scale = tl.load(shadow_scale + {self.kind}{self.values.mask(self.kind)}{other})")
        self.out.line("lacks = tl.max((scale == 0.0).to(tl.int32), 0) > 0")
        self.out.line("exact = flush | lacks | (tl.max((scale != scale).to(tl.int32), 0) > 0)")
        self.out.line(f"lacks = lacks & (tl.load(cursor + 3 * cursor_row) == 0){' & writes' * self.plan.slots}")

    def load(self, name: str) -> str:
        """The tile that is read: an expression, which is the name where it takes more than one."""
        base = self.values.load_state("live", "EVICT")
        if not self.there:
            return base
        with self.out.block("if exact"):
            self.out.line(f"{name} = {base}")
        with self.out.block("else"):
            half = self.values.load_tile(SHADOW, None, "EVICT")
            self.out.line(f"{name} = {half} * scale{self.values.across(self.kind)}")
        return name

    def make(self) -> None:
        """The shadow of `s` (see ir/shadow.py): by integers, in which inf and NaN are the largest."""
        if not self.there:
            return
        across = self.values.across(self.kind)
        self.out.line(f"largest = s.to(tl.int32, bitcast=True) & {0x7FFFFFFF}")
        self.out.line(f"exponent = tl.max(largest, {0 if self.kind == 'value' else 1}) >> 23")
        self.out.line("unit = tl.maximum(exponent - 14, 1)")
        self.out.line(f"half = s * ((254 - unit) << 23).to(tl.float32, bitcast=True){across}")
        self.values.store_tile(SHADOW, f"half.to({DTYPES[self.plan.read_dtype or self.plan.compute]})")
        self.out.line('unit = tl.where(exponent == 255, float("nan"), (unit << 23).to(tl.float32, bitcast=True))')
        self.out.line(f"tl.store(shadow_scale + {self.kind}, unit{self.values.mask(self.kind)})")
