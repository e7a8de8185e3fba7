"""Values of a program as Triton tensors: names, masks, and the expressions that compute them.

A scalar value is a 0-d tensor, a key a tensor [BLOCK_K], a value a tensor [BLOCK_V]: whole axes rounded up to a
power of two, or BLOCK elements of the axis that is cut into tiles. What lies beyond the axis is garbage, and is masked
where it would be summed or stored.
"""

from __future__ import annotations

import keyword
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

from kvbuffer_compile import ir
from kvbuffer_compile.codegen import calls
from kvbuffer_compile.codegen.schedule import Dot, Step, Widen, uses
from kvbuffer_compile.codegen.source import Source
from kvbuffer_compile.errors import EmitError
from kvbuffer_compile.ir import REDUCTIONS, Kind, Map, Var
from kvbuffer_compile.plan import Plan

DTYPES = {
    torch.float32: "tl.float32",
    torch.float64: "tl.float64",
    torch.bfloat16: "tl.bfloat16",
    torch.float16: "tl.float16",
}
AXES: tuple[Kind, ...] = ("key", "value")

# Names of the kernel that a value of the same name would hide, and how such names begin.
TAKEN = frozenset(
    """tl torch triton libdevice step arrive state cursor tickets tile program lane sequence owed limit live flush to t
    s T TOKENS FRESH BLOCK TILES PRECISION key value key_ok value_ok age used later dot dots row stack stacked token
    queries query recent float range last""".split()
)
PREFIXES = ("in_", "row_", "out_", "at_", "size_", "state_", "left_", "right_", "later_", "after_", "fade_", "fresh_",
            "new_", "now_", "cursor_", "tickets_", "weight_", "last_")  # fmt: skip
SUFFIXES = ("_v", "_all", "_past", "_ahead")


class Python(Source):
    """Lines of Python: blocks are opened by a colon, indents are four columns, comments start with `#`."""

    def line(self, text: str = "") -> None:
        self._lines.append("    " * self._depth + text if text else "")

    def comment(self, text: str) -> None:
        for part in text.splitlines():
            self.line(f"# {part}".rstrip())

    @contextmanager
    def block(self, head: str = "", tail: str = "") -> Iterator[None]:
        self.line(f"{head}:")
        self._depth += 1
        yield
        self._depth -= 1


class Values:
    """Prints computations on values. `split` is the axis of which a program holds one tile, None for both whole."""

    last_axis = (0, "")  # of a vector, and how a mask along it is written

    def __init__(self, out: Python, plan: Plan, split: Kind | None) -> None:
        self.out, self.plan, self.split = out, plan, split
        if plan.compute not in (torch.float32, torch.float64):
            raise EmitError(f"no Triton kernel computes in {plan.compute}\n{plan.program}")
        self.real = DTYPES[plan.compute]

    def name(self, v: Var) -> str:
        """The local that holds v."""
        taken = v.name in TAKEN or v.name.startswith(PREFIXES) or keyword.iskeyword(v.name)
        return f"{v.name}_v" if taken or v.name.endswith(SUFFIXES) else v.name

    # ---------------------------------------------------------------------------------------------- axes

    def size(self, kind: Kind) -> int:
        return self.plan.sizes[AXES.index(kind)]

    def length(self, kind: Kind) -> str:
        """How many elements of an axis a program holds."""
        return "BLOCK" if kind == self.split else str(tile_size(self.size(kind)))

    def padded(self, kind: Kind) -> bool:
        """Whether some of the elements held may lie beyond the axis."""
        return self.size(kind) != tile_size(self.size(kind))

    def clean(self, text: str, kind: Kind) -> str:
        """A vector with zeros for garbage, for products that have no mask."""
        return f"tl.where({kind}_ok, {text}, 0.0)" if self.padded(kind) else text

    def axes(self) -> None:
        """`key` and `value`: the indices that this program holds."""
        for kind in AXES:
            start = "tile * BLOCK + " if kind == self.split else ""
            self.out.line(f"{kind} = ({start}tl.arange(0, {self.length(kind)})).to(tl.int64)")
            if self.padded(kind):
                self.out.line(f"{kind}_ok = {kind} < {self.size(kind)}")

    def mask(self, *parts: str | Kind) -> str:
        """A mask argument that is the conjunction of conditions; axes among them by name, where they need one."""
        found = [f"{p}_ok" if p in AXES else p for p in parts if p not in AXES or self.padded(p)]  # type: ignore[arg-type]
        return f", mask={' & '.join(found)}" if found else ""

    def tile_mask(self, live: str | None) -> str:
        """The mask argument of a tile of the state, all false unless `live`."""
        parts = [live] if live else []
        parts += ["key_ok[:, None]"] if self.padded("key") else []
        parts += ["value_ok[None, :]"] if self.padded("value") else []
        return f", mask={' & '.join(parts)}" if parts else ""

    def across(self, kind: Kind) -> str:
        """The index that lays a vector of this kind along its axis of the state [key, value]."""
        return "[:, None]" if kind == "key" else "[None, :]"

    def total(self, text: str, kind: Kind, axis: int, dims: int) -> str:
        """The sum of an expression over an axis, of which garbage is no part."""
        if self.padded(kind):
            index = "" if dims == 1 else "[:, None]" if axis == 0 else "[None, :]"
            text = f"tl.where({kind}_ok{index}, {text}, 0.0)"
        return f"tl.sum({text}, {axis})"

    def full(self, kind: Kind, number: str) -> str:
        """A tensor of this kind with all elements equal."""
        if kind == "scalar":
            return f"tl.full([], {number}, {self.real})"
        return f"tl.full([{self.length(kind)}], {number}, {self.real})"

    # ------------------------------------------------------------------------------------------- computing

    def load(self, v: Var) -> None:
        """An operand of this lane (and of token t in a verify step)."""
        at = [f"at_{lane} * in_{v}_{lane}" for lane in self.plan.program.lanes if lane in v.lanes]
        at += [f"t * in_{v}_t"] if self.plan.variant == "verify" else []
        at += [f"{v.kind} * in_{v}_last"] if v.kind != "scalar" else []
        masks = self.mask(v.kind) if v.kind != "scalar" else ""
        other = ", other=0.0" if masks else ""
        self.out.line(f"{self.name(v)} = tl.load({' + '.join([f'in_{v}', *at])}{masks}{other}).to({self.real})")

    def steps(self, steps: Iterable[Step]) -> None:
        """Compute steps in order."""
        for step in steps:
            self.out.line(f"{self.name(step.out)} = {self._expression(step)}")

    def _expression(self, step: Step) -> str:
        match step:
            case Dot(_, left, right):
                return self.total(f"{self.name(left)} * {self.name(right)}", left.kind, 0, 1)
            case Widen(out, x):
                return f"tl.full([{self.length(out.kind)}], 1.0, {self.real}) * {self.name(x)}"
            case Map(_, fn, _) if fn in REDUCTIONS:
                return self._reduction(step)
            case Map(_, fn, args):
                return calls.triton(fn, [self.name(a) if isinstance(a, Var) else a for a in args])

    def _reduction(self, step: Map) -> str:
        (x,) = ir.operands(step)
        text, axis, index = self.name(x), *self.last_axis
        if self.padded(x.kind):
            rest = {"aten.amax.default": 'float("-inf")', "aten.amin.default": 'float("inf")'}.get(step.fn, "0.0")
            text = f"tl.where({x.kind}_ok{index}, {text}, {rest})"
        return calls.TRITON_REDUCTIONS[step.fn].format(text, axis, f"{self.size(x.kind)}.0")


class Batch(Values):
    """The same computations for many tokens at once: a scalar is a tensor [TOKENS], a vector a tile [TOKENS, .].

    index, live: which token a row of the tiles is about, and whether there is one. Names end in `suffix`.
    """

    last_axis = (1, "[None, :]")

    def __init__(self, out: Python, plan: Plan, split: Kind | None, index: str, live: str, suffix: str) -> None:
        super().__init__(out, plan, split)
        self.index, self.live, self.suffix = index, live, suffix

    def name(self, v: Var) -> str:
        return f"{v.name}{self.suffix}"

    def clean(self, text: str, kind: Kind) -> str:
        return f"tl.where({kind}_ok[None, :], {text}, 0.0)" if self.padded(kind) else text

    def compute(self, steps: Iterable[Step], roots: Iterable[Var]) -> None:
        """Load the operands that the steps or the roots use, and compute the steps."""
        found = list(steps)
        used = {*roots, *(v for step in found for v in uses(step))}
        for v in self.plan.program.inputs:
            if v in used:
                self.load(v)
        self.steps(found)

    def load(self, v: Var) -> None:
        vector = v.kind != "scalar"
        at = [f"at_{lane} * in_{v}_{lane}" for lane in self.plan.program.lanes if lane in v.lanes]
        at += [f"{self.index}{'[:, None]' if vector else ''} * in_{v}_t"]
        at += [f"{v.kind}[None, :] * in_{v}_last"] if vector else []
        mask = f"({self.live}){'[:, None]' if vector else ''}"
        mask += f" & {v.kind}_ok[None, :]" if vector and self.padded(v.kind) else ""
        address = " + ".join([f"in_{v}", *at])
        self.out.line(f"{self.name(v)} = tl.load({address}, mask={mask}, other=0.0).to({self.real})")

    def _expression(self, step: Step) -> str:
        match step:
            case Dot(_, left, right):
                return self.total(f"{self.name(left)} * {self.name(right)}", left.kind, 1, 2)
            case Widen(out, x):
                return f"tl.broadcast_to({self.name(x)}[:, None], [TOKENS, {self.length(out.kind)}])"
            case Map(_, fn, _) if fn in REDUCTIONS:
                return self._reduction(step)
            case Map(out, fn, args):
                return calls.triton(fn, [self._lifted(a, out.kind) if isinstance(a, Var) else a for a in args])

    def _lifted(self, v: Var, kind: Kind) -> str:
        return self.name(v) + ("[:, None]" if v.kind == "scalar" and kind != "scalar" else "")


def power_of_two(n: int) -> int:
    """The smallest power of two that is not below n."""
    return 1 << (n - 1).bit_length()


def tile_size(n: int) -> int:
    """The length of a tile that holds n elements: a power of two of at least 16, as matrix products need it."""
    return max(16, power_of_two(n))
