"""The pointwise vocabulary: what an ATen overload is called in C++ and in Triton.

One row an overload. A spelling is a format string of the positional arguments, which are names or literals, so no
parentheses are needed around them; arguments left out take the row's defaults. Truth values are numbers, 0 or 1.
The reference of a row is the ATen op itself. C++ names without `std::` are functions of numbers.h.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from kvbuffer_compile.errors import EmitError
from kvbuffer_compile.ir.program import REDUCTIONS, Map


@dataclass(frozen=True)
class Call:
    """Spellings of one op with {0}, {1}, ... for its arguments, of which the last ones may have defaults."""

    cpp: str
    triton: str
    arity: int
    defaults: tuple[float, ...] = ()


def _same(spelling: str, arity: int, *defaults: float) -> Call:
    return Call(spelling, spelling, arity, defaults)


def _truth(cpp: str, triton: str, arity: int = 2) -> Call:
    return Call(f"truth({cpp})", f"({triton}).to(tl.float32)", arity)


def _lib(name: str, arity: int = 1) -> Call:
    arguments = "{0}" if arity == 1 else "{0}, {1}"
    return Call(f"std::{name}({arguments})", f"libdevice.{name}({arguments})", arity)


def _tl(name: str) -> Call:
    return Call(f"std::{name}({{0}})", f"tl.{name}({{0}})", 1)


_ALL = "propagate_nan=tl.PropagateNan.ALL"
_POW = Call("std::pow({0}, {1})", "libdevice.pow({0}, {1})", 2)
_MAX = Call("maximum({0}, {1})", f"tl.maximum({{0}}, {{1}}, {_ALL})", 2)
_MIN = Call("minimum({0}, {1})", f"tl.minimum({{0}}, {{1}}, {_ALL})", 2)
_CLAMP = Call("minimum(maximum({0}, {1}), {2})", f"tl.minimum(tl.maximum({{0}}, {{1}}, {_ALL}), {{2}}, {_ALL})", 3)
_WHERE = Call("{0} != 0 ? {1} : {2}", "tl.where({0} != 0, {1}, {2})", 3)
# From the nearer end, as torch does.
_LERP = Call(
    "std::abs({2}) < Real(0.5) ? {0} + {2} * ({1} - {0}) : {1} - ({1} - {0}) * (Real(1) - {2})",
    "tl.where(tl.abs({2}) < 0.5, {0} + {2} * ({1} - {0}), {1} - ({1} - {0}) * (1.0 - {2}))",
    3,
)
# With the sign of the divisor, as torch and Python have it.
_REST = "libdevice.fmod({0}, {1})"
_REMAINDER = Call(
    "modulo({0}, {1})", f"tl.where(({_REST} != 0) & (({_REST} < 0) != ({{1}} < 0)), {_REST} + {{1}}, {_REST})", 2
)
_AND = _truth("({0} != 0) && ({1} != 0)", "({0} != 0) & ({1} != 0)")
_OR = _truth("({0} != 0) || ({1} != 0)", "({0} != 0) | ({1} != 0)")
_XOR = _truth("({0} != 0) != ({1} != 0)", "({0} != 0) != ({1} != 0)")
_NOT = _truth("{0} == 0", "{0} == 0", 1)
_COMPARE = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}

# Without overload: the Tensor and the Scalar one alike.
_BINARY = {
    "add": _same("{0} + {2} * {1}", 3, 1),
    "sub": _same("{0} - {2} * {1}", 3, 1),
    "rsub": _same("{1} - {2} * {0}", 3, 1),
    "mul": _same("{0} * {1}", 2),
    "div": _same("{0} / {1}", 2),
    "remainder": _REMAINDER,
    "fmod": _lib("fmod", 2),
    "copysign": _lib("copysign", 2),
    **{name: _truth(f"{{0}} {sign} {{1}}", f"{{0}} {sign} {{1}}") for name, sign in _COMPARE.items()},
}
# With overload "default".
_UNARY = {
    "neg": _same("-{0}", 1),
    "exp": Call("exponential({0})", "tl.exp({0})", 1),
    "log": _tl("log"), "exp2": _tl("exp2"), "log2": _tl("log2"),
    "erf": _tl("erf"), "sin": _tl("sin"), "cos": _tl("cos"), "tan": _lib("tan"),
    "asin": _lib("asin"), "acos": _lib("acos"), "atan": _lib("atan"), "atan2": _lib("atan2", 2),
    "sinh": _lib("sinh"), "cosh": _lib("cosh"), "asinh": _lib("asinh"), "acosh": _lib("acosh"), "atanh": _lib("atanh"),
    "erfc": _lib("erfc"), "lgamma": _lib("lgamma"), "log10": _lib("log10"), "hypot": _lib("hypot", 2),
    "trunc": _lib("trunc"), "positive": _same("{0}", 1),
    "isnan": _truth("{0} != {0}", "{0} != {0}", 1),
    "isinf": _truth("std::abs({0}) == Real(INFINITY)", 'tl.abs({0}) == float("inf")', 1),
    "signbit": _truth("std::signbit({0})", "libdevice.signbit({0}) != 0", 1),
    "floor": _tl("floor"), "ceil": _tl("ceil"), "abs": _tl("abs"),
    "expm1": _lib("expm1"), "log1p": _lib("log1p"), "tanh": _lib("tanh"),
    "round": Call("std::nearbyint({0})", "libdevice.rint({0})", 1),
    "sqrt": Call("std::sqrt({0})", "tl.sqrt_rn({0})", 1),
    "rsqrt": Call("Real(1) / std::sqrt({0})", "tl.rsqrt({0})", 1),
    "reciprocal": Call("Real(1) / {0}", "1.0 / {0}", 1),
    "square": _same("{0} * {0}", 1),
    "sign": Call("truth({0} > 0) - truth({0} < 0)", "tl.where({0} > 0, 1.0, tl.where({0} < 0, -1.0, 0.0))", 1),
    "sigmoid": Call("sigmoid({0})", "tl.sigmoid({0})", 1),
    "silu": Call("{0} * sigmoid({0})", "{0} * tl.sigmoid({0})", 1),
    "relu": Call("maximum({0}, Real(0))", f"tl.maximum({{0}}, 0.0, {_ALL})", 1),
    "gelu": Call("gelu({0})", "0.5 * {0} * (1.0 + tl.erf({0} * 0.7071067811865476))", 1),
    "softplus": Call(
        "softplus({0}, {1}, {2})",
        "tl.where({0} * {1} > {2}, {0}, libdevice.log1p(tl.exp({0} * {1})) / {1})", 3, (1, 20),
    ),
    "leaky_relu": Call("{0} > 0 ? {0} : {0} * {1}", "tl.where({0} > 0, {0}, {0} * {1})", 2, (0.01,)),
    "maximum": _MAX, "minimum": _MIN,
    "clamp": _CLAMP, "clamp_min": _MAX, "clamp_max": _MIN,
    "logical_not": _NOT, "logical_and": _AND, "logical_or": _OR, "logical_xor": _XOR, "bitwise_not": _NOT,
    "alias": _same("{0}", 1), "clone": _same("{0}", 1), "detach": _same("{0}", 1),
}  # fmt: skip
_OTHER = {
    "pow.Tensor_Scalar": _POW, "pow.Tensor_Tensor": _POW, "pow.Scalar": _POW,
    "bitwise_and.Tensor": _AND, "bitwise_or.Tensor": _OR, "bitwise_xor.Tensor": _XOR,  # of truth values
    "where.self": _WHERE, "where.ScalarOther": _WHERE, "where.ScalarSelf": _WHERE, "where.Scalar": _WHERE,
    "clamp.Tensor": _CLAMP, "clamp_min.Tensor": _MAX, "clamp_max.Tensor": _MIN,
    "addcmul.default": _same("{0} + {1} * {2}", 3), "lerp.Tensor": _LERP, "lerp.Scalar": _LERP,
}  # fmt: skip


def _table() -> Iterator[tuple[str, Call]]:
    for name, call in _BINARY.items():
        yield from ((f"aten.{name}.{kind}", call) for kind in ("Tensor", "Scalar"))
    yield from ((f"aten.{name}.default", call) for name, call in _UNARY.items())
    yield from ((f"aten.{name}", call) for name, call in _OTHER.items())


CALLS: dict[str, Call] = dict(_table())

# Function of rows.h over (pointer, length); Triton function over (values, axis).
CPP_REDUCTIONS = {
    "aten.sum.dim_IntList": "sum",
    "aten.mean.dim": "mean",
    "aten.amax.default": "largest",
    "aten.amin.default": "smallest",
}
TRITON_REDUCTIONS = {
    "aten.sum.dim_IntList": "tl.sum({0}, {1})",
    "aten.mean.dim": "tl.sum({0}, {1}) / {2}",
    "aten.amax.default": "tl.max({0}, {1})",
    "aten.amin.default": "tl.min({0}, {1})",
}
assert set(CPP_REDUCTIONS) == set(TRITON_REDUCTIONS) == REDUCTIONS


def spellable(op: Map) -> bool:
    """Whether a Map can be printed."""
    call = CALLS.get(op.fn)
    if call is None:
        return op.fn in REDUCTIONS
    return call.arity - len(call.defaults) <= len(op.args) <= call.arity


def cpp(fn: str, args: list[str | float]) -> str:
    """The C++ expression of a pointwise call; args are names, or numbers to be printed as literals."""
    return _spell(fn, args, lambda call: call.cpp, cpp_number)


def triton(fn: str, args: list[str | float]) -> str:
    """The Triton expression of a pointwise call."""
    return _spell(fn, args, lambda call: call.triton, triton_number)


def _spell(fn: str, args: list[str | float], spelling: Callable[[Call], str], number: Callable[[float], str]) -> str:
    call = CALLS.get(fn)
    if call is None:
        raise EmitError(f"{fn} has no spelling: add a row to codegen/calls.py, or keep it outside of the step")
    missing = call.arity - len(args)
    if not 0 <= missing <= len(call.defaults):
        raise EmitError(f"{fn} takes {call.arity} arguments, got {len(args)}: {args}")
    given = [*args, *call.defaults[len(call.defaults) - missing :]]
    text = spelling(call).format(*(a if isinstance(a, str) else number(a) for a in given))
    return text.replace("Real(1) * ", "").replace("1.0 * ", "") if call.defaults == (1,) else text


def cpp_number(x: float) -> str:
    """A literal of the compute type."""
    if math.isnan(x):
        return "Real(NAN)"
    if math.isinf(x):
        return "Real(INFINITY)" if x > 0 else "Real(-INFINITY)"
    return f"Real({float(x)!r})" if float(x) != int(x) or abs(x) >= 2**31 else f"Real({int(x)})"


def triton_number(x: float) -> str:
    """A literal of a Triton kernel."""
    if math.isnan(x) or math.isinf(x):
        return f'float("{x}")'
    return repr(float(x))
