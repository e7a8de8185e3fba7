"""A token cut where a call has no spelling in kernels: kernels before and after it, and between them the call itself.

Every piece but the last hands on what it has read from the state; the last one appends, or writes the state in place.
Reads whose queries are known share one pass in the first piece, also those that come behind a cut call in the program:
what its token adds to them is a row times a number (schedule.py).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from kvbuffer_compile.codegen import calls
from kvbuffer_compile.codegen.schedule import Old, Schedule, Step, arrange, live, token_nodes, uses
from kvbuffer_compile.ir.plan import Plan
from kvbuffer_compile.ir.program import Map, Program, Var

Node = Step | Old


@dataclass(frozen=True)
class Piece:
    """One kernel of a step. A token without cuts is one piece, the first and the last.

    inputs: operands, and results of earlier pieces and calls. outputs: what is needed of it. calls: those that follow,
    in order. first: it flushes, if that is due. last: it appends the token's rows or folds them, and counts the token.
    """

    inputs: tuple[Var, ...]
    schedule: Schedule
    outputs: tuple[Var, ...]
    calls: tuple[Map, ...] = ()
    first: bool = True
    last: bool = True

    @property
    def whole(self) -> bool:
        return self.first and self.last


def pieces(program: Program, in_place: bool) -> tuple[Piece, ...]:
    """The pieces of one token, in order."""
    nodes, fold = token_nodes(program, in_place)
    rounds, free = _rounds(program, nodes)
    count = max(rounds.values(), default=0)
    if count == 0:
        return (Piece(program.inputs, arrange(nodes, fold), program.outputs),)
    kept = fold.needs if fold else program.logged
    done: list[Piece] = []
    for n in range(count):
        body = [x for x in nodes if not is_cut(x) and (x.out in free or rounds[x.out] == n)]
        following = [x for x in nodes if isinstance(x, Map) and is_cut(x) and rounds[x.out] == n + 1]
        asked = {v for x in following for v in uses(x)}
        later = {v for x in nodes if is_cut(x) or rounds[x.out] > n for v in uses(x)}.union(program.outputs, kept)
        outputs = tuple(x.out for x in body if x.out in (asked if x.out in free else later))
        order = arrange(live(body, outputs), None)
        done.append(Piece(_needed(order, outputs), order, outputs, tuple(following), first=n == 0, last=False))
    given = {v for piece in done for v in piece.outputs}
    outputs = tuple(v for v in program.outputs if v not in given)
    body = [x for x in nodes if not is_cut(x) and (x.out in free or rounds[x.out] == count)]
    order = arrange(live(body, (*outputs, *kept)), fold)
    return (*done, Piece(_needed(order, (*outputs, *kept)), order, outputs, first=False))


def built_as(plan: Plan) -> Plan:
    """The plan whose kernels a step is made of: of several tokens that are cut, those of one token."""
    cut = plan.variant == "verify" and len(pieces(plan.program, in_place=False)) > 1
    return replace(plan, variant="buffered") if cut else plan


def is_cut(node: Node) -> bool:
    """Whether a node is a call that kernels have no spelling for."""
    return isinstance(node, Map) and not calls.spellable(node)


def _rounds(program: Program, nodes: Iterable[Node]) -> tuple[dict[Var, int], set[Var]]:
    """For each value the rounds of cut calls before it; and the values that neither a read nor a cut call goes into,
    which each piece that uses one computes for itself."""
    rounds: dict[Var, int] = {}
    free = set(program.inputs)
    for node in nodes:
        rounds[node.out] = max((rounds.get(v, 0) for v in uses(node)), default=0) + is_cut(node)
        if free.issuperset(uses(node)) and not (is_cut(node) or isinstance(node, Old)):
            free.add(node.out)
    return rounds, free


def _needed(order: Schedule, roots: Iterable[Var]) -> tuple[Var, ...]:
    """What a piece uses and does not compute."""
    nodes = [node for stage in order.stages for node in (*stage.steps, *stage.reads)]
    used = dict.fromkeys(v for node in nodes for v in uses(node)) | dict.fromkeys(roots)
    return tuple(v for v in used if v not in {node.out for node in nodes})
