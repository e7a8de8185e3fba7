"""Thousands of steps that read a shadow: no drift, and states as exact as without one where reads decide nothing.

The bound on outputs is that of the rounding: 2^-11 of what is summed for each number, which in a root mean square over
sums of random signs is below 2^-11 of the sum's own size.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvbuffer_compile.codegen import build
from kvbuffer_compile.commands.recurrences import DRAWN, RECURRENCES
from kvbuffer_compile.ir.memory import Dense
from kvbuffer_compile.ir.plan import Layout, Plan
from kvbuffer_compile.ir.program import Decay, Map, Program, Update, run
from kvbuffer_compile.steps import ops

SIZES, HEADS, FLUSH = (32, 48), 8, 16
LAYOUT = Layout(((None,), (None,), (None,), (None,)), (0, 1, 2, 3))


def decays(heads: int) -> Tensor:
    """From 0.3 to 0.9999, a head each."""
    return 1 - torch.logspace(torch.log10(torch.tensor(0.7)).item(), -4, heads)


def draw(program: Program, g: torch.Generator) -> dict[str, Tensor]:
    """One token of one sequence in bfloat16 values; RWKV-7's c takes back a part of what p finds."""
    tails = {"scalar": (), "key": SIZES[:1], "value": SIZES[1:]}
    found: dict[str, Tensor] = {}
    for v in program.inputs:
        shape = (1, HEADS, *tails[v.kind])
        if DRAWN[v.name] == "gate":
            x = decays(HEADS).view(1, HEADS, *[1] * len(tails[v.kind])).expand(shape)
            found[v.name] = x * (1 - 1e-5 * torch.rand(shape, generator=g))
            continue
        x = torch.rand(shape, generator=g) if DRAWN[v.name] == "rate" else torch.randn(shape, generator=g)
        x = torch.nn.functional.normalize(x, dim=-1) if DRAWN[v.name] == "unit" else x
        found[v.name] = x.bfloat16().float()
    if "c" in found:
        found["c"] = (-0.5 * found["p"]).bfloat16().float()
    return found


class Side:
    """A state that the generated step keeps."""

    def __init__(self, program: Program, read: torch.dtype | None) -> None:
        gates = {e.factor for e in program.events if isinstance(e, Decay)}
        narrow = [v for v in program.inputs if v.kind != "scalar" and v not in gates]
        rows = tuple(torch.bfloat16 if v in narrow else torch.float32 for v in program.logged)
        plan = Plan(
            program, LAYOUT, "buffered", SIZES, FLUSH, FLUSH, torch.float32, rows, target="cpp", read_dtype=read
        )
        self.op = ops.step_op(plan)
        ops.use_cpp(plan)
        self.state = torch.zeros(1, HEADS, *SIZES)
        self.cursor = torch.zeros(4, 1, dtype=torch.int32)
        self.cursor[1] = FLUSH
        logged = zip(program.logged, rows, strict=True)
        self.sides = [torch.full(plan.row_shape(v, (1, HEADS)), torch.nan, dtype=d) for v, d in logged]
        self.shadow: list[Tensor] = []
        if read is not None:
            values = torch.full_like(self.state, torch.nan, dtype=read)
            self.shadow = [values, torch.zeros(plan.scale_shape((1, HEADS)))]

    def step(self, inputs: list[Tensor]) -> Tensor:
        return self.op(self.state, self.cursor, *self.sides, *self.shadow, *inputs)


def errors(name: str, steps: int) -> tuple[list[float], float, float]:
    """Of each quarter of a run: the relative error of outputs that came from a shadow. And of the state at the end,
    with a shadow and without."""
    case, g = RECURRENCES[name], torch.Generator().manual_seed(0)
    sides = Side(case.program, torch.float16), Side(case.program, None)
    exact = torch.zeros(1, HEADS, *SIZES, dtype=torch.float64)
    wrong, size = torch.zeros(4, HEADS), torch.zeros(4, HEADS)
    for t in range(steps):
        inputs = list(draw(case.program, g).values())
        half, _ = (side.step(inputs) for side in sides)
        want = in_float64(case.program, exact, inputs)
        wrong[4 * t // steps] += (half - want).square().mean((0, -1)).float()
        size[4 * t // steps] += want.square().mean((0, -1)).float()
    inputs = list(draw(case.program, g).values())
    for side in sides:
        side.cursor[1] = 0  # one more step, which folds all rows of those before into the state
        side.step(inputs)
    quarters = (wrong / size).sqrt().mean(1).tolist()
    return quarters, *(relative(side.state, exact) for side in sides)


def relative(state: Tensor, exact: Tensor) -> float:
    """Error of a state, each head relative to its own size."""
    return float(((state - exact).square().mean((-1, -2)) / exact.square().mean((-1, -2))).sqrt().mean())


def in_float64(program: Program, S: Tensor, inputs: list[Tensor]) -> Tensor:
    """The definition on a dense state, in place."""
    memory = Dense(S)
    found = run(program, memory, {v.name: x.double() for v, x in zip(program.inputs, inputs, strict=True)})
    S.copy_(memory.state)
    return found[program.outputs[0].name]


def feeds_back(program: Program) -> bool:
    """Whether what is read decides what is written."""
    inputs = set(program.inputs)
    made = {op.out for op in program.ops if isinstance(op, Map) and inputs.issuperset(op.args)}
    return any({e.left, e.right} - inputs - made for e in program.events if isinstance(e, Update))


@pytest.mark.skipif(build.compiler() is None, reason="needs a C++ compiler")
@pytest.mark.parametrize(
    ("name", "steps"),
    [("gdn", 1024), *(pytest.param(name, 8192, marks=pytest.mark.nightly) for name in RECURRENCES)],
)
def test_nothing_drifts(name: str, steps: int) -> None:
    quarters, half, full = errors(name, steps)
    print(f"DRIFT {name} {steps} {quarters} {half:.3g} {full:.3g} {feeds_back(RECURRENCES[name].program)}")
    assert quarters[3] <= 1.2 * quarters[0], quarters
    assert 1e-5 < max(quarters) <= 2**-11
    assert full < 2e-6
    assert half <= (2**-11 if feeds_back(RECURRENCES[name].program) else 1.5 * full)
