"""The memory program: what one step does to a matrix state, never how the state is stored.

A program acts on S [*lanes, K, V]. Every value runs along at most one of the two axes, besides the lanes:

    kind     shape         example
    scalar   [*lanes]      decay of a head, beta
    key      [*lanes, K]   k, q, a decay per key channel
    value    [*lanes, V]   v, a read

A value that is constant along some lanes (keys shared by a group of heads) has size 1 there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Protocol, TypeVar, assert_never

from kvbuffer_compile.errors import IRError

Kind = Literal["scalar", "key", "value"]
KINDS: tuple[Kind, ...] = ("scalar", "key", "value")


@dataclass(frozen=True)
class Var:
    """One value of a program: its name, its kind, and the lanes along which it varies (names from Program.lanes)."""

    name: str
    kind: Kind
    lanes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Decay:
    """S <- diag(a) S for a scalar or key factor, S <- S diag(a) for a value factor."""

    factor: Var


@dataclass(frozen=True)
class Read:
    """out = S^T x for a key x (out runs along value); out = S x for a value x (out runs along key)."""

    out: Var
    x: Var


@dataclass(frozen=True)
class Update:
    """S <- S + left right^T, left along key, right along value; either may be scalar (constant along its axis)."""

    left: Var
    right: Var


@dataclass(frozen=True)
class Map:
    """out = fn(*args), a call that never sees S.

    fn: name of an ATen overload, e.g. "aten.mul.Tensor": pointwise, or a reduction ("aten.sum.dim_IntList" with
    the dims left out) over the key or value axis of its one argument, whose result is scalar.
    args: variables and Python numbers, in the order of the overload's positional arguments.
    """

    out: Var
    fn: str
    args: tuple[Var | float | int | bool, ...]


Op = Decay | Read | Update | Map


@dataclass(frozen=True)
class Program:
    """Straight-line code over one state. `inputs` come from outside, `outputs` (reads, maps) are handed back.

    tokens: how many decoded tokens one run of the program stands for.
    """

    lanes: tuple[str, ...]
    inputs: tuple[Var, ...]
    ops: tuple[Op, ...]
    outputs: tuple[Var, ...]
    tokens: int = 1

    def __str__(self) -> str:
        return print_program(self)

    @cached_property
    def logged(self) -> tuple[Var, ...]:
        """The values a buffer must keep to replay the program's effect on S, each once, in order of first use."""
        return tuple(dict.fromkeys(v for op in self.events for v in operands(op)))

    @property
    def events(self) -> tuple[Decay | Update, ...]:
        """The ops that change S, in order: one slot of the log."""
        return tuple(op for op in self.ops if isinstance(op, Decay | Update))

    @property
    def signature(self) -> str:
        """One letter an op that touches S, e.g. "DRUR" for Gated DeltaNet: for reports."""
        return "".join(type(op).__name__[0] for op in self.ops if not isinstance(op, Map))


def operands(op: Op) -> tuple[Var, ...]:
    """The variables an op uses."""
    match op:
        case Decay(factor):
            return (factor,)
        case Read(_, x):
            return (x,)
        case Update(left, right):
            return (left, right)
        case Map(_, _, args):
            return tuple(a for a in args if isinstance(a, Var))
        case _:
            assert_never(op)


def result(op: Op) -> Var | None:
    """The variable an op defines."""
    return op.out if isinstance(op, Read | Map) else None


def map_op(
    name: str,
    fn: str,
    args: tuple[Var | float | int | bool, ...],
    lanes: tuple[str, ...],
    define: Any = Var,
) -> Map:
    """A Map whose result has the kind and the lanes that follow from its arguments."""
    used = [a for a in args if isinstance(a, Var)]
    kinds = {v.kind for v in used} - {"scalar"}
    kind = "scalar" if fn in REDUCTIONS or not kinds else kinds.pop()
    along = {x for v in used for x in v.lanes}
    return Map(define(name, kind, tuple(x for x in lanes if x in along)), fn, args)


# ---------------------------------------------------------------------------------------------- running

T = TypeVar("T")


class Memory(Protocol[T]):
    """Something a program can run on: a dense state, a buffered one, a counter of bytes, a printer of code."""

    def decay(self, factor: T, kind: Kind) -> None: ...
    def read(self, x: T, kind: Kind) -> T: ...
    def update(self, left: T, right: T, kinds: tuple[Kind, Kind]) -> None: ...
    def map(self, op: Map, args: list[Any]) -> T: ...


def run(program: Program, memory: Memory[T], inputs: Mapping[str, T]) -> dict[str, T]:
    """Interpret the program on a memory; returns every value by name (the caller picks the outputs).

    inputs: one value for each of program.inputs, by name. KeyError when one is missing.
    """
    env: dict[str, T] = {v.name: inputs[v.name] for v in program.inputs}
    for op in program.ops:
        match op:
            case Decay(factor):
                memory.decay(env[factor.name], factor.kind)
            case Read(out, x):
                env[out.name] = memory.read(env[x.name], x.kind)
            case Update(left, right):
                memory.update(env[left.name], env[right.name], (left.kind, right.kind))
            case Map(out, _, args):
                env[out.name] = memory.map(op, [env[a.name] if isinstance(a, Var) else a for a in args])
            case _:
                assert_never(op)
    return env


REDUCTIONS = frozenset(f"aten.{n}" for n in ("sum.dim_IntList", "mean.dim", "amax.default", "amin.default"))


def verify(program: Program) -> Program:
    """Check the rules of the IR and return the program; IRError with its text otherwise."""
    try:
        _verify(program)
    except _Broken as e:
        raise IRError(f"{e}\n{program}") from None
    return program


class _Broken(Exception):
    pass


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise _Broken(message)


def _verify(program: Program) -> None:
    defined: dict[str, Var] = {}
    tainted: set[str] = set()  # values that depend on a read of this state

    def define(v: Var) -> None:
        _require(v.name not in defined, f"{v} is defined twice")
        _require(v.kind in KINDS, f"{v} has kind {v.kind!r}")
        _require(set(v.lanes) <= set(program.lanes), f"{v} runs along unknown lanes {v.lanes}")
        defined[v.name] = v

    for v in program.inputs:
        define(v)
    for op in program.ops:
        for v in operands(op):
            _require(defined.get(v.name) == v, f"{v} is used before it is defined, or with another kind")
        _verify_op(op, tainted)
        out = result(op)
        if out is not None:
            define(out)
            if isinstance(op, Read) or any(v.name in tainted for v in operands(op)):
                tainted.add(out.name)
    for v in program.outputs:
        _require(defined.get(v.name) == v, f"output {v} is not defined")
    _require(program.tokens >= 1, "a program stands for at least one token")
    _require(len(set(program.lanes)) == len(program.lanes), "two lanes have one name")


def _verify_op(op: Op, tainted: set[str]) -> None:
    match op:
        case Decay(factor):
            # The algebra would allow a decay that depends on a read, the parallel verification of drafts not.
            _require(factor.name not in tainted, f"decay {factor} depends on a read of the state")
        case Read(out, x):
            _require(x.kind != "scalar", f"read of scalar {x}")
            _require(out.kind == ("value" if x.kind == "key" else "key"), f"read {out} runs along {out.kind}")
        case Update(left, right):
            _require(left.kind != "value" and right.kind != "key", f"update {left}, {right} has its axes swapped")
        case Map(out, fn, _):
            kinds = {v.kind for v in operands(op)} - {"scalar"}
            _require(len(kinds) <= 1, f"{fn} mixes the key and the value axis")
            if fn in REDUCTIONS:
                _require(out.kind == "scalar" and len(kinds) == 1, f"{fn} must reduce a key or value to a scalar")
            else:
                _require(out.kind == (kinds.pop() if kinds else "scalar"), f"{out} of {fn} has kind {out.kind}")
        case _:
            assert_never(op)


def print_program(program: Program) -> str:
    """The text form; text.parse reads it back."""
    lines = [f"program over {' '.join(program.lanes) or '-'} tokens {program.tokens}"]
    lines += [f"  input {v}: {v.kind}({' '.join(v.lanes)})" for v in program.inputs]
    lines += [f"  {_print_op(op)}" for op in program.ops]
    lines.append(f"  return {', '.join(map(str, program.outputs))}".rstrip())
    return "\n".join(lines)


def _print_op(op: Op) -> str:
    match op:
        case Decay(factor):
            return f"decay {factor}"
        case Read(out, x):
            return f"{out} = read {x}"
        case Update(left, right):
            return f"update {left}, {right}"
        case Map(out, fn, args):
            return f"{out} = {fn}({', '.join(str(a) if isinstance(a, Var) else repr(a) for a in args)})"
        case _:
            assert_never(op)


def rename(program: Program) -> Program:
    """The same program with canonical names (x0, x1, ... inputs; t0, t1, ... results): equal algebra compares equal."""
    fresh: dict[str, Var] = {}

    def new(v: Var, prefix: str) -> Var:
        if v.name not in fresh:
            count = sum(known.name.startswith(prefix) for known in fresh.values())
            fresh[v.name] = Var(f"{prefix}{count}", v.kind, v.lanes)
        return fresh[v.name]

    inputs = tuple(new(v, "x") for v in program.inputs)
    ops = tuple(_renamed(op, lambda v: new(v, "t")) for op in program.ops)
    return Program(program.lanes, inputs, ops, tuple(fresh[v.name] for v in program.outputs), program.tokens)


def _renamed(op: Op, new: Any) -> Op:
    match op:
        case Decay(factor):
            return Decay(new(factor))
        case Read(out, x):
            return Read(x=new(x), out=new(out))
        case Update(left, right):
            return Update(new(left), new(right))
        case Map(out, fn, args):
            renamed = tuple(new(a) if isinstance(a, Var) else a for a in args)
            return Map(new(out), fn, renamed)
        case _:
            assert_never(op)
