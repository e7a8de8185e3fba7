"""Stacks and pools of states that are passed in and returned, which the caller has given away.

    states -> torch.stack([...])       pool -> pool.index_put((slots,), S)

They are stored back where they came from, as if the graph did that itself; the runtime returns the tensor that it was
given. (A single state that is returned needs no such thing: its walk ends there.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from kvbuffer_compile.passes.reading.arguments import shape, tensor
from kvbuffer_compile.passes.reading.aten import read
from kvbuffer_compile.passes.reading.captured import candidates, written
from kvbuffer_compile.passes.reading.forms import Regroup, Same
from kvbuffer_compile.passes.storage.pools import SCATTERS as STORED
from kvbuffer_compile.passes.storage.stacked import SCATTERS

aten = torch.ops.aten
COLLECTED = STORED | frozenset(SCATTERS) | {aten.cat.default, aten.stack.default}


def stored_back(gm: GraphModule, apart: frozenset[int]) -> tuple[tuple[int, int], ...]:
    """Store each returned stack or pool in the input it was made of. Changes gm; that output becomes None.

    apart: positions of inputs that are left as they are. Returns positions: of the input and of the output.
    """
    inputs = gm.graph.find_nodes(op="placeholder")
    known = set(candidates(gm)) - set(written(gm))
    free = [n for i, n in enumerate(inputs) if n in known and i not in apart]
    end = gm.graph.output_node()
    returned: Any = end.args[0]
    outputs = list(returned)
    found: list[tuple[int, int]] = []
    for position, value in enumerate(outputs):
        state = _origin(value, free) if isinstance(value, Node) else None
        if state is None:
            continue
        free.remove(state)
        for same in [n for n in state.users if isinstance(form := read(n), Same) and form.x is state]:
            same.replace_all_uses_with(state)
        with gm.graph.inserting_before(end):
            write = gm.graph.call_function(aten.copy_.default, (state, value))
        write.meta = {**value.meta, "val": state.meta["val"]}
        outputs[position] = None
        found.append((inputs.index(state), position))
    end.args = (type(returned)(outputs),)
    return tuple(found)


def _origin(value: Node, free: list[Node]) -> Node | None:
    """The first input of a value's shape that it is computed from, if it is a collection of states."""
    last = value.args[0] if isinstance(read(value), Regroup) else value
    if not isinstance(last, Node) or last.target not in COLLECTED:
        return None
    alike = [n for n in free if shape(n) == shape(value) and _dtype(n) == _dtype(value)]
    return next((n for n in alike if _is_above(n, value)), None)


def _dtype(node: Node) -> torch.dtype | None:
    value = tensor(node)
    return None if value is None else value.dtype


def _is_above(state: Node, value: Node) -> bool:
    seen, stack = {value}, [value]
    while stack:
        for x in stack.pop().all_input_nodes:
            if x not in seen:
                seen.add(x)
                stack.append(x)
    return state in seen
