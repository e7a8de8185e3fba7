"""Whether steps of a state are to read a shadow of it: what was asked, what the graph shows, and whether it pays."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from math import prod

import torch
from torch import Tensor
from torch.fx import Node

from kvbuffer_compile.ir.program import Decay
from kvbuffer_compile.ir.shadow import may_have_shadow
from kvbuffer_compile.options import Options
from kvbuffer_compile.passes.choice.working_set import hint
from kvbuffer_compile.passes.lifted import Lifted

NARROW = (torch.bfloat16, torch.float16)


def possible_read(lifted: Lifted, options: Options) -> torch.dtype | None:
    """The dtype of a shadow that steps may read: the one asked for; for "auto" float16, where it is below the rounding
    of all that goes in and out. None where there is to be none.

    Only states of float32 have one, and only where all reads contract the same axis.
    """
    value = lifted.state.meta["val"]
    if options.read_dtype is None or not may_have_shadow(lifted.program, value.dtype):
        return None
    if isinstance(options.read_dtype, torch.dtype):
        return options.read_dtype
    return torch.float16 if in_16_bits(lifted) else None


def in_16_bits(lifted: Lifted) -> bool:
    """Whether what is written and what is read comes from and goes to 16-bit numbers, as the graph shows.

    A float16 shadow errs 2^-11 of what is read, a bfloat16 output 2^-8. Float32 numbers that are fewer than those of an
    operand, such as gates, biases and norms, are factors of its numbers and do not make them finer.
    """
    gates = {op.factor for op in lifted.program.events if isinstance(op, Decay)}
    pairs = zip(lifted.program.inputs, lifted.operands, strict=True)
    vectors = [node for v, node in pairs if v.kind != "scalar" and v not in gates]
    outputs = [output.node for output in lifted.outputs]
    return bool(vectors and outputs) and all(map(_made_of_16_bits, vectors)) and all(map(_ends_in_16_bits, outputs))


def _made_of_16_bits(operand: Node) -> bool:
    """Whether each way back from an operand comes to a 16-bit number, or to fewer than the operand has."""
    met = False
    for node in _until_narrow([operand], lambda n: n.all_input_nodes):
        if _is_narrow(node):
            met = True
        elif not node.all_input_nodes and _is_float(node) and _size(node) >= _size(operand):
            return False
    return met


def _ends_in_16_bits(output: Node) -> bool:
    """Whether whatever is made of an output ends in 16-bit numbers."""
    for node in _until_narrow(output.users, lambda n: n.users):
        if node.op == "output" or node.target is torch.ops.aten.copy_.default:
            return False
    return bool(output.users)


def _until_narrow(start: Iterable[Node], beyond: Callable[[Node], Iterable[Node]]) -> Iterator[Node]:
    """All nodes on the ways from some, the first 16-bit ones on each among them."""
    waiting, seen = list(start), set()
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        yield node
        if not _is_narrow(node):
            waiting += beyond(node)


def _is_narrow(node: Node) -> bool:
    return _is_float(node) and node.meta["val"].dtype in NARROW


def _is_float(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dtype.is_floating_point


def _size(node: Node) -> int:
    return prod(map(hint, node.meta["val"].shape))
