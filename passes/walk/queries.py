"""Several reads in one node taken apart: of several queries of one state, or of the states of several tokens."""

from __future__ import annotations

from dataclasses import replace
from itertools import groupby, product
from math import prod

import torch
from torch.fx import Node

from kvbuffer_compile.passes.algebra.operands import Inserter
from kvbuffer_compile.passes.algebra.terms import held
from kvbuffer_compile.passes.algebra.versions import ReadOut
from kvbuffer_compile.passes.reading.arguments import shape
from kvbuffer_compile.passes.reading.counterparts import instead
from kvbuffer_compile.passes.reading.forms import WIDEST
from kvbuffer_compile.passes.reading.labels import Dim, hint, pinned, position, resolved, specialised
from kvbuffer_compile.passes.walk.walk import Walk

aten = torch.ops.aten
Place = tuple[int, ...]
Queries = dict[Node, list[tuple[Place, Node]]]  # read -> (position of each query, its node)


def count(walks: list[Walk]) -> None:
    """Make numbers of queries known that are few but symbolic."""
    for walk in walks:
        for node in walk.reads if walk.write is not None else ():
            sizes = node.meta["val"].shape
            foreign = [a.size for a in _flat(walk, node) if not walk.own([a])]
            if prod(hint(n, sizes) for n in foreign) <= WIDEST:
                for n in foreign:
                    specialised(n, sizes)


def taken_apart(walks: list[Walk], insert: Inserter) -> Queries:
    """Nodes that select each query of a wide read from it; all other users get them stacked again."""
    found: Queries = {}
    for walk in walks:
        for node in [*walk.reads, *walk.apart]:
            if node in found:
                continue
            places = sorted(place for place, _ in _single(walk, node))
            if len(places) > 1 and _are_all(places):
                found[node] = _selected(node, _flat(walk, node), walk, places, insert)
    return found


def _flat(walk: Walk, node: Node) -> Dim:
    """The atoms of a read one by one."""
    return _atoms(_pieces(walk, node)[0])


def _pieces(walk: Walk, node: Node) -> list[ReadOut]:
    return [walk.reads[node]] if node in walk.reads else walk.apart[node]


def _atoms(read: ReadOut) -> Dim:
    """Neighbours in a dim that are held at a position each are held together: it does not tell how they were made."""
    runs = (list(run) for dim in resolved(read.labels) for _, run in groupby(dim, lambda a: a.at is None))
    return tuple(a for run in runs for a in _held_together(tuple(run)))


def _held_together(run: Dim) -> Dim:
    at = position(run)
    return run if at is None else pinned(prod(int(a.size) for a in run), at)


def _foreign(walk: Walk, flat: Dim) -> list[int]:
    """Which atoms are no index of the state: they count queries or tokens."""
    return [i for i, a in enumerate(flat) if not walk.own([a])]


def _single(walk: Walk, node: Node) -> list[tuple[Place, ReadOut]]:
    """The reads of one query and one version each that a node consists of, by position; none when they are too many,
    or not counted alike."""
    out = []
    pieces = _pieces(walk, node)
    if len({tuple(a.size for a in _atoms(read)) for read in pieces}) > 1:
        return []
    for read in pieces:
        flat = _atoms(read)
        at = _foreign(walk, flat)
        sizes = [flat[i].size for i in at if flat[i].at is None]
        if not all(isinstance(n, int) for n in sizes) or prod(map(int, sizes)) > WIDEST:
            return []
        ranges = [range(int(a.size)) if a.at is None else range(a.at, a.at + 1) for a in (flat[i] for i in at)]
        for place in product(*ranges):
            factors, labels = read.factors, tuple((a,) for i, a in enumerate(flat) if i not in at)
            for i, index in zip(at, place, strict=True):
                if flat[i].at is None:
                    factors = tuple(held(f, flat[i], index) for f in factors)
            out.append((place, replace(read, factors=factors, labels=labels)))
    return out


def _are_all(places: list[Place]) -> bool:
    """Whether every position is there once, in order."""
    sizes = [max(each) + 1 for each in zip(*places, strict=True)]
    return places == list(product(*map(range, sizes)))


def _selected(node: Node, flat: Dim, walk: Walk, places: list[Place], insert: Inserter) -> list[tuple[Place, Node]]:
    users, at = list(node.users), _foreign(walk, flat)
    apart = insert.call(aten.reshape.default, node, [insert.size(a.size) for a in flat])
    out = []
    for place in places:
        one = apart
        for dim, index in reversed(list(zip(at, place, strict=True))):
            one = insert.call(aten.select.int, one, dim, index)
        out.append((place, one))
    whole = _stacked([one for _, one in out], at, flat, insert)
    whole = insert.call(aten.reshape.default, whole, [insert.size(n) for n in shape(node)])
    instead(whole, node)
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
    """The walk with reads of one query and one version each in place of wide ones."""
    for node in [n for n in (*walk.reads, *walk.apart) if n in queries]:
        single, nodes = dict(_single(walk, node)), dict(queries[node])
        if single.keys() == nodes.keys():
            walk.reads.pop(node, None), walk.apart.pop(node, None)
            walk.reads |= {one: replace(single[place], node=one) for place, one in nodes.items()}
    return walk
