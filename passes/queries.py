"""Several queries that read one state at once, taken apart: each is a read of its own."""

from __future__ import annotations

from itertools import product
from math import prod

import torch
from torch.fx import Node

from kvbuffer_compile.passes.graph import shape
from kvbuffer_compile.passes.labels import Dim, resolved
from kvbuffer_compile.passes.operands import Inserter
from kvbuffer_compile.passes.terms import held
from kvbuffer_compile.passes.vary import WIDEST
from kvbuffer_compile.passes.versions import ReadOut
from kvbuffer_compile.passes.walk import Walk

aten = torch.ops.aten
Queries = dict[Node, list[tuple[tuple[int, ...], Node]]]  # read -> (position of each query, its node)


def taken_apart(walks: list[Walk], insert: Inserter) -> Queries:
    """Nodes that select each query of a wide read from it; all other users get them stacked again."""
    found: Queries = {}
    for walk in walks:
        for node, read in walk.reads.items():
            flat, at = _dims(walk, read)
            sizes = [flat[i].size for i in at]
            if at and node not in found and all(isinstance(n, int) for n in sizes) and prod(map(int, sizes)) <= WIDEST:
                found[node] = _selected(node, flat, at, insert)
    return found


def _dims(walk: Walk, read: ReadOut) -> tuple[Dim, list[int]]:
    """The atoms of a read one by one, and which of them are queries: no index of the state."""
    flat = tuple(a for dim in resolved(read.labels) for a in dim)
    return flat, [i for i, a in enumerate(flat) if a.at is None and not walk.own([a])]


def _selected(node: Node, flat: Dim, at: list[int], insert: Inserter) -> list[tuple[tuple[int, ...], Node]]:
    users = list(node.users)
    apart = insert.call(aten.reshape.default, node, [insert.size(a.size) for a in flat])
    out = []
    for position in product(*(range(int(flat[i].size)) for i in at)):
        one = apart
        for dim, index in reversed(list(zip(at, position, strict=True))):
            one = insert.call(aten.select.int, one, dim, index)
        out.append((position, one))
    whole = _stacked([one for _, one in out], at, flat, insert)
    whole = insert.call(aten.reshape.default, whole, [insert.size(n) for n in shape(node)])
    for user in users:
        user.replace_input_with(node, whole)
    return out


def _stacked(nodes: list[Node], at: list[int], flat: Dim, insert: Inserter) -> Node:
    """The inverse of selecting at all positions, the last index first."""
    for done, dim in enumerate(reversed(at)):
        size = int(flat[dim].size)
        kept = len(at) - 1 - done  # indices that are still selected, all of them in front of this one
        groups = [nodes[i : i + size] for i in range(0, len(nodes), size)]
        # as decompositions leave it: Inductor refuses an aten.stack behind them
        groups = [[insert.call(aten.unsqueeze.default, n, dim - kept) for n in group] for group in groups]
        nodes = [insert.call(aten.cat.default, group, dim - kept) for group in groups]
    return nodes[0]


def adopt(walk: Walk, queries: Queries) -> Walk:
    """The walk with a read for each query in place of each wide read."""
    reads: dict[Node, ReadOut] = {}
    for node, read in walk.reads.items():
        if node in queries:
            reads |= {one: _query(walk, read, position, one) for position, one in queries[node]}
        else:
            reads[node] = read
    walk.reads = reads
    return walk


def _query(walk: Walk, read: ReadOut, position: tuple[int, ...], node: Node) -> ReadOut:
    flat, at = _dims(walk, read)
    factors, labels = read.factors, tuple((a,) for i, a in enumerate(flat) if i not in at)
    for i, index in zip(at, position, strict=True):
        factors = tuple(held(f, flat[i], index) for f in factors)
    return ReadOut(node, read.version, factors, read.contracted, labels)
