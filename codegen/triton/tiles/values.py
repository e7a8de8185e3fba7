"""Values of a program as Triton tensors: names, masks, and the expressions that compute them.

A scalar value is a 0-d tensor, a key a tensor [BLOCK_K], a value a tensor [BLOCK_V]: whole axes rounded up to a
power of two, or BLOCK elements of the axis that is cut into tiles. What lies beyond the axis is garbage, and is masked
where it would be summed or stored.
"""

from __future__ import annotations

import keyword
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch

from kvbuffer_compile.codegen import calls
from kvbuffer_compile.codegen.schedule import Dot, Old, Step, Widen, uses
from kvbuffer_compile.codegen.source import Source
from kvbuffer_compile.errors import EmitError
from kvbuffer_compile.ir import program
from kvbuffer_compile.ir.plan import Plan
from kvbuffer_compile.ir.program import REDUCTIONS, Kind, Map, Var

DTYPES = {
    torch.float32: "tl.float32",
    torch.float64: "tl.float64",
    torch.bfloat16: "tl.bfloat16",
    torch.float16: "tl.float16",
}
AXES: tuple[Kind, ...] = ("key", "value")
STATE = "state + {key}[:, None] * STATE_KEY + {value}[None, :] * STATE_VALUE"

# Names of the kernel that a value of the same name would hide, and how such names begin.
TAKEN = frozenset(
    """tl torch triton libdevice step arrive state cursor tickets tile program lane sequence owed limit live flush kept
    t s T TOKENS BLOCK TILES EVICT FOLD QUERIES MATRIX DRAFTS PRECISION key value key_ok value_ok age used later dot
    token query part ahead chunk n fold float range asked asked_token queries result shadow shadow_scale scale exact
    lacks folded largest exponent unit half slot start stored faded j high product halves fours columns totals
    short stack pieces some now there here add_four add_eight above over higher parents path shown behind jump
    ENTRIES slots pool chosen earlier writes rivals leave wait slot_of""".split()
)
PREFIXES = tuple(
    """in_ row_ out_ at_ size_ state_ left_ right_ later_ after_ fade_ fresh_ carry_ now_ run_ next_ slot_ cursor_
    tickets_ weight_ last_ met_ gram_ all_ key_ value_ half_ scale_ part_ raw_ base_ sum_ asked_ given_ each_
    cut_ path_ parents_""".split()
)


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

    def __init__(self, out: Python, plan: Plan, split: Kind | None) -> None:
        self.out, self.plan, self.split = out, plan, split
        self.index: dict[Kind, str] = {"scalar": "", "key": "key", "value": "value"}  # what runs along an axis
        if plan.compute not in (torch.float32, torch.float64):
            raise EmitError(f"no Triton kernel computes in {plan.compute}\n{plan.program}")
        self.real = DTYPES[plan.compute]

    def name(self, v: Var) -> str:
        """The local that holds v, or a part of it."""
        if self.index[v.kind] not in ("", v.kind):
            return f"part_{v.name}"
        taken = v.name in TAKEN or v.name.startswith(PREFIXES) or keyword.iskeyword(v.name)
        return f"{v.name}_v" if taken or v.name.endswith(("_v", "_rows")) else v.name

    # ---------------------------------------------------------------------------------------------- axes

    def size(self, kind: Kind) -> int:
        return self.plan.sizes[AXES.index(kind)]

    @contextmanager
    def part(self, kind: Kind, length: int) -> Iterator[None]:
        """Within, an axis stands for `length` elements of it, those numbered by <axis>_part."""
        self.index[kind], self._part = f"{kind}_part", str(length)
        yield
        self.index[kind], self._part = kind, ""

    def length(self, kind: Kind) -> str:
        """How many elements of an axis a program holds."""
        if self.index[kind] != kind:
            return self._part
        return "BLOCK" if kind == self.split else str(power_of_two(self.size(kind)))

    def padded(self, kind: Kind) -> bool:
        """Whether some of the elements held may lie beyond the axis."""
        return self.size(kind) != power_of_two(self.size(kind))

    def axes(self) -> None:
        """`key` and `value`: the indices that this program holds."""
        for kind in AXES:
            start = "tile * BLOCK + " if kind == self.split else ""
            self.out.line(f"{kind} = ({start}tl.arange(0, {self.length(kind)})).to(tl.int64)")
            if self.padded(kind):
                self.out.line(f"{kind}_ok = {kind} < {self.size(kind)}")

    def mask(self, *parts: str | Kind) -> str:
        """A mask argument that is the conjunction of conditions; axes among them by name, where they need one."""
        found = [self.ok(p) if p in AXES else p for p in parts if p not in AXES or self.padded(p)]
        return f", mask={' & '.join(found)}" if found else ""

    def ok(self, kind: Kind) -> str:
        """Which of the elements held are elements of the axis."""
        return f"{self.index[kind]}_ok"

    def offset(self, strides: str) -> str:
        """Where this program's lane is in a tensor of the state's lanes, whose strides are called <strides>_<lane>."""
        lanes = self.plan.program.lanes
        at = ["sequence" if n == 0 and self.plan.slots else f"at_{lane}" for n, lane in enumerate(lanes)]
        return " + ".join(f"{x} * {strides}_{lane}" for x, lane in zip(at, lanes, strict=True))

    def load_state(self, live: str | None = None, policy: str = "") -> str:
        """The tile of the state, zeros unless `live`."""
        return self.load_tile(STATE, live, policy)

    def load_tile(self, address: str, live: str | None, policy: str) -> str:
        """A tile like the state's, at an address with the places {key} and {value}."""
        return f"{self.load_raw(live, policy, address)}.to({self.real})"

    def load_raw(self, live: str | None = None, policy: str = "", address: str = STATE) -> str:
        """The same as it is stored."""
        masks = self._tile_mask([live] if live else [])
        other = ", other=0.0" if masks else ""
        policy = f", eviction_policy={policy}" if policy else ""
        return f"tl.load({address.format(**self.index)}{masks}{other}{policy})"

    def store_state(self) -> None:
        self.store_tile(STATE, f"s.to({DTYPES[self.plan.state_dtype]})")

    def store_tile(self, address: str, tile: str) -> None:
        self.out.line(f"tl.store({address.format(**self.index)}, {tile}{self._tile_mask([])})")

    def _tile_mask(self, parts: list[str]) -> str:
        parts = [*parts, *(f"{self.ok(k)}{self.across(k)}" for k in AXES if self.padded(k))]
        return f", mask={' & '.join(parts)}" if parts else ""

    def across(self, kind: Kind) -> str:
        """The index that lays a vector of this kind along its axis of the state [key, value]."""
        return "[:, None]" if kind == "key" else "[None, :]"

    def total(self, text: str, kind: Kind, axis: int, dims: int) -> str:
        """The sum of an expression over an axis, of which garbage is no part."""
        if self.padded(kind):
            index = "" if dims == 1 else "[:, None]" if axis == 0 else "[None, :]"
            text = f"tl.where({self.ok(kind)}{index}, {text}, 0.0)"
        return f"tl.sum({text}, {axis})"

    def full(self, kind: Kind, number: str) -> str:
        """A tensor of this kind with all elements equal."""
        if kind == "scalar":
            return f"tl.full([], {number}, {self.real})"
        return f"tl.full([{self.length(kind)}], {number}, {self.real})"

    # ------------------------------------------------------------------------------------------- computing

    def operands(self, nodes: Iterable[Step | Old], roots: Iterable[Var]) -> list[Var]:
        """The inputs that the nodes or the roots use."""
        used = {*roots, *(v for node in nodes for v in uses(node))}
        return [v for v in self.plan.program.inputs if v in used]

    def load(self, inputs: Iterable[Var]) -> None:
        """Operands of this lane (and of token t in a verify step)."""
        for v in inputs:
            self.out.line(f"{self.name(v)} = {self._operand(v, 't')}")

    def load_first(self, inputs: Iterable[Var]) -> None:
        """Before a loop over tokens: the operands of token 0."""
        for v in inputs:
            self.out.line(f"next_{v} = {self._operand(v, '0')}")

    def load_next(self, inputs: Sequence[Var]) -> None:
        """In the loop: the operands of token t are there; those of the next one are asked for in time."""
        for v in inputs:
            self.out.line(f"{self.name(v)} = next_{v}")
        self.out.line("ahead = tl.minimum(t + 1, T - 1)")
        for v in inputs:
            self.out.line(f"next_{v} = {self._operand(v, 'ahead')}")

    def take(self, inputs: Iterable[Var]) -> None:
        """Operands of token t, from tuples given_<name>."""
        for v in inputs:
            self.out.line(f"{self.name(v)} = given_{v}[t].to({self.real})")

    def inside(self, text: str, kind: Kind) -> str:
        """A vector with zeros beyond the axis."""
        return f"tl.where({self.ok(kind)}, {text}, 0.0)" if self.padded(kind) else text

    def operand_tile(self, v: Var, token: str, dtype: str = "") -> str:
        """An operand of many tokens, a row for each of the tensor `token`; zero where there is no such token."""
        vector = v.kind != "scalar"
        at = [f"at_{lane} * in_{v}_{lane}" for lane in self.plan.program.lanes if lane in v.lanes]
        at += [f"{token}{'[:, None]' if vector else ''} * in_{v}_t"]
        at += [f"{self.index[v.kind]}[None, :] * in_{v}_last"] if vector else []
        mask = f"(({token} >= 0) & ({token} < T)){'[:, None]' if vector else ''}"
        mask += f" & {self.ok(v.kind)}[None, :]" if vector and self.padded(v.kind) else ""
        return f"tl.load({' + '.join([f'in_{v}', *at])}, mask={mask}, other=0.0).to({dtype or self.real})"

    def _operand(self, v: Var, token: str) -> str:
        return f"{self.operand(v, token)}.to({self.real})"

    def operand(self, v: Var, token: str) -> str:
        """An operand of one token as it is stored."""
        at = [f"at_{lane} * in_{v}_{lane}" for lane in self.plan.program.lanes if lane in v.lanes]
        at += [f"{token} * in_{v}_t"] if self.plan.several else []
        at += [f"{self.index[v.kind]} * in_{v}_last"] if v.kind != "scalar" else []
        masks = self.mask(v.kind) if v.kind != "scalar" else ""
        other = ", other=0.0" if masks else ""
        return f"tl.load({' + '.join([f'in_{v}', *at])}{masks}{other})"

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
                (x,) = program.operands(step)
                return self.reduced(fn, self.name(x), x.kind, 0)
            case Map(_, fn, args):
                return calls.triton(fn, [self.name(a) if isinstance(a, Var) else a for a in args])

    def reduced(self, fn: str, text: str, kind: Kind, axis: int) -> str:
        """A reduction over the last axis, which is `axis`."""
        if self.padded(kind):
            rest = {"aten.amax.default": 'float("-inf")', "aten.amin.default": 'float("inf")'}.get(fn, "0.0")
            text = f"tl.where({self.ok(kind)}{'[None, :]' if axis else ''}, {text}, {rest})"
        return calls.TRITON_REDUCTIONS[fn].format(text, axis, f"{self.size(kind)}.0")


def power_of_two(n: int) -> int:
    """The smallest power of two that is not below n."""
    return 1 << (n - 1).bit_length()
