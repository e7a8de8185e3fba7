"""Sequences: T tokens as one op. The lift studies one token in its place, on a copy of the graph.

For each `sequence` node one token of its program is written out in ordinary calls, on `token(operand)`; users of its
results are given `stands_for(result of the one token, result of the sequence)`. The walk goes through the one token,
validation evaluates the sequence itself.
"""

from __future__ import annotations

import operator
from typing import Any

from torch.fx import GraphModule, Node

from kvbuffer_compile.ir.memory import call_arguments, overload
from kvbuffer_compile.ir.program import Kind, Map, run
from kvbuffer_compile.ir.sequence import SEQUENCE, STANDS_FOR, TOKEN, program_of
from kvbuffer_compile.passes.algebra.operands import Inserter
from kvbuffer_compile.passes.algebra.terms import Refusal
from kvbuffer_compile.passes.reading.arguments import shape
from kvbuffer_compile.passes.reading.aten import aten, read
from kvbuffer_compile.passes.reading.captured import copied
from kvbuffer_compile.passes.reading.counterparts import instead
from kvbuffer_compile.passes.reading.forms import Cast, is_view
from kvbuffer_compile.passes.reading.labels import Size
from kvbuffer_compile.passes.walk.walk import Walk


def opened_sequences(gm: GraphModule) -> GraphModule:
    """gm itself, with one token written out beside every sequence."""
    nodes = _sequences(gm)
    if not nodes:
        return gm
    insert = Inserter(gm.graph)
    for node in nodes:
        insert.meta = {"sequence": node, "stack_trace": node.meta.get("stack_trace")}
        _open(insert, node)
    return gm


def _sequences(gm: GraphModule) -> list[Node]:
    return list(gm.graph.find_nodes(op="call_function", target=SEQUENCE))


def _open(insert: Inserter, node: Node) -> None:
    state, operands, text = node.args
    assert isinstance(state, Node) and isinstance(operands, list | tuple) and isinstance(text, str)
    program = program_of(text)
    lanes = state.meta["val"].dim() - 2
    memory = _OneToken(insert, state)
    inputs = {v.name: insert.call(TOKEN, x, lanes) for v, x in zip(program.inputs, operands, strict=True)}
    env = run(program, memory, inputs)
    results = [memory.state, *(env[v.name] for v in program.outputs)]
    for user in list(node.users):
        index = user.args[1]
        assert user.target is operator.getitem and isinstance(index, int)
        whole = insert.call(STANDS_FOR, results[index], user)
        instead(whole, user)
        _give(user, whole)


def _give(node: Node, instead: Node) -> None:
    """Every other user of a node gets another one."""
    node.replace_all_uses_with(instead, delete_user_cb=lambda n: n is not instead)


class _OneToken:
    """A dense state whose ops are calls in a graph."""

    def __init__(self, insert: Inserter, state: Node) -> None:
        self.insert = insert
        self.state = state

    def _along(self, x: Node, kind: Kind) -> Node:
        """A value with the dims of the state."""
        if kind == "scalar":
            x = self.insert.call(aten.unsqueeze.default, x, -1)
        return self.insert.call(aten.unsqueeze.default, x, -2 if kind == "value" else -1)

    def decay(self, factor: Node, kind: Kind) -> None:
        self.state = self.insert.call(aten.mul.Tensor, self.state, self._along(factor, kind))

    def read(self, x: Node, kind: Kind) -> Node:
        product = self.insert.call(aten.mul.Tensor, self.state, self._along(x, kind))
        return self.insert.call(aten.sum.dim_IntList, product, [-2 if kind == "key" else -1])

    def update(self, left: Node, right: Node, kinds: tuple[Kind, Kind]) -> None:
        outer = self.insert.call(aten.mul.Tensor, self._along(left, kinds[0]), self._along(right, kinds[1]))
        self.state = self.insert.call(aten.add.Tensor, self.state, outer)

    def map(self, op: Map, args: list[Any]) -> Node:
        given = call_arguments(op, args, lambda x: self.insert.call(aten.unsqueeze.default, x, -1))
        return self.insert.call(overload(op.fn), *given)


def sequence_of(walk: Walk) -> Node | None:
    """The sequence that a state goes through, None when its graph spells out every token.

    Refusal("several-sequences") when anything but views happens to the state beside it: that would be done once and
    not for every token.
    """
    touched = [*walk.values, *walk.reads]
    found: set[Node] = {n.meta["sequence"] for n in touched if "sequence" in n.meta}
    if not found:
        return None
    for node in touched:
        form = read(node)
        if "sequence" in node.meta or node is walk.state or is_view(form) or isinstance(form, Cast):
            continue
        found.add(node)
    if len(found) > 1:
        reason = (
            "beside a call that decodes several tokens, something else is done to the state, once for all of them: do "
            "it in a call of its own, or decode token by token"
        )
        raise Refusal(walk.state, "several-sequences", reason)
    return found.pop()


def tokens_of(sequence: Node | None) -> Size | None:
    """How many tokens a sequence has, None for a single one."""
    if sequence is None:
        return None
    state, operands = sequence.args[:2]
    assert isinstance(state, Node) and isinstance(operands, list | tuple) and isinstance(operands[0], Node)
    size = shape(operands[0])[len(shape(state)) - 2]
    return None if size == 1 else size


def all_tokens(read_out: Node) -> Node:
    """What the rest of the graph uses for the reads of all tokens."""
    return next(u for u in read_out.users if u.target is STANDS_FOR)


def spelled_out(gm: GraphModule) -> GraphModule:
    """The graph with every sequence of a single token in ordinary calls, for whoever compiles what is left alone."""
    if not _sequences(gm):
        return gm
    plain = opened_sequences(copied(gm))
    closed_sequences(plain)
    plain.graph.eliminate_dead_code()
    plain.recompile()
    return plain


def closed_sequences(gm: GraphModule) -> None:
    """What remains of sequences runs as it is, a single token as it was written out."""
    for node in gm.graph.find_nodes(op="call_function", target=STANDS_FOR):
        one, whole = node.args
        assert isinstance(one, Node) and isinstance(whole, Node) and isinstance(whole.args[0], Node)
        single = tokens_of(whole.args[0]) is None and one.meta["val"].dtype == whole.meta["val"].dtype
        node.replace_all_uses_with(_single(one, whole) if single else whole)
        gm.graph.erase_node(node)
    for node in gm.graph.find_nodes(op="call_function", target=TOKEN):
        node.target, node.args = aten.select.int, (*node.args, 0)


def _single(one: Node, whole: Node) -> Node:
    """The result of one token with the dims of that of a sequence."""
    if one.meta["val"].dim() == whole.meta["val"].dim():
        return one
    sequence: Any = whole.args[0]
    lanes = sequence.args[0].meta["val"].dim() - 2
    with one.graph.inserting_after(one):
        new = one.graph.call_function(aten.unsqueeze.default, (one, lanes))
    new.meta = dict(whole.meta)
    return new
