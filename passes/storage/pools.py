"""A tensor with the states of many sequences, a slot each, of which a step takes some, updates them and puts them back:

    S = pool[slots]; ...; pool[slots] = S

While a graph is lifted the rows that are taken stand in it as an input (`taken`), a state like any other. Afterwards
the pool takes their place again (`put_back`). Gathering and scattering by the same indices is the identity on those
rows and leaves all others alone; of equal indices the last is stored.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from kvbuffer_compile.errors import Declined
from kvbuffer_compile.ir.plan import Plan
from kvbuffer_compile.passes.lifted import Lifted, Pool
from kvbuffer_compile.passes.reading.arguments import argument, shape, tensor
from kvbuffer_compile.passes.reading.aten import read
from kvbuffer_compile.passes.reading.captured import written
from kvbuffer_compile.passes.reading.forms import Cast, Constant, Metadata

aten = torch.ops.aten
GATHERS = frozenset({aten.index.Tensor, aten._unsafe_index.Tensor, aten.index_select.default})
SCATTERS = frozenset({aten.index_put.default, aten._unsafe_index_put.default, aten.index_copy.default})
DEEPEST = 8  # how far back two computations of an index are compared


def taken(gm: GraphModule) -> tuple[Pool, ...]:
    """Let an input stand for the rows that are taken of each pool, behind all other inputs. Changes gm."""
    found = (_taken(gm.graph, state, write) for state, write in written(gm).items())
    return tuple(pool for pool in found if pool is not None)


def _taken(graph: Graph, state: Node, write: Node) -> Pool | None:
    put = write.args[1]
    assert isinstance(put, Node)
    if state.op != "placeholder" or put.target not in SCATTERS or put.args[0] is not state or len(put.users) > 1:
        return None
    slots, value = _index(put), argument(put, 3 if put.target is aten.index_copy.default else 2, "values")
    gathers = [n for n in state.users if n.target in GATHERS]
    others = [n for n in state.users if n not in gathers and not isinstance(read(n), Metadata | Constant)]
    if slots is None or set(others) != {put, write} or not gathers or not isinstance(value, Node):
        return None
    alike = all(_is_alike(_index(n), slots, DEEPEST) and _fits(n, value) for n in gathers)
    if not alike or argument(put, 3, "accumulate") is True:
        return None
    rows = _input(graph, state, gathers[0])
    for gather in gathers:
        gather.replace_all_uses_with(rows)
    pool = Pool(rows, state, slots, gathers[0], (put.target, put.args, value))
    _store(graph, rows, _full(value, rows, put), write)
    graph.erase_node(put)
    return pool


def _index(node: Node) -> Node | None:
    """The one-dimensional integer index of whole rows along dim 0; None for any other."""
    if node.target in (aten.index_select.default, aten.index_copy.default):
        index, dim = argument(node, 2, "index"), argument(node, 1, "dim")
        given = [index] if dim == 0 else []
    else:
        given = list(argument(node, 1, "indices"))
    if not given or not isinstance(given[0], Node) or any(x is not None for x in given[1:]):
        return None
    value = tensor(given[0])
    whole = value is not None and value.dim() == 1 and value.dtype in (torch.int32, torch.int64)
    return given[0] if whole else None


def _fits(gather: Node, value: Node) -> bool:
    """Whether what is stored has the shape and dtype of what was taken, but for leading dims of size 1: `pool[slots] =`
    drops those."""
    old, new = tensor(gather), tensor(value)
    if old is None or new is None or old.dtype != new.dtype or new.dim() > old.dim():
        return False
    return (1,) * (old.dim() - new.dim()) + shape(value) == shape(gather)


def _full(value: Node, rows: Node, put: Node) -> Node:
    """A value with its leading dims of size 1."""
    for _ in range(len(shape(rows)) - len(shape(value))):
        with put.graph.inserting_before(put):
            wider = put.graph.call_function(aten.unsqueeze.default, (value, 0))
        wider.meta = {**value.meta, "val": value.meta["val"].unsqueeze(0)}
        value = wider
    return value


def _is_alike(a: Any, b: Any, depth: int) -> bool:
    """Whether two values are computed alike: the same node, or the same call on values computed alike."""
    a, b = _narrow(a), _narrow(b)
    if a is b or not isinstance(a, Node) or not isinstance(b, Node):
        return a is b or (not isinstance(a, Node | list | tuple) and type(a) is type(b) and a == b)
    pure = isinstance(a.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded not in a.target.tags
    if not pure or a.is_impure() or a.target is not b.target or a.kwargs != b.kwargs or len(a.args) != len(b.args):
        return False
    return depth > 0 and all(_is_alike(x, y, depth - 1) for x, y in zip(a.args, b.args, strict=True))


def _narrow(x: Any) -> Any:
    """An int32 index behind its cast to int64."""
    while isinstance(x, Node) and isinstance(form := read(x), Cast):
        old, new = tensor(form.x), tensor(x)
        if old is None or new is None or (old.dtype, new.dtype) != (torch.int32, torch.int64):
            break
        x = form.x
    return x


def _input(graph: Graph, state: Node, gather: Node) -> Node:
    with graph.inserting_after(graph.find_nodes(op="placeholder")[-1]):
        rows = graph.placeholder(f"{state.name}_rows")
    rows.meta = {**gather.meta}
    return rows


def _store(graph: Graph, target: Node, value: Node, write: Node) -> None:
    """Store a value in another input than `write` does."""
    with graph.inserting_before(write):
        copy = graph.call_function(aten.copy_.default, (target, value))
    copy.meta = {**write.meta, "val": target.meta["val"]}
    graph.erase_node(write)


def misplaced(lifted: Lifted) -> Declined | None:
    """Why a program cannot be run on slots: its sequences are not the slots."""
    if lifted.layout.sequence and len(lifted.layout.dims[0]) == 1:
        return None
    reason = "the slots of the pool are no sequences of the recurrence: they are joined with one of its axes"
    return Declined(lifted.state.name, "partial", reason, lifted.source)


def put_back(pools: Iterable[Pool], chosen: list[tuple[Lifted, Plan]]) -> list[tuple[Lifted, Plan]]:
    """The pools in place of their rows, in the graph and in what was chosen. What was not chosen is gathered and
    scattered as before."""
    plans = {lifted.state: (lifted, plan) for lifted, plan in chosen}
    for pool in pools:
        graph = pool.rows.graph
        (write,) = [n for n in pool.rows.users if n.target is aten.copy_.default and n.args[0] is pool.rows]
        pool.rows.replace_all_uses_with(pool.gather)
        graph.erase_node(pool.rows)
        for size in [n for n in pool.gather.users if n.target is aten.sym_size.int]:
            dim = size.args[1]
            size.args = (pool.slots, 0) if dim == 0 else (pool.state, dim)
        if pool.rows in plans:
            lifted, plan = plans[pool.rows]
            plans[pool.rows] = replace(lifted, state=pool.state), plan
        else:
            _put(pool, write)
    return list(plans.values())


def _put(pool: Pool, write: Node) -> None:
    """Scatter what is stored in the end."""
    graph, (target, args, old) = write.graph, pool.put
    value = write.args[1]
    with graph.inserting_before(write):
        put = graph.call_function(target, tuple(value if x is old else x for x in args))
    put.meta["val"] = pool.state.meta["val"]
    _store(graph, pool.state, put, write)
