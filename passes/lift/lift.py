"""Lift: find the recurrences in a captured graph by their algebra.

walk      each candidate state forwards: versions, reads, the next state           (walk.py)
blocks    several tokens by one product each: their index stays a dim of operands    (blocks.py)
queries   reads of several queries or tokens at once into one read for each         (queries.py)
axes      which indices are the key and the value axis, from what reads contract    (order.py)
factor    decays, addends and keys into factors that run along one axis             (factor.py)
assemble  events in order, operands in state coordinates: a Program                 (assemble.py)
outputs   the reads that the rest of the graph still needs
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch.fx import GraphModule, Node

from kvbuffer_compile.ir.program import Program, Var, verify
from kvbuffer_compile.passes.algebra.operands import Inserter
from kvbuffer_compile.passes.algebra.terms import Refusal
from kvbuffer_compile.passes.lift.assemble import Assembled, assemble, trimmed
from kvbuffer_compile.passes.lift.reasons import others, refused, told
from kvbuffer_compile.passes.lifted import Lifted, LiftedGraph
from kvbuffer_compile.passes.reading.captured import candidates, copied, guards_of, source, written
from kvbuffer_compile.passes.storage.donated import stored_back
from kvbuffer_compile.passes.storage.pools import taken
from kvbuffer_compile.passes.storage.stacked import apart, stacks
from kvbuffer_compile.passes.tokens.blocks import as_block, at_once
from kvbuffer_compile.passes.tokens.composites import opened
from kvbuffer_compile.passes.tokens.periods import Tokens, tokens, whole
from kvbuffer_compile.passes.tokens.sequences import opened_sequences, sequence_of, tokens_of
from kvbuffer_compile.passes.walk.low_rank import reassociated
from kvbuffer_compile.passes.walk.order import choices
from kvbuffer_compile.passes.walk.queries import adopt, count, taken_apart
from kvbuffer_compile.passes.walk.walk import Walk

aten = torch.ops.aten


def lift(gm: GraphModule, donate: bool = False) -> LiftedGraph:
    """Find every state in a functionalised ATen graph and its program, on a copy of the graph.

    gm: nodes carry fake tensors in meta["val"]; writes to inputs are copy_ calls at the end. It is not changed.
    donate: returned stacks and pools may be stored where they came from (donated.py).
    """
    graph = _lift(gm, frozenset(), donate)
    states = {pool.rows: pool.state for pool in graph.pools}
    found = {states.get(one.state, one.state).name for one in graph.found}
    names = [n.name for n in gm.graph.find_nodes(op="placeholder")]
    changed = {part.index for part in graph.parts} | {index for index, _ in graph.donated}
    used = {part.index for part in graph.parts if part.name in found} | {i for i in changed if names[i] in found}
    unused = frozenset(changed - used)
    if not unused:
        return graph
    kept = _lift(gm, unused, donate)  # what holds no state stays whole; each of its slices has a reason of its own
    stored = {n.name for n in written(gm)}
    kept.named = tuple(part for part in graph.parts if part.index in unused and names[part.index] in stored)
    if kept.named:
        slices = {part.name for part in kept.named}
        kept.refused = [r for r in kept.refused if r.state.name not in {names[part.index] for part in kept.named}]
        kept.refused += [r for r in graph.refused if states.get(r.state, r.state).name in slices]
    return kept


def _lift(gm: GraphModule, whole: frozenset[int], donate: bool) -> LiftedGraph:
    """whole: positions of inputs that are not taken apart."""
    copy = opened(copied(gm))
    donated = stored_back(copy, whole) if donate else ()
    inputs = copy.graph.find_nodes(op="placeholder")
    found = [stack for stack in stacks(copy) if inputs.index(stack.state) not in whole]
    parts, pools = apart(copy, found), taken(copy)
    graph = LiftedGraph(opened_sequences(copy), gm, parts, pools, donated)
    graph.found = _finish(graph, _acyclic(graph, _programs(graph)))
    if not donate:  # what is not written may be anything that an outer product is added to
        stored = written(graph.gm)
        graph.refused = [r if r.state in stored else replace(r, kept=True) for r in graph.refused]
    told_of = {one.state for one in graph.found} | {r.state for r in graph.refused}
    graph.refused += others(graph.gm, told_of)
    graph.gm.graph.lint()
    return graph


def _programs(graph: LiftedGraph) -> list[Assembled]:
    """A program for each state that has one. A symbolic size that becomes known on the way changes what all values look
    like: then it begins anew."""
    while True:
        graph.refused.clear()
        guards = guards_of(graph.gm)
        walks = _walks(graph)
        if reassociated(walks, Inserter(graph.gm.graph)):
            graph.refused.clear()
            walks = _walks(graph)
        count(walks)
        blocks = at_once(walks, partial(_trial, graph, walks))
        apart = [walk for walk in walks if walk.state not in blocks]
        queries = taken_apart(apart, Inserter(graph.gm.graph)) if guards == guards_of(graph.gm) else {}
        if queries:
            graph.refused.clear()
            walks = [adopt(walk, queries) for walk in _walks(graph)]
        walks = [(as_block(walk) if walk.state in blocks else None) or walk for walk in walks]
        assembled = list(_assembled(graph, walks, guards))
        if guards == guards_of(graph.gm):
            return assembled


def _walks(graph: LiftedGraph) -> list[Walk]:
    """All uses of each candidate; those that are not algebra are refused."""
    order = {node: i for i, node in enumerate(graph.gm.graph.nodes)}
    stored = written(graph.gm)
    walks = []
    for state in candidates(graph.gm):
        walk = Walk(state, order)
        try:
            walks.append(walk.run())
            walk.sequence = sequence_of(walk)
        except Refusal as refusal:
            graph.refused += filter(None, [refused(walk, refusal, stored.get(state))])
    return walks


def _trial(graph: LiftedGraph, walks: list[Walk]) -> Callable[[int, Walk], Assembled]:
    """Assembles one of the walks, or another in its place."""
    bits, inserter = _dependence(graph.gm, walks), Inserter(graph.gm.graph)
    return lambda i, walk: _assemble(walk, bits, i, inserter)


# ------------------------------------------------------------------------------------------- assembling


def _assembled(graph: LiftedGraph, walks: list[Walk], guards: int) -> Iterator[Assembled]:
    """A program for each walk, or the reason why not, as long as no more is known about sizes."""
    bits = _dependence(graph.gm, walks)
    inserter = Inserter(graph.gm.graph)
    for i, walk in enumerate(walks):
        if guards != guards_of(graph.gm):
            return
        try:
            yield _assemble(walk, bits, i, inserter)
        except Refusal as refusal:
            graph.refused += filter(None, [refused(walk, refusal, walk.write)])


def _assemble(walk: Walk, bits: dict[Node, int], index: int, inserter: Inserter) -> Assembled:
    """The first choice of axes for which everything factorises. The reason of the first, preferred one otherwise."""
    if walk.write is None and not walk.reads:
        raise Refusal(walk.state, "not-written", "no next state is stored, and the state is never read")
    if walk.apart:
        raise Refusal(next(iter(walk.apart)), "wider-read", "not all states that one call reads can be told apart")
    first: Refusal | None = None
    for axes in choices(walk):
        try:
            return assemble(walk, axes, lambda n: bool(bits.get(n, 0) >> index & 1), inserter)
        except Refusal as refusal:
            first = first or refusal
    assert first is not None
    raise first


def _dependence(gm: GraphModule, walks: list[Walk]) -> dict[Node, int]:
    """For each node a bit set: which of the walks' states it depends on through a read."""
    own: dict[Node, int] = {}
    for i, walk in enumerate(walks):
        for node in walk.reads:
            own[node] = own.get(node, 0) | 1 << i
    bits: dict[Node, int] = {}
    for node in gm.graph.nodes:
        found = own.get(node, 0)
        for x in node.all_input_nodes:
            found |= bits[x]
        bits[node] = found
    return bits


def _acyclic(graph: LiftedGraph, assembled: list[Assembled]) -> list[Assembled]:
    """Each program becomes one node: those whose operands would need their own results through another are refused."""
    bits = _dependence(graph.gm, [a.walk for a in assembled])
    needs = [0] * len(assembled)
    slots = {pool.rows: pool.slots for pool in graph.pools}
    for i, one in enumerate(assembled):
        needs[i] |= bits.get(slots.get(one.walk.state, one.walk.state), 0)
        for node in one.operands.values():
            needs[i] |= bits[node]
    kept: list[int] = []
    for i, one in enumerate(assembled):
        if _reaches(i, i, needs, {*kept, i}):
            reason = "two states feed each other within one step: read one before it is updated, or update them in turn"
            graph.refused.append(told(one.walk.state, Refusal(one.walk.state, "entangled", reason)))
        else:
            kept.append(i)
    return [assembled[i] for i in kept]


def _reaches(start: int, goal: int, needs: list[int], within: set[int]) -> bool:
    """Whether state `goal` is among what `start` needs, directly or through others of `within`."""
    seen: set[int] = set()
    stack = [start]
    while stack:
        below = needs[stack.pop()]
        met = {j for j in within if below >> j & 1} - seen
        if goal in met:
            return True
        seen |= met
        stack += met
    return False


# ---------------------------------------------------------------------------------------------- outputs


def _finish(graph: LiftedGraph, assembled: list[Assembled]) -> list[Lifted]:
    """Programs with the outputs that the rest of the graph needs."""
    live = _live(graph, assembled)
    inserter = Inserter(graph.gm.graph)
    slots = {pool.rows: pool.slots for pool in graph.pools}
    return [replace(_lifted(one, live, inserter), slots=slots.get(one.walk.state)) for one in assembled]


def _lifted(one: Assembled, live: set[Node], inserter: Inserter) -> Lifted:
    nodes = [n for n in one.reads if n in live]
    shown = tuple(one.reads[n] for n in nodes)
    counted = one.walk.sequence is not None or one.walk.block is not None
    parts = whole(trimmed(one.program, shown)) if counted else _tokens(one.program, shown)
    by_name = {v.name: node for v, node in one.operands.items()}
    operands = [[by_name[v.name] for v in inputs] for inputs in parts.inputs]
    walk = one.walk
    assert walk.after is not None
    return Lifted(
        state=walk.state,
        program=verify(parts.program),
        layout=one.place.layout,
        sizes=one.place.sizes,
        operands=tuple(_stacked(inserter, nodes, one.place.layout.lanes) for nodes in zip(*operands, strict=True)),
        outputs=tuple(one.output(n, inserter, *_position(one.reads[n], parts)) for n in nodes),
        write=walk.write,
        returned=walk.returned,
        source=source(walk.after.version.node) or source(walk.write or walk.state),
        several=parts.count > 1 or tokens_of(walk.sequence) is not None or walk.block is not None,
        block=walk.block is not None,
    )


def _tokens(program: Program, live: tuple[Var, ...]) -> Tokens:
    """The tokens of a program with all its reads as outputs; one that is live in no token is none."""
    parts = tokens(trimmed(program, live))
    whole = tokens(program)
    if whole.count <= parts.count:
        return parts
    roles = {i for outputs in whole.outputs for i, v in enumerate(outputs) if v in live}
    shown = tuple(v for outputs in whole.outputs for i, v in enumerate(outputs) if i in roles)
    again = tokens(trimmed(program, shown))
    return again if again.count == whole.count else parts


def _stacked(inserter: Inserter, nodes: Sequence[Node], lanes: int) -> Node:
    """One operand of all tokens, [*lanes, T(, K or V)]."""
    if len(nodes) == 1:
        return nodes[0]
    if len(set(nodes)) == 1:
        one = inserter.call(aten.unsqueeze.default, nodes[0], lanes)
        sizes = [len(nodes) if dim == lanes else -1 for dim in range(one.meta["val"].dim())]
        return inserter.call(aten.expand.default, one, sizes)
    return inserter.call(aten.cat.default, [inserter.call(aten.unsqueeze.default, n, lanes) for n in nodes], lanes)


def _position(read: Var, parts: Tokens) -> tuple[int, int | None]:
    """Which output of which token a read of the whole program is."""
    for token, outputs in enumerate(parts.outputs):
        if read in outputs:
            return outputs.index(read), token if parts.count > 1 else None
    raise AssertionError(read)


def _live(graph: LiftedGraph, assembled: Iterable[Assembled]) -> set[Node]:
    """What is still computed when every program stands in the graph: its reads end the search."""
    reads = {n for one in assembled for n in one.reads}
    writes = {one.walk.write for one in assembled}
    end = graph.gm.graph.output_node()
    dropped = {one.walk.returned for one in assembled if one.walk.write is None}
    returned = end.args[0]
    assert isinstance(returned, list | tuple)
    stack = [n for i, n in enumerate(returned) if isinstance(n, Node) and i not in dropped]
    stack += [n for n in graph.gm.graph.nodes if n.op == "call_function" and n.is_impure() and n not in writes]
    stack += [n for one in assembled for n in one.operands.values()]
    stack += [pool.slots for pool in graph.pools]
    stack += [n for one in assembled for n in one.within.values()]
    live: set[Node] = set()
    while stack:
        node = stack.pop()
        if node not in live:
            live.add(node)
            stack += [] if node in reads else node.all_input_nodes
    return live
