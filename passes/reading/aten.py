"""Reading FX nodes: the form of each ATen call.

Everything the lift knows about operations is here, in one table.
"""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch.fx import Node

from kvbuffer_compile.passes.reading.arguments import (
    argument,
    have_one_shape,
    operand,
    positive,
    rank_of,
    shape,
    tensor,
)
from kvbuffer_compile.passes.reading.concatenation import JOINS
from kvbuffer_compile.passes.reading.forms import (
    Cast,
    Choice,
    Constant,
    Contract,
    Cumulative,
    Expand,
    Form,
    Metadata,
    Opaque,
    Permute,
    Pointwise,
    Product,
    Quotient,
    Reduce,
    Regroup,
    Same,
    Select,
    Slice,
    Sum,
    Token,
    Variance,
    Write,
)
from kvbuffer_compile.passes.reading.labels import size_of

aten = torch.ops.aten


def read(node: Node) -> Form:
    """The form of a node."""
    if node.op != "call_function":
        return Opaque()
    if node.target is operator.getitem:
        return _getitem(node)
    if not isinstance(node.target, torch._ops.OpOverload):
        return Metadata() if tensor(node) is None else Opaque()
    reader = READERS.get(str(node.target.overloadpacket)) or READERS.get(str(node.target))
    if reader is not None:
        return reader(node)
    if tensor(node) is None:
        return Metadata() if str(node.target.overloadpacket).startswith("aten.sym_") else Opaque()
    tags = node.target.tags
    if torch.Tag.pointwise in tags and torch.Tag.nondeterministic_seeded not in tags:
        return _pointwise(node)
    return Opaque()


# ---------------------------------------------------------------------------------------------- readers


def _getitem(node: Node) -> Form:
    """One piece of a split or unbound tensor."""
    whole, index = node.args
    target = str(getattr(whole, "target", "")) if isinstance(whole, Node) else ""
    if not isinstance(whole, Node) or not isinstance(index, int):
        return Opaque()
    if target == "aten.unbind.int":
        x = operand(whole)
        return Select(x, positive(argument(whole, 1, "dim", 0), rank_of(x)), index)
    if target in ("aten.split.Tensor", "aten.split_with_sizes.default"):
        x = operand(whole)
        dim = positive(argument(whole, 2, "dim", 0), rank_of(x))
        sizes = [size_of(piece.shape[dim]) for piece in whole.meta["val"][:index]]
        return Slice(x, dim, sum(sizes)) if all(isinstance(n, int) for n in sizes) else Opaque()
    if target == "aten.var_mean.correction":
        found = _variance(whole)
        return found if index == 0 else Reduce(found.x, found.dims, found.keep, "mean")
    return Opaque()


def _permute(node: Node) -> Form:
    order = argument(node, 1, "dims")
    return Permute(operand(node), tuple(positive(d, len(order)) for d in order))


def _transpose(node: Node) -> Form:
    rank = rank_of(node)
    order = list(range(rank))
    a, b = positive(argument(node, 1, "dim0", 0), rank), positive(argument(node, 2, "dim1", 1), rank)
    if rank > 1:
        order[a], order[b] = order[b], order[a]
    return Permute(operand(node), tuple(order))


def _select(node: Node) -> Form:
    x, index = operand(node), argument(node, 2, "index")
    dim = positive(argument(node, 1, "dim"), rank_of(x))
    size = shape(x)[dim]
    if not isinstance(index, int) or (index < 0 and not isinstance(size, int)):
        return Opaque()
    return Select(x, dim, index % size if isinstance(size, int) else index)


def _slice(node: Node) -> Form:
    x, step = operand(node), argument(node, 4, "step", 1)
    dim = positive(argument(node, 1, "dim", 0), rank_of(x))
    start = argument(node, 2, "start") or 0
    size = shape(x)[dim]
    if shape(node) == shape(x) and step == 1:
        return Same(x)
    if not all(isinstance(n, int) for n in (step, start, size)):
        return Opaque()
    return Slice(x, dim, max(start + size, 0) if start < 0 else start, step)


def _cast(node: Node) -> Form:
    return cast(node, operand(node))


def cast(node: Node, x: Node) -> Form:
    """node as x in the dtype of node, both of one shape."""
    here, there = tensor(node), tensor(x)
    if here is None or there is None or not have_one_shape(node, x):
        return Opaque()
    exact = here.dtype.is_floating_point and there.dtype.is_floating_point
    return Same(x) if here.dtype == there.dtype else Cast(x, exact)


def _copy(node: Node) -> Form:
    """The functional copy(old, new) has the value of new; old is not used."""
    return cast(node, argument(node, 1, "src"))


def _repeat(node: Node) -> Form:
    x = operand(node)
    sizes = ((1,) * rank_of(node) + shape(x))[-rank_of(node) :]
    repeats = argument(node, 1, "repeats")
    plain = all(size == 1 or n == 1 for size, n in zip(sizes, repeats, strict=True))
    return Expand(x) if plain else Opaque()


def _sum(sign: int) -> Callable[[Node], Form]:
    def reader(node: Node) -> Form:
        alpha = node.kwargs.get("alpha", argument(node, 2, "alpha", 1))
        if not isinstance(alpha, int | float):
            return Opaque()
        return Sum(operand(node), argument(node, 1, "other"), sign * alpha)

    return reader


def _rsub(node: Node) -> Form:
    alpha = node.kwargs.get("alpha", argument(node, 2, "alpha", 1))
    return Sum(argument(node, 1, "other"), operand(node), -alpha) if isinstance(alpha, int | float) else Opaque()


def _div(node: Node) -> Form:
    if node.kwargs.get("rounding_mode") is not None:
        return _pointwise(node)
    return Quotient(operand(node), argument(node, 1, "other"))


def _reduce(fn: str) -> Callable[[Node], Form]:
    def reader(node: Node) -> Form:
        x = operand(node)
        rank = rank_of(x)
        overall = str(node.target).endswith(".default") and fn in ("sum", "mean")
        dims = None if overall else argument(node, 1, "dim")
        given = range(rank) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
        keep = bool(argument(node, 2, "keepdim", False)) and not overall
        return Reduce(x, tuple(sorted(positive(d, rank) for d in given)), keep, fn)

    return reader


def _variance(node: Node) -> Variance:
    """var, or the first of var_mean."""
    x = operand(node)
    rank, given = rank_of(x), argument(node, 1, "dim")
    dims = tuple(sorted(positive(d, rank) for d in given or range(rank)))
    correction = node.kwargs.get("correction")
    return Variance(x, dims, bool(node.kwargs.get("keepdim")), 1 if correction is None else correction)  # type: ignore[arg-type]


def _cumulative(fn: str) -> Callable[[Node], Form]:
    return lambda n: Cumulative(operand(n), positive(argument(n, 1, "dim"), rank_of(n)), fn)


def _contract(*letters: str) -> Callable[[Node], Form]:
    def reader(node: Node) -> Form:
        x, y = node.args[:2]
        assert isinstance(x, Node) and isinstance(y, Node)
        return Contract(x, y, (letters[0], letters[1], letters[2]))

    return reader


def _filled(position: int, name: str, default: float | None = None) -> Callable[[Node], Form]:
    def reader(node: Node) -> Form:
        value = argument(node, position, name, default) if position >= 0 else default
        return Constant(float(value) if isinstance(value, int | float) else None)

    return reader


def _where(node: Node) -> Form:
    if len(node.args) != 3:
        return Opaque()
    condition, x, y = node.args
    return Choice(condition, x, y)  # type: ignore[arg-type]


def _masked_fill(node: Node) -> Form:
    x, condition, value = node.args[:3]
    return Choice(condition, value, x)  # type: ignore[arg-type]


def _pointwise(node: Node) -> Form:
    if any(v is not None for v in node.kwargs.values()):
        return Opaque()
    args = list(node.args)
    while args and args[-1] is None:
        args.pop()
    if not all(isinstance(a, Node | int | float | bool) for a in args):
        return Opaque()
    return Pointwise(str(node.target), tuple(args))


READERS: dict[str, Callable[[Node], Form]] = {
    **dict.fromkeys(
        ("aten.view.default", "aten._unsafe_view", "aten.reshape", "aten.unsqueeze", "aten.squeeze", "aten.flatten",
         "aten.unflatten", "aten._reshape_alias"),
        lambda n: Regroup(operand(n)),
    ),
    **dict.fromkeys(("aten.permute", "aten.permute_copy"), _permute),
    **dict.fromkeys(("aten.transpose", "aten.t"), _transpose),
    **dict.fromkeys(("aten.clone", "aten.alias", "aten.detach", "aten.lift_fresh_copy", "prims.view_of"), _cast),
    **dict.fromkeys(("aten._to_copy", "prims.convert_element_type", "aten.to"), _cast),
    "aten.copy": _copy,
    "aten.expand": lambda n: Expand(operand(n)),
    "aten.repeat": _repeat,
    "aten.select.int": _select,
    "aten.slice.Tensor": _slice,
    "aten.mul": lambda n: Product(operand(n), argument(n, 1, "other")),
    "aten.square": lambda n: Product(operand(n), operand(n)),
    "aten.neg": lambda n: Product(operand(n), -1.0),
    "aten.div": _div,
    "aten.reciprocal": lambda n: Quotient(1.0, operand(n)),
    "aten.add": _sum(1),
    "aten.sub": _sum(-1),
    "aten.rsub": _rsub,
    "aten.where": _where,
    "aten.masked_fill": _masked_fill,
    "aten.bmm.default": _contract("bic", "bcj", "bij"),
    "aten.mm.default": _contract("ic", "cj", "ij"),
    "aten.mv": _contract("ic", "c", "i"),
    "aten.dot": _contract("c", "c", ""),
    **{f"aten.{fn}": _reduce(fn) for fn in ("sum", "mean", "amax", "amin", "prod", "any", "all")},
    "aten.var.correction": _variance,
    **{f"aten.{fn}.default": _cumulative(fn) for fn in ("cumsum", "cumprod")},
    **dict.fromkeys(("aten.full", "aten.full_like", "aten.fill.Scalar"), _filled(1, "fill_value")),
    "aten.new_full": _filled(2, "fill_value"),
    "aten.scalar_tensor": _filled(0, "s"),
    **dict.fromkeys(("aten.zeros", "aten.zeros_like", "aten.new_zeros", "aten.zero"), _filled(-1, "", 0.0)),
    **dict.fromkeys(("aten.ones", "aten.ones_like", "aten.new_ones"), _filled(-1, "", 1.0)),
    **dict.fromkeys(("aten.empty", "aten.empty_like", "aten.new_empty", "aten.empty_permuted"), _filled(-1, "")),
    **JOINS,
    "aten.copy_": lambda n: Write(operand(n), argument(n, 1, "src")),
    "kvbuffer.sequence": lambda n: Metadata(),  # its one token, written out beside it, is what uses the state
    "kvbuffer.stands_for": lambda n: Same(operand(n)),
    "kvbuffer.token": lambda n: Token(operand(n), argument(n, 1, "dim")),
}  # fmt: skip
