"""The Triton function that folds owed rows into a tile of the state: all owed tokens at once, a rank-1 update a row.

Matrix products would want the tile in a layout of their own, and a second copy of it is more than there are registers.
A flush is rare, so it takes the tile in parts as small as it must, and the step itself reads the state anew.

Beside it what a recurrent step does with its tile.
"""

from __future__ import annotations

from kvbuffer_compile.codegen.schedule import Fold as TokenFold
from kvbuffer_compile.codegen.schedule import Old
from kvbuffer_compile.codegen.triton.arguments import arguments
from kvbuffer_compile.codegen.triton.tiles.rows import Rows
from kvbuffer_compile.codegen.triton.tiles.shadow import Shadow
from kvbuffer_compile.codegen.triton.tiles.values import Python, Values
from kvbuffer_compile.ir.plan import SHADOW, Plan
from kvbuffer_compile.ir.program import Decay, Kind, Var

NEEDS = ("row_", "ROW_", "STATE_", "SHADOW_")


class Fold:
    """Prints the function `fold`, and its call."""

    def __init__(self, out: Python, plan: Plan, values: Values, rows: Rows) -> None:
        self.out, self.plan, self.values, self.rows = out, plan, values, rows
        lanes = [f"at_{lane}" for lane in plan.program.lanes]
        self.arguments = ["state", *lanes, *(["sequence"] if "at_sequence" not in lanes else []), "owed", "live"]
        self.shadow = Shadow(out, plan, values)
        self.arguments += [*SHADOW] * plan.shadowed
        self.constants: list[str] = []
        for a in arguments(plan, values.split):
            if a.name.startswith(NEEDS):
                (self.constants if a.constant else self.arguments).append(a.name)

    def define(self) -> None:
        self.out.line("@triton.jit")
        self.out.line("def fold(")
        for name in (*self.arguments, "tile"):
            self.out.line(f"    {name},")
        for name in (*self.constants, "BLOCK"):
            self.out.line(f"    {name}: tl.constexpr,")
        with self.out.block(")"):
            self.out.line('"""Add the owed rows, newest first, to what their decays leave of a tile of the state."""')
            self.values.axes()
            self._walk()
            self.out.line(f"s += {self.values.load_state('live')}{self._left()}")
            self.values.store_state()
            self.shadow.make()

    def call(self) -> None:
        """Fold this program's tile, part by part."""
        part = "tile * (BLOCK // FOLD) + part"
        if self.values.split is None:
            self._call("0", "BLOCK")
            return
        with self.out.block("for part in range(BLOCK // FOLD)"):
            self._call(part, "FOLD")

    def _call(self, tile: str, block: str) -> None:
        given = ["folded" if name == "owed" and self.shadow.there else name for name in self.arguments]
        self.out.line(f"fold({', '.join([*given, tile, *self.constants, block])})")

    def _walk(self) -> None:
        """s = what the rows add up to; run_<kind> = the product of the decays so far. Each slot is loaded while the one
        before it is added."""
        logged, values = self.plan.program.logged, self.values
        self.out.line(f"s = tl.zeros([{values.length('key')}, {values.length('value')}], {values.real})")
        for kind in self.rows.fades:
            self.out.line(f"run_{kind} = {values.full(kind, '1.0')}")
        for v in logged:
            self.out.line(f"next_{v} = {self._slot(v, 'owed - 1')}")
        with self.out.block("for n in range(owed)"):
            for v in logged:
                self.out.line(f"slot_{v} = next_{v}")
            for v in logged:
                self.out.line(f"next_{v} = {self._slot(v, 'owed - 2 - n')}")
            for event in reversed(self.plan.program.events):
                if isinstance(event, Decay):
                    self.out.line(f"run_{event.factor.kind} = run_{event.factor.kind} * slot_{event.factor}")
                else:
                    left = self._side(event.left, "key", [])
                    scalar = ["run_scalar"] if "scalar" in self.rows.fades else []
                    self.out.line(f"s += {left} * {self._side(event.right, 'value', scalar)}")

    def _slot(self, v: Var, slot: str) -> str:
        """Slot `slot` of v if there is one."""
        some = f"{slot} >= 0" if v.kind == "scalar" else f"(tl.full([1], {slot}, tl.int32) >= 0)"
        mask = self.values.mask(some, *([v.kind] if v.kind != "scalar" else []))
        return f"tl.load({self.rows.address(v, f'({slot})', False)}{mask}, other=0.0).to({self.values.real})"

    def _side(self, v: Var, kind: Kind, factors: list[str]) -> str:
        """One side of a slot's row, decayed, laid along its axis of s."""
        factors = [f"slot_{v}", *factors, *([f"run_{kind}"] if kind in self.rows.fades else [])]
        text = " * ".join(factors)
        vector = v.kind != "scalar" or kind in self.rows.fades
        return (f"({text})" if len(factors) > 1 else text) + (self.values.across(kind) if vector else "")

    def _left(self) -> str:
        """What the decays leave of the old state, as factors behind it."""
        return "".join(f" * run_{k}{'' if k == 'scalar' else self.values.across(k)}" for k in self.rows.fades)


def read_state(out: Python, values: Values, read: Old) -> None:
    """A read of the tile `s`, which is all there is of the state."""
    x = read.x
    text = f"s * {values.name(x)}{values.across(x.kind)}"
    out.line(f"{values.name(read.out)} = {values.total(text, x.kind, 0 if x.kind == 'key' else 1, 2)}")


def fold_token(out: Python, values: Values, fold: TokenFold) -> None:
    """Take one token into `s`."""
    for v in (fold.scalar, fold.key, fold.value):
        if v:
            along = "" if v.kind == "scalar" else values.across(v.kind)
            out.line(f"s = s * {values.name(v)}{along}")
    for left, right in fold.rows:
        out.line(f"s += {values.name(left)}[:, None] * {values.name(right)}[None, :]")
