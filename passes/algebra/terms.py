"""Values as expressions over graph nodes in labelled use: what walking, factoring and assembling hand to each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

from torch.fx import Node

from kvbuffer_compile.ir.program import REDUCTIONS
from kvbuffer_compile.passes.reading.labels import Atom, Dim, Labels, fixed, renamed, resolved

Number = float | int | bool


class Refusal(Exception):
    """This state cannot be served. rule and reason as in errors.Declined."""

    def __init__(self, node: Node, rule: str, reason: str) -> None:
        super().__init__(reason)
        self.node, self.rule, self.reason = node, rule, reason


@dataclass(frozen=True)
class Leaf:
    """The value of a node whose dims run over `labels`, constant along every other index."""

    node: Node
    labels: Labels


@dataclass(frozen=True)
class Call:
    """A pointwise call, broadcasting over indices, or a reduction of ir.REDUCTIONS over the whole key or value axis."""

    fn: str
    args: tuple[Expr, ...]


@dataclass(frozen=True)
class Ones:
    """1 along the whole key (or value) axis."""

    key: bool


@dataclass(frozen=True)
class Fetch:
    """A read of the memory with x along the key (or value) axis. stage: where in the program it happens."""

    x: Expr
    key: bool
    stage: int


@dataclass(frozen=True)
class Mask:
    """In a product: the rest where the condition holds (keep) or fails; 0 elsewhere, even if the rest is NaN."""

    condition: Expr
    keep: bool


Expr = Leaf | Call | Ones | Fetch | Number
Factor = Expr | Mask
Term = tuple[Factor, ...]  # a product; () is 1


def times(term: Term, factor: Factor) -> Term:
    """The product with one more factor; numbers next to each other are one, and none when that is 1."""
    if isinstance(factor, int | float):
        if term and isinstance(term[-1], int | float):
            return times(term[:-1], term[-1] * factor)
        return term if factor == 1 else (*term, factor)
    return (*term, factor)


def settled(expr: Expr) -> Expr:
    """The expression with resolved labels: equal values of equal spelling compare equal."""
    match expr:
        case Leaf(node, labels):
            return Leaf(node, resolved(labels))
        case Call(fn, args):
            return Call(fn, tuple(settled(a) for a in args))
        case Fetch(x, key, stage):
            return Fetch(settled(x), key, stage)
        case _:
            return expr


def settled_factor(factor: Factor) -> Factor:
    """`settled` for a factor of a product."""
    return Mask(settled(factor.condition), factor.keep) if isinstance(factor, Mask) else settled(factor)


def held(factor: Factor, atom: Atom, at: int) -> Factor:
    """The factor with one index held at a position."""
    return _relabelled(factor, lambda labels: fixed(labels, atom, at))


def counted(factor: Factor, atom: Atom, token: Atom) -> Factor:
    """The factor with one index as that of the tokens of a block."""
    return _relabelled(factor, lambda labels: renamed(labels, atom, token))


def _relabelled(factor: Factor, change: Callable[[Labels], Labels]) -> Factor:
    if isinstance(factor, Mask):
        return Mask(_changed(factor.condition, change), factor.keep)
    return _changed(factor, change)


def _changed(expr: Expr, change: Callable[[Labels], Labels]) -> Expr:
    match expr:
        case Leaf(node, labels):
            return Leaf(node, change(labels))
        case Call(fn, args):
            return Call(fn, tuple(_changed(a, change) for a in args))
        case _:
            return expr


def leaves(factor: Factor) -> list[Leaf]:
    """All leaves of a factor."""
    match factor:
        case Leaf():
            return [factor]
        case Call(_, args):
            return [leaf for a in args for leaf in leaves(a)]
        case Mask(condition, _):
            return leaves(condition)
        case Fetch(x, _, _):
            return leaves(x)
        case _:
            return []


def mul(*factors: Expr) -> Expr:
    """The product; numbers are folded and ones left out."""
    number: Number = 1
    rest: list[Expr] = []
    for f in factors:
        if isinstance(f, int | float):
            number = number * f
        else:
            rest.append(f)
    if not rest or number == 0:
        return number
    out = rest[0]
    for f in rest[1:]:
        out = Call("aten.mul.Tensor", (out, f))
    return out if number == 1 else Call("aten.mul.Tensor", (out, number))


def add(*terms: Expr) -> Expr:
    """The sum; zeros are left out."""
    out: Expr = 0.0
    for term in terms:
        if isinstance(out, int | float) and isinstance(term, int | float):
            out = out + term
        elif isinstance(term, int | float) and term == 0:
            continue
        elif isinstance(out, int | float) and out == 0:
            out = term
        else:
            out = Call("aten.add.Tensor", (out, term) if not isinstance(out, int | float) else (term, out))
    return out


def where(condition: Expr, x: Expr, y: Expr) -> Expr:
    """x where the condition holds, y elsewhere, in the overload for what is a number."""
    left, right = isinstance(x, int | float), isinstance(y, int | float)
    name = "Scalar" if left and right else "ScalarSelf" if left else "ScalarOther" if right else "self"
    return Call(f"aten.where.{name}", (condition, x, y))


def product(term: Term) -> Expr:
    """The value of a product, its masks applied as where(mask, product, 0): the other branch may hold NaN."""
    out = mul(*(f for f in term if not isinstance(f, Mask)))
    for f in term:
        if isinstance(f, Mask):
            out = where(f.condition, out, 0.0) if f.keep else where(f.condition, 0.0, out)
    return out


def is_reduction(expr: Expr) -> bool:
    """Whether the expression contains a reduction."""
    return isinstance(expr, Call) and (expr.fn in REDUCTIONS or any(map(is_reduction, expr.args)))


def mean(node: Node, contracted: Dim) -> float:
    """What a mean over these indices multiplies their sum by."""
    sizes = [a.size for a in contracted if isinstance(a.size, int)]
    if len(sizes) < len(contracted):
        raise Refusal(node, "dynamic-size", "a mean over an axis whose size is not known")
    return 1 / prod(sizes)
