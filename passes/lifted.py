"""What the lift hands on: a program tied to the nodes of a graph."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule, Node

from kvbuffer_compile.errors import Declined
from kvbuffer_compile.ir.plan import Layout
from kvbuffer_compile.ir.program import Program
from kvbuffer_compile.passes.reading.counterparts import Origins


@dataclass(frozen=True)
class Output:
    """Where a value of a step goes: `node` is replaced by value.permute(perm).reshape(shape), cast to its dtype.

    value: output number `index` of the program in its canonical shape [*lanes(, K or V)] at full lane sizes; of a step
    of several tokens that of token `token`, or [*lanes, T(, K or V)] when `token` is None. shape: ints or size nodes.
    plus: a node of the value's shape that is added to it first: what the tokens of a block add to its reads.
    """

    node: Node
    perm: tuple[int, ...]
    shape: tuple[int | Node, ...]
    index: int = 0
    token: int | None = None
    plus: Node | None = None


@dataclass(frozen=True)
class Lifted:
    """One state's recurrence in a graph.

    state: its placeholder. operands: one node for each of program.inputs, in canonical shape. outputs: every node that
    one of the program's outputs replaces. write: the copy_ node that stores the next state, or None when it is
    returned: then `returned` is its position among the graph's outputs. source: "file:line" of the model code that
    updates the state. several: the graph runs the program for several tokens; operands are [*lanes, T(, K or V)].
    slots: which rows of a pool the sequences are, when the state is one (pools.py). block: all tokens read the state as
    it was before the first of them.
    """

    state: Node
    program: Program
    layout: Layout
    sizes: tuple[int, int]
    operands: tuple[Node, ...]
    outputs: tuple[Output, ...]
    write: Node | None
    returned: int | None = None
    source: str = ""
    several: bool = False
    slots: Node | None = None
    block: bool = False

    @property
    def tokens(self) -> int | torch.SymInt:
        """How many tokens one run of the graph decodes."""
        if not self.several:
            return self.program.tokens
        count: int | torch.SymInt = self.operands[0].meta["val"].shape[self.layout.lanes]
        return count

    @property
    def most_tokens(self) -> int | None:
        """The most that `tokens` can be, None when nothing bounds it."""
        count = self.tokens
        if isinstance(count, int):
            return count
        upper = count.node.shape_env.bound_sympy(count.node.expr).upper
        return int(upper) if upper.is_Integer and upper < 2**31 else None


@dataclass(frozen=True)
class Part:
    """An input that was appended to the graph: one slice of the input at `index`. place: a dim and the position in it,
    for each index that is taken, one after the other. name: of its placeholder."""

    name: str
    index: int
    place: tuple[tuple[int, int], ...]

    def named(self, whole: str) -> str:
        """What the slice is called in Python."""
        return whole + "".join(f"[{':, ' * dim}{at}]" for dim, at in self.place)


@dataclass(frozen=True)
class Pool:
    """rows: the input that stands for the rows at `slots` of `state` while a graph is lifted; gather: the node that
    took them; put: target and arguments of the call that stored them, value among them."""

    rows: Node
    state: Node
    slots: Node
    gather: Node
    put: tuple[Any, tuple[Any, ...], Node]


@dataclass(frozen=True)
class Refused:
    """A tensor that the graph writes and that no program is found for. kept: it is no matrix state (a vector, a cache,
    a shift register, a counter), so nothing is lost; else it looks like one and is declined."""

    state: Node
    why: Declined
    kept: bool = False


@dataclass
class LiftedGraph:
    """A copy of the captured graph in which operand nodes have been inserted, and what was found in it.

    original: the captured graph itself. parts: inputs appended to it, in order, in place of slices of its other inputs.
    pools: inputs behind those, in place of rows that are taken of pools. donated: positions of inputs that are
    returned, each with that of the output. named: slices that are no inputs of the graph but stand in `refused`.
    """

    gm: GraphModule
    original: GraphModule
    parts: tuple[Part, ...] = ()
    pools: tuple[Pool, ...] = ()
    donated: tuple[tuple[int, int], ...] = ()
    found: list[Lifted] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)
    named: tuple[Part, ...] = ()
    origins: Origins | None = None  # both found when they are first needed
    inputs_problem: str | None = None


@dataclass(frozen=True)
class Call:
    """What one call of a graph does besides stepping a state. bytes: that it touches in all. states: how many it
    steps."""

    bytes: int
    states: int


ALONE = Call(0, 1)  # a graph that does nothing else
