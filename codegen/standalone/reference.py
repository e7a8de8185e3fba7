"""A program as plain torch text: the reference that generated kernels of files of their own are held against."""

from __future__ import annotations

from typing import assert_never

from kvbuffer_compile.codegen.triton.tiles.values import Python
from kvbuffer_compile.ir.program import REDUCTIONS, Decay, Kind, Map, Op, Program, Read, Update, Var

_ACROSS: dict[Kind, str] = {"scalar": "[..., None, None]", "key": "[..., :, None]", "value": "[..., None, :]"}
_SIGNS = {"aten.add.Tensor": "+", "aten.sub.Tensor": "-", "aten.mul.Tensor": "*", "aten.div.Tensor": "/"}


def emit_reference(program: Program) -> str:
    """The function `reference(S, *inputs)` of one token on a dense state [*lanes, K, V], whatever its dtype."""
    out = Python()
    with out.block(f"def reference({', '.join(['S', *(_name(v) for v in program.inputs)])})"):
        out.line('"""One token in plain torch: the new state and the outputs. S [*lanes, K, V] is not changed."""')
        for op in program.ops:
            out.line(_statement(op))
        out.line(f"return S, [{', '.join(_name(v) for v in program.outputs)}]")
    return str(out)


def _name(v: Var) -> str:
    return f"{v.name}_" if v.name in ("S", "torch") else v.name


def _statement(op: Op) -> str:
    match op:
        case Decay(factor):
            return f"S = S * {_name(factor)}{_ACROSS[factor.kind]}"
        case Read(out, x):
            return f"{_name(out)} = (S * {_name(x)}{_ACROSS[x.kind]}).sum({-2 if x.kind == 'key' else -1})"
        case Update(left, right):
            sides = [f"{_name(left)}{_ACROSS[left.kind]}", f"{_name(right)}{_ACROSS[right.kind]}"]
            return f"S = S + {sides[0]} * {sides[1]}"
        case Map():
            return f"{_name(op.out)} = {_call(op)}"
        case _:
            assert_never(op)


def _call(op: Map) -> str:
    """memory.apply_map as text: scalars are lifted to the axis of the result, reductions drop it."""
    args = [_argument(a, op.out.kind) for a in op.args]
    if op.fn in REDUCTIONS:
        (x,) = (a for a in op.args if isinstance(a, Var))
        return f"torch.ops.{op.fn}({_name(x)}, [-1])"
    if op.fn in _SIGNS and len(args) == 2:
        return f"{args[0]} {_SIGNS[op.fn]} {args[1]}"
    return f"torch.ops.{op.fn}({', '.join(args)})"


def _argument(a: Var | float, kind: Kind) -> str:
    if not isinstance(a, Var):
        return repr(a)
    return _name(a) + ("[..., None]" if a.kind == "scalar" and kind != "scalar" else "")
