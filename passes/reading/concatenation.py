"""Calls that make one dim out of parts: cat, stack, pad, flip, and the scatters of a slice."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch.fx import Node

from kvbuffer_compile.passes.reading.arguments import argument, operand, positive, rank_of, shape, tensor
from kvbuffer_compile.passes.reading.forms import WIDEST, Blocks, Form, Join, Opaque, Operand
from kvbuffer_compile.passes.reading.labels import Size

Part = tuple[Operand, int | None]


def _cat(node: Node) -> Form:
    xs = argument(node, 0, "tensors")
    dim = positive(argument(node, 1, "dim", 0), rank_of(node))
    if not _are_alike(node, xs):
        return Opaque()
    if len({shape(x) for x in xs}) == 1:
        return Blocks(tuple(xs), dim)
    return _join(dim, (part for x in xs for part in _whole(x, dim)), shape(node)[dim])


def _stack(node: Node) -> Form:
    xs = argument(node, 0, "tensors")
    dim = positive(argument(node, 1, "dim", 0), rank_of(node))
    same = _are_alike(xs[0], xs) and _have_one_dtype(node, xs[0])
    return _join(dim, ((x, None) for x in xs), shape(node)[dim]) if same else Opaque()


def _are_alike(node: Node, xs: Iterable[Node]) -> bool:
    here, values = tensor(node), [tensor(x) for x in xs]
    return here is not None and len({(v.dtype, v.dim()) if v is not None else None for v in (here, *values)}) == 1


def _whole(x: Node, dim: int) -> Iterable[Part]:
    size = shape(x)[dim]
    return ((x, i) for i in range(size)) if isinstance(size, int) else ()


def _join(dim: int, parts: Iterable[Part], size: Size) -> Form:
    """Opaque when the dim is too long to look at its positions, or the parts are not as many."""
    if not isinstance(size, int) or size > WIDEST:
        return Opaque()
    found = tuple(parts)
    return Join(dim, found) if len(found) == size else Opaque()


def _scattered(node: Node, places: Callable[[int], list[int]], dim: int, keep: bool) -> Form:
    """x with another tensor in some of its places; keep: that tensor has the dim, too."""
    x, src = operand(node), argument(node, 1, "src")
    size = shape(x)[dim]
    if not isinstance(size, int) or size > WIDEST or not _have_one_dtype(x, src):
        return Opaque()
    parts: list[Part] = [(x, i) for i in range(size)]
    for i, place in enumerate(places(size)):
        parts[place] = (src, i if keep else None)
    return Join(dim, tuple(parts))


def _have_one_dtype(x: Node, y: Node) -> bool:
    a, b = tensor(x), tensor(y)
    return a is not None and b is not None and a.dtype == b.dtype


def _select_scatter(node: Node) -> Form:
    dim, index = positive(argument(node, 2, "dim"), rank_of(node)), argument(node, 3, "index")
    return _scattered(node, lambda size: [index % size], dim, False) if isinstance(index, int) else Opaque()


def _slice_scatter(node: Node) -> Form:
    dim = positive(argument(node, 2, "dim", 0), rank_of(node))
    given = argument(node, 3, "start"), argument(node, 4, "end"), argument(node, 5, "step", 1)
    if not all(n is None or isinstance(n, int) for n in given):
        return Opaque()
    return _scattered(node, lambda size: list(range(size))[slice(*given)], dim, True)


def _pad(node: Node) -> Form:
    """Along one dim; the innermost dim comes first in what is given."""
    x, given, value = operand(node), argument(node, 1, "pad"), argument(node, 2, "value", 0)
    last = rank_of(x) - 1
    padded = [i for i in range(len(given) // 2) if given[2 * i] != 0 or given[2 * i + 1] != 0]
    if len(padded) != 1 or not all(isinstance(n, int) and n >= 0 for n in given) or not isinstance(value, int | float):
        return Opaque()
    before, after = given[2 * padded[0]], given[2 * padded[0] + 1]
    dim = last - padded[0]
    fill: list[Part] = [(value, None)]
    return _join(dim, [*fill * before, *_whole(x, dim), *fill * after], shape(node)[dim])


def _flip(node: Node) -> Form:
    x, dims = operand(node), argument(node, 1, "dims")
    if len(dims) != 1:
        return Opaque()
    dim = positive(dims[0], rank_of(x))
    return _join(dim, reversed(list(_whole(x, dim))), shape(x)[dim])


JOINS: dict[str, Callable[[Node], Any]] = {
    "aten.cat.default": _cat,
    "aten.stack.default": _stack,
    "aten.select_scatter.default": _select_scatter,
    "aten.slice_scatter.default": _slice_scatter,
    "aten.constant_pad_nd.default": _pad,
    "aten.flip.default": _flip,
}
