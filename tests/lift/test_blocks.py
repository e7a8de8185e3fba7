"""Blocks: several tokens that read one state by one product and are added to it by one product."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, note, settings
from torch import Tensor

from kvbuffer_compile.backend import GraphRecord, compile_graph, observers
from kvbuffer_compile.errors import Declined
from kvbuffer_compile.ir.plan import Plan
from kvbuffer_compile.options import Options
from kvbuffer_compile.passes.choice.choose import choose
from kvbuffer_compile.passes.lift.lift import lift
from kvbuffer_compile.passes.proof.validate import validate
from tests.lift.test_spellings import SETTINGS
from tests.spelled.block_forms import NONE, STEPS, B, H, K, Step, V, delta, gated, linear, operands
from tests.spelled.block_spellings import Block, blocks
from tests.spelled.lifting import traced
from tests.support.machines import CPU
from tests.support.oracle import check, check_steps

SIGNATURES = dict(linear="RU", gated="RDUD", retention="RDU", delta="RRU", batched="RRU", columns="RDU")


def run(step: Step, tokens: int, **options: Any) -> GraphRecord:
    """Ten calls compiled, in eager mode and in float64: outputs and the state at the end, by the oracle."""
    g = torch.Generator().manual_seed(0)
    start, calls = torch.randn(B, H, K, V, generator=g), [operands(tokens, g) for _ in range(10)]
    return run_beside((step, step), start, calls, **options)


def run_beside(step: tuple[Any, Any], start: Tensor, calls: list[list[Tensor]], **options: Any) -> GraphRecord:
    """step: and the same in float64."""
    states = [start.clone(), start.clone(), start.double()]
    records: list[GraphRecord] = []
    gm = traced(step[0], [states[0], *calls[0]])
    with observers.also(records.append), torch.no_grad():
        ours = Options(**{"inner": "eager", **options})
        compiled = compile_graph(gm, [states[0], *calls[0]], ours=ours, is_inference=True)
        outs = [
            [tuple(compiled([states[0], *given])) for given in calls],
            [step[0](states[1], *given) for given in calls],
            [step[1](states[2], *(x.double() for x in given)) for given in calls],
        ]
    outs = [[x if isinstance(x, tuple) else (x,) for x in each] for each in outs]
    for i in range(len(outs[0][0])):
        check_steps(*([x[i] for x in each] for each in outs))
    check(states[0] + 0, states[1], states[2], "state")
    return records[0]


def sweep(examples: int, derandomize: bool) -> None:
    seen: list[bool] = []

    @settings(max_examples=examples, derandomize=derandomize, **SETTINGS)
    @given(blocks())
    def each(block: Block) -> None:
        note(block.text)
        g = torch.Generator().manual_seed(0)
        start, calls = block.start(g), [block.draws(g) for _ in range(4)]
        steps = (block.function(), block.function(wide=True))
        record = run_beside(steps, start, calls, flush=2 * block.sizes["T"], target="aten")
        assert not [plan for _, plan in record.states if isinstance(plan, Declined)], record.states
        seen.append(bool(record.rewritten) and record.rewritten[0][0].block)
        note(str([(r.state, r.why) for r in record.refused]))
        assert seen[-1]

    each()
    assert len(seen) >= examples and sum(seen) >= 0.99 * len(seen)


def test_spellings_of_blocks() -> None:
    sweep(25, derandomize=True)


@pytest.mark.nightly
def test_many_spellings_of_blocks() -> None:
    sweep(500, derandomize=False)


@pytest.mark.parametrize("tokens", [2, 16, 32])
@pytest.mark.parametrize("name", STEPS)
def test_blocks_are_one_token_with_a_dim_of_tokens(name: str, tokens: int) -> None:
    """However many there are: the program is the same, and the operands are as few."""
    record = run(STEPS[name], tokens, flush=32, target="aten")
    ((lifted, plan),) = record.rewritten
    assert lifted.block and plan.variant == "block"
    assert plan.program.signature == SIGNATURES[name] and len(plan.program.inputs) <= 6
    assert plan.capacity == max(32, tokens)


def test_blocks_longer_than_a_flush() -> None:
    record = run(gated, 16, flush=4, target="aten")
    assert [plan.capacity for _, plan in record.rewritten] == [16]


@pytest.mark.parametrize("name", ["gated", "batched"])
def test_in_cpp(name: str) -> None:
    record = run(STEPS[name], 16, flush=32, target="cpp")
    assert [plan.variant for _, plan in record.rewritten] == ["block"]


def in_a_pool(pool: Tensor, at: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    S = pool[at] * g[..., :1, None] + k.mT @ v
    pool[at] = S
    return q @ S


@pytest.mark.parametrize("target", ["aten", "cpp"])
def test_in_a_pool_of_slots(target: str) -> None:
    """Every other slot stays as it is."""
    g = torch.Generator().manual_seed(0)
    pools = [x := torch.randn(5, H, K, V, generator=g), x.clone(), x.double()]
    records: list[GraphRecord] = []
    options = {"inner": "eager", "target": target, "flush": 8}
    run, outs = torch.compile(in_a_pool, backend="kvbuffer", fullgraph=True, options=options), ([], [], [])
    with observers.also(records.append), torch.no_grad():
        for n in range(7):
            given, at = operands(4, g), torch.tensor([n % 5, (n + 2) % 5])
            outs[0].append(run(pools[0], at, *given))
            outs[1].append(in_a_pool(pools[1], at, *given))
            outs[2].append(in_a_pool(pools[2], at, *(x.double() for x in given)))
    check_steps(*outs)
    check(pools[0] + 0, pools[1], pools[2], "pool")
    assert [plan.variant for _, plan in records[-1].rewritten] == ["block"]


def test_lifting_takes_no_longer_for_more_tokens() -> None:
    """Nothing is written out for each of them: counted in nodes."""
    g = torch.Generator().manual_seed(0)
    sizes = {len(lift(traced(delta, [torch.randn(B, H, K, V), *operands(n, g)])).gm.graph.nodes) for n in (4, 16, 64)}
    assert len(sizes) == 1


def test_what_is_no_block() -> None:
    g = torch.Generator().manual_seed(0)
    state, few, many = torch.randn(B, H, K, V, generator=g), operands(4, g), operands(32, g)
    graph = lift(traced(NONE["once_beside"], [state, *few]))
    ((found,), _) = graph.found, graph.refused
    assert not found.block and found.program.signature.count("U") == 5 and validate(graph, found) is None
    for step in NONE.values():
        graph = lift(traced(step, [state, *many]))
        assert not graph.found and [r.why.rule for r in graph.refused] == ["prefill"], step.__name__


def test_prompts_are_left_alone() -> None:
    g = torch.Generator().manual_seed(0)
    graph = lift(traced(linear, [torch.randn(B, H, K, V), *operands(65, g)]))
    assert not graph.found and [r.why.rule for r in graph.refused] == ["prefill"]


@pytest.mark.parametrize(("lanes", "tokens", "flush"), [((16, 32), 4, 16), ((16, 32), 32, None), ((2, 2), 4, None)])
def test_blocks_are_chosen_by_their_numbers(lanes: tuple[int, int], tokens: int, flush: int | None) -> None:
    """A few tokens on states of 34 MB gain; many share the state's way already, and small states lie in a cache."""
    sizes = [(*lanes, 128, 128), *[(*lanes, tokens, 128)] * 3, (*lanes, tokens)]
    graph = lift(traced(linear, [torch.zeros(1).expand(n).contiguous() for n in sizes]))
    plan = choose(graph.found[0], Options(), CPU, "cpp")
    if flush is not None:
        assert isinstance(plan, Plan) and (plan.variant, plan.flush) == ("block", flush)
        return
    assert isinstance(plan, Declined) and plan.rule == "no-gain"
    assert f"the {tokens} tokens of a call read the state by one product" in plan.reason and "MB" in plan.reason
    asked = choose(graph.found[0], Options(flush=32), CPU, "cpp")
    assert isinstance(asked, Plan) and asked.variant == "block", "an integer is obeyed"
