"""Steps that are cut: generated kernels before and after calls that have no spelling there, and the calls themselves.

An exception in one of the calls leaves what any failed step leaves: rows may have been folded into the state, and the
token has neither been appended nor counted (cursor[2]).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kvbuffer_compile.codegen.cut import Piece
from kvbuffer_compile.guard.overlap import has_memory
from kvbuffer_compile.ir.memory import apply_map
from kvbuffer_compile.ir.plan import Plan
from kvbuffer_compile.ir.program import Map, Var
from kvbuffer_compile.steps import composite

Outputs = tuple[Tensor, ...]


def one_token(plan: Plan, cut: Sequence[Piece], kernels: Sequence[Any]) -> Callable[..., Outputs]:
    """A recurrent or buffered step: its kernels, one for each piece, and the calls between them."""
    before = len(plan.side_arguments)

    def step(*args: Tensor) -> Outputs:
        side, operands = args[:before], args[before:]
        env = dict(zip(plan.program.inputs, operands, strict=True))
        for piece, kernel in zip(cut, kernels, strict=True):
            found = kernel(*side, *(env[v] for v in piece.inputs))
            env.update(zip(piece.outputs, (found,) if len(piece.outputs) == 1 else found or (), strict=True))
            for call in piece.calls:
                env[call.out] = _called(call, env, plan.compute)
        return tuple(env[v] for v in plan.program.outputs)

    return step


def _called(call: Map, env: dict[Var, Tensor], compute: torch.dtype) -> Tensor:
    return apply_map(call, [env[a].to(compute) if isinstance(a, Var) else a for a in call.args]).to(compute)


def several_tokens(plan: Plan, step: Callable[..., Outputs]) -> Callable[..., Outputs]:
    """A verify step as steps of one token that share a flush: a cut call of one token waits for the reads of it, and
    they for the rows of the token before."""
    before = len(plan.side_arguments)

    def verify(*args: Tensor) -> Outputs:
        (state, cursor, *rows), operands = args[:before], args[before:]
        axis, count = plan.layout.lanes, composite.token_count(plan, operands)
        if has_memory(state):
            composite.flush(plan, state, cursor, rows, composite.overflowing(plan, cursor, count))
        marks = cursor.clone()
        marks[1] = plan.capacity  # no flush before the last token: rejected ones must be taken back
        each = [step(state, marks, *rows, *(x.select(axis, t) for x in operands)) for t in range(count)]
        outputs = tuple(torch.stack(values, axis) for values in zip(*each, strict=True))
        cursor[::2].copy_(torch.stack([marks[0], cursor[2] + 1]))  # tokens owed and steps, in one write
        return outputs

    return verify
