"""A state of integers, where everything is exact (modulo 2^64), stepped by the composite ops beside the definition."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from kvbuffer_compile.ir.memory import Dense
from kvbuffer_compile.ir.plan import Variant
from kvbuffer_compile.ir.program import Program, run
from kvbuffer_compile.steps import composite, ops
from tests.support.sessions import LANES, make_plan

K, V = 3, 4
GARBAGE = 10**9  # in slots that hold nothing

Token = dict[str, Tensor]


class Exact:
    """state: what the ops work on. dense: the same state by the definition; the caller sets it to what was kept."""

    def __init__(self, program: Program, flush: int, most: int, seed: int) -> None:
        """most: tokens of one call. Sequence b first flushes at flush - b rows."""
        self.program, self.g = program, torch.Generator().manual_seed(seed)
        self.lanes = tuple(LANES[x] for x in program.lanes)
        plan = make_plan(program, "buffered", (K, V), flush, flush + most)
        int64 = (torch.int64,) * len(program.logged)
        self.plan = replace(plan, state_dtype=torch.int64, row_dtypes=int64, compute=torch.int64, target="aten")
        self.state = self.integers(*self.lanes, K, V)
        self.dense = self.state.clone()
        self.cursor = torch.zeros(4, self.lanes[0], dtype=torch.int32)
        self.cursor[1] = torch.tensor([max(1, flush - b) for b in range(self.lanes[0])])
        self.rows = [torch.full(self.plan.row_shape(v, self.lanes), GARBAGE) for v in program.logged]

    def integers(self, *shape: int) -> Tensor:
        return torch.randint(-3, 4, shape, generator=self.g)

    def draw(self) -> Token:
        """The inputs of one token."""
        tails = {"scalar": (), "key": (K,), "value": (V,)}
        sizes = zip(self.program.lanes, self.lanes, strict=True)
        sizes = list(sizes)
        return {
            v.name: self.integers(*(n if x in v.lanes else 1 for x, n in sizes), *tails[v.kind])
            for v in self.program.inputs
        }

    def advance(self, dense: Tensor, token: Token) -> tuple[Tensor, list[Tensor]]:
        """The state after one more token, and the outputs, by the definition."""
        memory = Dense(dense)
        env = run(self.program, memory, token)
        tails = {"scalar": (), "key": (K,), "value": (V,)}
        return memory.state, [env[v.name].expand(*self.lanes, *tails[v.kind]) for v in self.program.outputs]

    def step(self, variant: Variant, tokens: list[Token], *before: Tensor) -> list[Tensor]:
        """Run an op; its outputs, [*lanes, T(, K or V)]."""
        axis = len(self.lanes)
        stacked = [torch.stack([t[v.name] for t in tokens], axis) for v in self.program.inputs]
        if variant == "buffered":
            stacked = [x.squeeze(axis) for x in stacked]
        out = ops.step_op(replace(self.plan, variant=variant))(self.state, self.cursor, *self.rows, *before, *stacked)
        outs = [out] if len(self.program.outputs) == 1 else list(out or [])
        return [x.unsqueeze(axis) for x in outs] if variant == "buffered" else outs

    def materialized(self) -> Tensor:
        """What base and rows stand for."""
        state, cursor = self.state.clone(), self.cursor.clone()
        which = (cursor[0] > 0) | ((cursor[3] > 0) & (cursor[0] >= 0))
        composite.flush(self.plan, state, cursor, self.rows, which)
        return state
