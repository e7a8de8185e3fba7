"""Values of a program as C++ locals: their names, sizes and the loops that compute them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import groupby

from kvbuffer_compile.codegen import calls
from kvbuffer_compile.codegen.schedule import Dot, Old, Step, Widen, uses
from kvbuffer_compile.codegen.source import Source
from kvbuffer_compile.ir import program
from kvbuffer_compile.ir.program import REDUCTIONS, Kind, Map, Var

# Words of C++ and names of the kernel text that a local of the same name would hide.
TAKEN = frozenset(
    """alignas auto bool break case catch char class const continue default delete do double else enum explicit
    extern false float for friend goto if inline int long mutable namespace new not or and operator private
    protected public register return short signed sizeof static struct switch template this throw true try
    typedef typename union unsigned using virtual void volatile while xor asm export concept requires
    Real Wide WideAny WIDTH LANES AXES INLINE UNROLL Bf16 F16 Dtype View Argument Block Fold Mode Pass Call Room State
    K V CAPACITY FLUSH ROWS widen narrow get put splat truth maximum minimum modulo exponential sigmoid softplus gelu
    total sum mean largest smallest dots dot convert store fetch add_rows read_rows view load load_one fail check call
    std i at lane sequence count slot flush first size rows room weight left right fade fade_key fade_value fold
    later_key later_value t to m Reads Left Right read_many append_shared run_item step each_item
    keep_row keep_column block above parent Half Shadowed half scale shadow shade shade_row unit magnitude""".split()
)
FULL: dict[Kind, str] = {"key": "K", "value": "V"}


class Values:
    """Prints computations on values into `out`. `split` is the axis of which a tile [first, first + size) is held.

    token: operands hold several tokens, and the local `t` is the one to load.
    Values along an axis are arrays of the axis' full length, filled from 0; scalars are numbers.
    """

    def __init__(self, out: Source, split: Kind | None, token: bool = False) -> None:
        self.out = out
        self.split = split
        self.token = token

    def name(self, v: Var) -> str:
        """The local that holds v: its own name, unless that means something else to a compiler."""
        if v.name[0] in "_0123456789":
            return f"v{v.name}"
        odd = v.name in TAKEN or re.fullmatch(r".*_|.*_on_base|Row_.*|[A-Z][A-Z0-9_]+", v.name)
        return f"{v.name}_" if odd else v.name

    def length(self, kind: Kind) -> str:
        """How many elements of an axis are held."""
        return "size" if kind == self.split else FULL[kind]

    def start(self, kind: Kind) -> str:
        """The first element that is held."""
        return "first" if kind == self.split else "0"

    def array(self, name: str, kind: Kind) -> None:
        """Declare an array along an axis."""
        self.out.line(f"alignas(64) Real {name}[{FULL[kind]}];")

    def each(self, kind: Kind, text: str) -> None:
        """One statement for each i along an axis."""
        self.out.line(f"for (int64_t i = 0; i < {self.length(kind)}; ++i) {text}")

    def declare(self, v: Var) -> None:
        if v.kind != "scalar":
            self.array(self.name(v), v.kind)

    def load(self, v: Var) -> None:
        """An operand, converted to Real."""
        view, name = f"call.in_{v}", self.name(v)
        offset = f"{view}.at(at)" + (f" + t * {view}.slot" if self.token else "")
        if v.kind == "scalar":
            self.out.line(f"const Real {name} = load_one({view}, {offset});")
        else:
            self.declare(v)
            self.out.line(f"load({name}, {view}, {offset}, {self.start(v.kind)}, {self.length(v.kind)});")

    def load_for(self, inputs: Iterable[Var], nodes: Iterable[Step | Old], roots: Iterable[Var]) -> None:
        """Those of the inputs that the nodes use, or that are roots themselves."""
        used = set(roots) | {v for node in nodes for v in uses(node)}
        for v in inputs:
            if v in used:
                self.load(v)

    def steps(self, steps: Iterable[Step]) -> None:
        """Compute steps in order, those next to each other along one axis in one loop."""
        for kind, group in groupby(steps, key=_loop):
            found = list(group)
            if kind is None:
                for step in found:
                    self._scalar(step)
            else:
                self._vector(kind, found)

    def _scalar(self, step: Step) -> None:
        self.out.line(f"const Real {self.name(step.out)} = {self._number(step)};")

    def _number(self, step: Step) -> str:
        match step:
            case Dot(_, left, right):
                return f"dot({self.name(left)}, {self.name(right)}, {self.length(left.kind)})"
            case Map(_, fn, args) if fn in REDUCTIONS:
                (x,) = program.operands(step)
                return f"{calls.CPP_REDUCTIONS[fn]}({self.name(x)}, {self.length(x.kind)})"
            case Map(_, fn, args):
                return calls.cpp(fn, [self.name(a) if isinstance(a, Var) else a for a in args])
            case Widen(_, x):
                return self.name(x)

    def _vector(self, kind: Kind, steps: Sequence[Step]) -> None:
        for step in steps:
            self.declare(step.out)
        with self.out.block(f"for (int64_t i = 0; i < {self.length(kind)}; ++i)"):
            for step in steps:
                self.out.line(f"{self.name(step.out)}[i] = {self._element(step)};")

    def _element(self, step: Step) -> str:
        if isinstance(step, Widen):
            return self.name(step.x)
        assert isinstance(step, Map)
        return calls.cpp(step.fn, [self._at(a) if isinstance(a, Var) else a for a in step.args])

    def _at(self, v: Var) -> str:
        return self.name(v) if v.kind == "scalar" else f"{self.name(v)}[i]"


def _loop(step: Step) -> Kind | None:
    """The axis a step loops over, None for one that makes a number."""
    return None if step.out.kind == "scalar" else step.out.kind
