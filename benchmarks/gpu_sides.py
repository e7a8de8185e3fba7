"""The sides that benchmarks.gpu compares: our generated steps, plain Inductor, fla-core's fused recurrent kernels."""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from kvbuffer_compile.codegen.schedule import schedule
from kvbuffer_compile.codegen.standalone.check import Subject, check
from kvbuffer_compile.codegen.standalone.reference import emit_reference
from kvbuffer_compile.codegen.triton.launch import Config, held, space
from kvbuffer_compile.codegen.triton.load import load
from kvbuffer_compile.codegen.triton.triton import emit
from kvbuffer_compile.commands.recurrences import DRAWN, Recurrence
from kvbuffer_compile.ir.plan import Layout, Plan
from kvbuffer_compile.ir.program import Decay
from kvbuffer_compile.steps import ops

ROOM = 32  # slots beyond the context of a sequence that lives in its rows alone

Calls = Sequence[Callable[[], Any]]


@dataclass(frozen=True)
class Place:
    """Where sides run. dry: on the CPU, kernels in Triton's interpreter, wall-clock time instead of CUDA graphs."""

    dry: bool
    flush: int = 16

    @cached_property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.dry else "cuda")

    def seconds(self, calls: Calls, repeats: int = 11) -> float:
        """Seconds it takes to make all calls once: the median of several replays of one CUDA graph."""
        if self.dry:
            start = time.perf_counter()
            for call in calls:
                call()
            return time.perf_counter() - start
        for call in calls[:2]:
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        times = []
        for _ in range(repeats + 3):
            start_event, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start_event.record()
            graph.replay()
            stop.record()
            stop.synchronize()
            times.append(start_event.elapsed_time(stop) / 1e3)
        return statistics.median(times[3:])


def plan_of(r: Recurrence, variant: str, dtype: torch.dtype, flush: int, capacity: int) -> Plan:
    """Rows in bfloat16, but gates and other scalars in float32."""
    gates = {e.factor for e in r.program.events if isinstance(e, Decay)}
    rows = tuple(torch.float32 if v.kind == "scalar" or v in gates else torch.bfloat16 for v in r.program.logged)
    layout = Layout(((None,), (r.heads,), (r.sizes[0],), (r.sizes[1],)), (0, 1, 2, 3))
    return Plan(r.program, layout, variant, r.sizes, flush, capacity, dtype, rows, target="triton")  # type: ignore[arg-type]


def forms(plan: Plan) -> dict[str, Config]:
    """The forms of a buffered or verify step, "streamed" and "held", with the likeliest launch of each."""
    order = schedule(plan.program, in_place=plan.variant != "buffered")
    streamed = [config for config in space(plan, order) if config.part]
    return {**({"streamed": streamed[0]} if streamed else {}), "held": held(plan, order)}


def step_of(plan: Plan, place: Place, config: Config | None = None) -> Callable[..., Any]:
    """The plan's op with its generated kernel behind it; with a config the kernel alone, launched in that way."""
    if config:
        launch = load(emit(plan, config), place.dry).launch

        def step(state: Tensor, cursor: Tensor, *rest: Tensor) -> Any:
            return launch(state, cursor, ops.tickets_of(cursor), rest[: plan.sides], rest[plan.sides :])

        return step
    op = ops.step_op(plan)
    ops.use_triton(plan, interpret=place.dry)
    return op  # type: ignore[no-any-return]


class Side:
    """One plan's op on several states in turn, so that none is in the L2 cache when its turn comes."""

    def __init__(
        self, place: Place, r: Recurrence, plan: Plan, batch: int, copies: int, tokens: int = 1,
        config: Config | None = None,
    ) -> None:  # fmt: skip
        self.plan, self.tokens, self.step = plan, tokens, step_of(plan, place, config)
        lanes = (batch, r.heads)
        shape = (*lanes, *r.sizes)
        self.states = [torch.randn(shape, device=place.device).mul_(0.1).to(plan.state_dtype) for _ in range(copies)]
        self.logs = [self._log(lanes, place.device) for _ in range(copies)]
        self.inputs = [r.inputs(batch, torch.bfloat16, place.device) for _ in range(4)]
        if plan.variant == "verify":
            self.inputs = [[torch.stack([x] * tokens, 2) for x in xs] for xs in self.inputs]

    def _log(self, lanes: tuple[int, int], device: torch.device) -> list[Tensor]:
        if self.plan.variant == "recurrent":
            return []
        cursor = ops.new_cursor(self.plan, lanes, device)
        cursor[1].fill_(self.plan.flush)
        shapes = [self.plan.row_shape(v, lanes) for v in self.plan.program.logged]
        dtypes = self.plan.row_dtypes
        return [cursor, *(torch.zeros(s, dtype=d, device=device) for s, d in zip(shapes, dtypes, strict=True))]

    def owe(self, tokens: int, empty: bool = False) -> None:
        """Every sequence owes this many tokens; `empty`: to a state that holds nothing."""
        for cursor, *_ in self.logs:
            cursor[0].fill_(tokens)
            cursor[3].fill_(int(empty))

    def calls(self, rounds: int) -> Calls:
        """One step on every state, `rounds` times."""
        return [
            (lambda i=i, t=t: self.step(self.states[i], *self.logs[i], *self.inputs[t % 4]))  # type: ignore[misc]
            for t in range(rounds)
            for i in range(len(self.states))
        ]

    def seconds(self, place: Place, rounds: int) -> float:
        """Seconds a step takes."""
        return place.seconds(self.calls(rounds)) / rounds / len(self.states)


# ------------------------------------------------------------------------------------------- correctness


def error(place: Place, r: Recurrence, plan: Plan, batch: int, tokens: int = 1, config: Config | None = None) -> float:
    """Largest relative error of the plan's steps against float64; AssertionError when it is more than it may be."""
    step = step_of(plan, place, config)
    space: dict[str, Any] = {"torch": torch}
    exec(emit_reference(plan.program), space)

    def run(state: Tensor, cursor: Tensor, rows: list[Tensor], operands: list[Tensor]) -> list[Tensor]:
        if plan.variant == "recurrent":
            return [step(state, *operands)]
        slab = ops.new_cursor(plan, (batch, r.heads), place.device)
        slab.copy_(cursor)
        out = step(state, slab, *rows, *operands)
        cursor.copy_(slab)
        return list(out) if isinstance(out, (list, tuple)) else [out]

    logged = zip(plan.program.logged, plan.row_dtypes, strict=True) if plan.variant != "recurrent" else ()
    subject = Subject(
        run, space["reference"], plan.variant, plan.sizes, plan.flush, plan.capacity, tokens, plan.state_dtype,
        (0, 1, 2, 3), {v.name: (v.kind, DRAWN[v.name]) for v in plan.program.inputs},
        {v.name: (v.kind, d) for v, d in logged},
    )  # fmt: skip
    return check(subject, place.device, batch, r.heads, plan.flush + 2 if place.dry else 0)


# ---------------------------------------------------------------------------------------------- the others


def inductor(place: Place, r: Recurrence, batch: int, dtype: torch.dtype, copies: int) -> float:
    """Seconds a step takes as plain Inductor compiles it."""
    shape = (batch, r.heads, *r.sizes)
    states = [torch.randn(shape, device=place.device).mul_(0.1).to(dtype) for _ in range(copies)]
    inputs = r.inputs(batch, torch.bfloat16, place.device)
    plain = torch.compile(r.step, dynamic=False, backend="eager" if place.dry else "inductor")
    with torch.no_grad():
        expected, state = r.step(states[0].clone(), *inputs), states[0].clone()
        torch.testing.assert_close(plain(state, *inputs), expected, rtol=2e-2, atol=2e-2)
        return place.seconds([lambda s=s: plain(s, *inputs) for s in states]) / copies  # type: ignore[misc]


def _fla_arguments(q: Tensor, k: Tensor, v: Tensor, **rest: Tensor) -> dict[str, Any]:
    """[batch, 1, heads, *] operands, as fla has them, and no scale of the query."""
    named = {"q": q, "k": k, "v": v, **rest}
    return {name: x.unsqueeze(1) for name, x in named.items()} | {"scale": 1.0}


# Module, function, and its arguments from ours.
FLA: dict[str, tuple[str, str, Callable[..., dict[str, Any]]]] = {
    "gdn": ("fla.ops.gated_delta_rule", "fused_recurrent_gated_delta_rule",
            lambda q, k, v, g, beta: _fla_arguments(q, k, v, g=g.log(), beta=beta)),
    "kda": ("fla.ops.kda", "fused_recurrent_kda",
            lambda q, k, v, a, beta: _fla_arguments(q, k, v, g=a.float().log(), beta=beta)),
    "mamba2": ("fla.ops.simple_gla", "fused_recurrent_simple_gla",
               lambda q, k, v, g: _fla_arguments(q, k, v, g=g.log())),
    "gla": ("fla.ops.gla", "fused_recurrent_gla",
            lambda q, k, v, a: _fla_arguments(q, k, v, gk=a.float().log())),
    "rwkv7": ("fla.ops.rwkv7", "fused_recurrent_rwkv7",
              lambda q, k, v, a, p, c: {"r" if n == "q" else n: x for n, x in _fla_arguments(
                  q, k, v, w=a.float().log(), a=p, b=c).items()}),
}  # fmt: skip


def fla(place: Place, r: Recurrence, batch: int, dtype: torch.dtype, copies: int) -> float | str:
    """Seconds a step takes in fla-core's fused recurrent kernel, or why it was not measured."""
    if r.name not in FLA or place.dry:
        return "skipped: a dry run" if place.dry else "skipped: fla has no such kernel"
    module, name, arguments = FLA[r.name]
    try:
        step = getattr(importlib.import_module(module), name)
        states = [torch.randn(batch, r.heads, *r.sizes, device=place.device).mul_(0.1).to(dtype) for _ in range(copies)]
        inputs = r.inputs(batch, torch.bfloat16, place.device)
        given = arguments(*inputs)
        expected = r.step(states[0].clone(), *inputs)
        got, _ = step(**given, initial_state=states[0], output_final_state=True)
        torch.testing.assert_close(got[:, 0].float(), expected, rtol=3e-2, atol=3e-2)
        calls = [lambda s=s: step(**given, initial_state=s, output_final_state=True) for s in states]  # type: ignore[misc]
        return place.seconds(calls) / copies
    except Exception as failure:  # not installed, another version of its interface, a size it does not take
        return f"skipped: {type(failure).__name__}: {str(failure).splitlines()[0][:200]}"
