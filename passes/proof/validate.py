"""Prove a lifted program on numbers: the captured graph, its lifted copy and the program, side by side in float64.

The slice that makes the reads and the next state from the state is cut where computation becomes opaque (region.py);
random values are put there. Checks:

    claims   whatever lifting put in place of a node of the captured graph has that node's value
    values   every output of the program and the next state equal those of the captured graph
    order    no operand depends on the state, and the program runs on a really mutable memory, so that a read of an old
             state placed behind an update is seen

What holds several states (stacks, pools) is proved once for a graph, in inputs.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx import Node

from kvbuffer_compile.errors import Declined
from kvbuffer_compile.ir.memory import Dense, run_block, run_tokens
from kvbuffer_compile.ir.program import run
from kvbuffer_compile.passes.lifted import Lifted, LiftedGraph
from kvbuffer_compile.passes.proof.evaluate import LARGE, Limit, cost, difference, evaluate
from kvbuffer_compile.passes.proof.inputs import problem_of_inputs
from kvbuffer_compile.passes.proof.region import Region, below, is_tensor
from kvbuffer_compile.passes.proof.sizes import Extents, shape
from kvbuffer_compile.passes.reading.arguments import is_repeated
from kvbuffer_compile.passes.reading.counterparts import Origins, origins
from kvbuffer_compile.process import fleeting
from kvbuffer_compile.process.surroundings import neutral

DRAWS = 2
NO_NUMBERS = "no finite numbers"


def validate(graph: LiftedGraph, lifted: Lifted) -> Declined | None:
    """None when the program does what the captured graph does; a Declined with the difference otherwise."""
    obligation = _obligation(graph, lifted)
    with unset_fake_temporarily():  # the compiler runs us under its fake tensors
        problem = _problem_of_any(graph, obligation)
    if problem is None:
        return None
    if isinstance(problem, Limit):
        return Declined(lifted.state.name, "too-large", problem, lifted.source)
    if problem == NO_NUMBERS:
        reason = "the lifted program could not be checked: on random operands the graph computes no finite numbers"
        return Declined(lifted.state.name, "unchecked", reason, lifted.source)
    reason = f"the lifted program disagrees with the graph ({problem}); please report this model"
    return Declined(lifted.state.name, "validation", reason, lifted.source)


@neutral
def _problem_of_any(graph: LiftedGraph, obligation: Obligation) -> str | None:
    return problem_of_inputs(graph, obligation.origins) or _disproved(obligation)


def _disproved(obligation: Obligation) -> str | None:
    """What is wrong with a program. What was validated is remembered: the layers of a model are alike."""
    shape_of_it = _fingerprint(obligation)
    if shape_of_it in _proved:
        return None
    try:
        problem = _entangled(obligation) or _problem(obligation)
    except RuntimeError as error:  # of torch: the program's operands do not even fit together, or there is no memory
        fleeting.mark()
        problem = str(error)
    if problem is None:
        _proved.add(shape_of_it)
    return problem


_proved: set[str] = set()


# ------------------------------------------------------------------------------------------ what is to prove


@dataclass(frozen=True)
class Obligation:
    """A lifted program, and pairs (node of the copy, captured node) that must have one value: what lifting made in
    place of captured nodes around the program, and the next state."""

    lifted: Lifted
    origins: Origins
    region: Region
    next_state: Node
    pairs: tuple[tuple[Node, Node], ...]

    @property
    def ends(self) -> list[Node]:
        """All nodes whose values are compared, and the state."""
        lifted = self.lifted
        both = [n for pair in self.pairs for n in pair]
        plus = [o.plus for o in lifted.outputs if o.plus is not None]
        return [lifted.state, *lifted.operands, *(o.node for o in lifted.outputs), *plus, self.next_state, *both]


def _obligation(graph: LiftedGraph, lifted: Lifted) -> Obligation:
    found = graph.origins = graph.origins or origins(graph.original, graph.gm, [at for _, at in graph.donated])
    captured, copy = graph.original.graph, graph.gm.graph
    region = Region(captured, found, below(lifted.state, captured, copy, found))
    next_state = _next_state(lifted)
    ends = [*lifted.operands, *(o.node for o in lifted.outputs), next_state]
    ends += found.behind(o.node for o in lifted.outputs)
    pairs = [(n, found.claims[n]) for n in _made(ends, region) if n in found.claims]
    return Obligation(lifted, found, region, next_state, tuple(pairs))


def _made(ends: list[Node], region: Region) -> list[Node]:
    """Every node of the copy that leads to some, up to where their originals are cut."""
    seen: dict[Node, None] = {}
    stack = list(ends)
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen[node] = None
        known = region.origins.same.get(node)
        if not region.is_cut(node if known is None else known):
            stack += node.all_input_nodes
    return list(seen)


def _next_state(lifted: Lifted) -> Node:
    """The node that holds the state after the step."""
    if lifted.write is not None:
        return cast(Node, lifted.write.args[1])
    returned: Any = lifted.state.graph.output_node().args[0]
    return cast(Node, returned[lifted.returned])


def _entangled(obligation: Obligation) -> str | None:
    """An operand that depends on the state's values would be needed before the step that makes it."""
    if obligation.origins.changed:
        return "the graph returns other values"
    for operand in obligation.lifted.operands:
        if operand in obligation.region.below:
            return f"operand {operand} depends on the state"
    return None


def _fingerprint(obligation: Obligation) -> str:
    """The program with the part of the graphs it stands for, up to names: equal text, equal computation."""
    lifted, region = obligation.lifted, obligation.region
    number: dict[Node, int] = {}
    lines = [str(lifted.program), str(lifted.layout), str(lifted.sizes), f"{lifted.several} {lifted.block}"]
    for n in region.order(obligation.ends):
        if (source := region.source(n)) is not None:
            number[n] = number[source]
            continue
        number[n] = len(number)
        what = f"{n.meta['val'].dtype} {shape(n)} {is_repeated(n)}" if is_tensor(n) else str(n.meta.get("val"))
        call = "cut" if region.is_cut(n) else f"{n.target} {_numbered(n.args, number)} {_numbered(n.kwargs, number)}"
        lines.append(f"{call} {what}")
    outputs = [(o.perm, len(o.shape), o.index, o.token, o.plus and number[o.plus]) for o in lifted.outputs]
    lines.append(f"{[number[n] for n in obligation.ends]} {outputs} {_entangled(obligation)}")
    return "\n".join(lines)


def _numbered(args: Any, number: dict[Node, int]) -> str:
    return str(torch.fx.node.map_arg(args, lambda n: f"%{number[n]}"))


# ------------------------------------------------------------------------------------------------- comparing


def _problem(obligation: Obligation) -> str | None:
    """What differs between program and graph; what is large is tried with few lanes first."""
    whole = _cost(obligation, obligation.region, Extents())
    for region, extents in _smaller(obligation) if whole[0] > LARGE else ():
        try:
            if _differs(obligation, region, extents) is None:
                return None
        except (RuntimeError, ValueError):
            pass  # a size that is something else as well
    if Limit.exceeded(whole):
        return Limit(whole)
    return _differs(obligation, obligation.region, Extents())


def _smaller(obligation: Obligation) -> Iterator[tuple[Region, Extents]]:
    """Regions with few lanes, those first that cut at more and so tie fewer sizes together."""
    for narrow in (True, False):
        region = replace(obligation.region, narrow=narrow)
        extents, lifted = Extents(), obligation.lifted
        if extents.shrink(region, region.order(obligation.ends), lifted.state, lifted.layout):
            if not Limit.exceeded(_cost(obligation, region, extents)):
                yield region, extents


def _cost(obligation: Obligation, region: Region, extents: Extents) -> tuple[int, int]:
    """Bytes held at once and written in all, the program's own copies of the state among them."""
    state = 8 * torch.Size(extents.of(obligation.lifted.state)).numel()
    held, written = cost(region.order(obligation.ends), region, extents, obligation.ends)
    return held + 3 * state, DRAWS * (written + 3 * state * len(obligation.lifted.program.ops))


def _differs(obligation: Obligation, region: Region, extents: Extents) -> str | None:
    """The first difference in some draws; where one leaves the domain of a function, one of numbers in (0, 1); where
    that does, too, or does not converge, with numbers in (0, 1) for whatever comes out wild beside the state."""
    order = region.order(obligation.ends)
    for seed in range(DRAWS):
        problem: str | None = NO_NUMBERS
        for draw, tame in ((torch.randn, False), (torch.rand, False), (torch.rand, True)):
            values = evaluate(order, region, extents, obligation.ends, draw, seed, tame)
            if _finite(obligation, values):
                problem = _compare(obligation, extents, values)
                break
        if problem is not None:
            return problem
    return None


def _finite(obligation: Obligation, values: dict[Node, Any]) -> bool:
    wanted = [
        *(o.node for o in obligation.lifted.outputs),
        obligation.next_state,
        *(old for _, old in obligation.pairs),
    ]
    return all(bool(x.isfinite().all()) for n in wanted if isinstance(x := values[n], Tensor))


def _compare(obligation: Obligation, extents: Extents, values: dict[Node, Any]) -> str | None:
    """One draw."""
    lifted = obligation.lifted
    for new, old in obligation.pairs:
        if error := difference(values[new], values[old]):
            return f"what stands for {old} differs by {error:.1e}"
    layout = extents.layout(lifted.state, lifted.layout)
    memory = Dense(layout.canonical(values[lifted.state].contiguous()))
    outputs = _run(lifted, memory, [values[n] for n in lifted.operands])
    for output in lifted.outputs:
        value, want = outputs[output.index], values[output.node]
        got = value if output.token is None else value.select(lifted.layout.lanes, output.token)
        got = got if output.plus is None else got + values[output.plus]
        got = got.permute(output.perm).reshape(want.shape)
        if error := difference(got, want):
            return f"read {output.node} differs by {error:.1e}"
    error = difference(memory.state, layout.canonical(values[obligation.next_state].contiguous()))
    return f"the next state differs by {error:.1e}" if error else None


def _run(lifted: Lifted, memory: Dense, operands: list[Tensor]) -> list[Tensor]:
    """The program's outputs on a dense memory, token after token; [*lanes, T(, K or V)] for several."""
    program, axis = lifted.program, lifted.layout.lanes
    if not lifted.several:
        env = run(program, memory, {v.name: x for v, x in zip(program.inputs, operands, strict=True)})
        return [_full(env[v.name], memory.state, v.kind) for v in program.outputs]
    return (run_block if lifted.block else run_tokens)(program, memory, operands, axis)


def _full(value: Tensor, state: Tensor, kind: str) -> Tensor:
    tail = {"scalar": (), "key": state.shape[-2:-1], "value": state.shape[-1:]}[kind]
    return value.expand(*state.shape[:-2], *tail)
