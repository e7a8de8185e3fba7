"""T tokens of a program as one functional op, T known at run time: what fused and chunked functions are replaced by.

    kvbuffer::sequence(state, operands, program) -> [next state, *outputs]

    state      [*lanes, K, V]
    operands   one tensor for each of the program's inputs, [*lanes, T(, K or V)]
    program    its text form (ir.print_program)
    outputs    one for each of the program's outputs, [*lanes, T(, K or V)]; they and the next state in float32
               (float64 for a float64 state)

The backend lifts it like any spelled-out recurrence. Where it is left alone it runs token by token on a dense state.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from kvbuffer_compile.ir.memory import Dense, run_tokens
from kvbuffer_compile.ir.program import Program
from kvbuffer_compile.ir.text import parse

LIBRARY = torch.library.Library("kvbuffer", "FRAGMENT")
LIBRARY.define("sequence(Tensor state, Tensor[] operands, str program) -> Tensor[]")
# The lift studies one token of a sequence in its place; two ops tie the two together, and are gone from what runs.
LIBRARY.define("token(Tensor x, int dim) -> Tensor")  # x at one token, whichever
LIBRARY.define("stands_for(Tensor one, Tensor all) -> Tensor")  # `all`; `one` is what the lift makes of it


@functools.cache
def program_of(text: str) -> Program:
    """A program from its text form."""
    return parse(text)


def _sequence(state: Tensor, operands: list[Tensor], program: str) -> list[Tensor]:
    compute = _compute(state)
    memory = Dense(state.to(compute))
    outputs = run_tokens(program_of(program), memory, [x.to(compute) for x in operands], state.dim() - 2)
    return [memory.state.clone() if memory.state is state else memory.state, *outputs]


def _fake_sequence(state: Tensor, operands: list[Tensor], program: str) -> list[Tensor]:
    lanes = state.shape[:-2]
    tokens = operands[0].shape[len(lanes)]
    for x in operands:
        torch._check(x.shape[len(lanes)] == tokens, lambda: "all operands must have the same number of tokens")
    tails = {"scalar": (), "key": state.shape[-2:-1], "value": state.shape[-1:]}
    shapes = [state.shape, *((*lanes, tokens, *tails[v.kind]) for v in program_of(program).outputs)]
    return [state.new_empty(shape, dtype=_compute(state)) for shape in shapes]


def _compute(state: Tensor) -> torch.dtype:
    return torch.float64 if state.dtype == torch.float64 else torch.float32


LIBRARY.impl("sequence", torch.compiler.disable(_sequence), "CompositeExplicitAutograd")
LIBRARY.impl("token", torch.compiler.disable(lambda x, dim: x.select(dim, 0).clone()), "CompositeExplicitAutograd")
LIBRARY.impl("stands_for", torch.compiler.disable(lambda one, all: all.clone()), "CompositeExplicitAutograd")
torch.library.register_fake("kvbuffer::sequence", _fake_sequence, lib=LIBRARY)
torch.library.register_fake("kvbuffer::token", lambda x, dim: torch.empty_like(x.select(dim, 0)), lib=LIBRARY)
torch.library.register_fake("kvbuffer::stands_for", lambda one, all: torch.empty_like(all), lib=LIBRARY)

SEQUENCE = torch.ops.kvbuffer.sequence.default
TOKEN = torch.ops.kvbuffer.token.default
STANDS_FOR = torch.ops.kvbuffer.stands_for.default
