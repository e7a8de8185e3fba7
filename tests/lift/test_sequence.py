"""Several tokens as one call, T known at run time: lifted to the verify step of the one-token program."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from kvbuffer_compile.backend import GraphRecord
from kvbuffer_compile.errors import Declined
from kvbuffer_compile.integrations.functions.adapters import GATED, GATED_DELTA, MOST_TOKENS, SUMMED
from kvbuffer_compile.ir.plan import Plan
from kvbuffer_compile.runtime import by_hand
from tests import zoo
from tests.models.test_models import in_float64
from tests.support.daily import chosen
from tests.support.oracle import check, check_steps
from tests.zoo.configs import VOCAB

FAST = {"inner": "eager", "target": "aten", "flush": 8, "capacity": 24}
B, H, G, K, V = 2, 4, 2, 3, 5


def grouped_delta_rule(S: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """q, k [B, T, G, K], each of G groups serving H / G heads; v [B, T, H, V]; g, beta [B, T, H]; S [B, H, K, V]."""
    if q.shape[1] > MOST_TOKENS:
        raise ValueError("too many tokens")
    q, k = (x.repeat_interleave(H // G, 2).transpose(1, 2) for x in (q, k))
    v, g, beta = (x.transpose(1, 2) for x in (v, g, beta))
    new, out = torch.ops.kvbuffer.sequence(S, [g.exp(), k, v, beta, q], GATED_DELTA["s"])
    S.copy_(new)
    return out.transpose(1, 2) * 2


def draw(tokens: int, g: torch.Generator) -> tuple[Tensor, ...]:
    def normal(*sizes: int) -> Tensor:
        return torch.randn(B, tokens, *sizes, generator=g)

    rates = (torch.rand(B, tokens, H, generator=g) for _ in range(2))
    return normal(G, K), normalize(normal(G, K), dim=-1), normal(H, V), -next(rates), next(rates)


def plans(records: list[GraphRecord]) -> list[Plan]:
    return [plan for r in records for _, plan in r.rewritten]


def test_any_number_of_tokens_is_one_graph(records: list[GraphRecord]) -> None:
    g = torch.Generator().manual_seed(0)
    first = torch.randn(B, H, K, V, generator=g)
    dtypes = (torch.float32, torch.float32, torch.float64)
    states = [first.to(d).clone() for d in dtypes]
    run = torch.compile(grouped_delta_rule, backend="kvbuffer", fullgraph=True, options=FAST)
    outs: list[list[Tensor]] = [[], [], []]
    with torch.no_grad():
        for tokens in (3, 4, 2, 5, 7, 1, 6, 2, 16, 1):
            inputs = draw(tokens, g)
            for step, state, dtype, kept in zip((run, *[grouped_delta_rule] * 2), states, dtypes, outs, strict=True):
                kept.append(step(state, *(x.to(dtype) for x in inputs)))
    check_steps(*outs, "outputs")
    check(states[0] + 0, states[1], states[2], "state")
    assert [plan.variant for plan in plans(records)] == ["verify", "verify", "buffered"]  # 3 tokens, any number, one
    assert all(plan.shares_rows(plans(records)[0]) for plan in plans(records))
    keys = [v for v in plans(records)[0].program.inputs if v.kind == "key"]
    assert keys and all(len(v.lanes) == 2 for v in keys), "keys are stored once per group"


def test_without_gain_the_call_stays(records: list[GraphRecord]) -> None:
    g = torch.Generator().manual_seed(0)
    state, inputs = torch.randn(B, H, K, V, generator=g), draw(3, g)
    expected = state.clone()
    with torch.no_grad():
        run = torch.compile(grouped_delta_rule, backend="kvbuffer", fullgraph=True, options={**FAST, "flush": "auto"})
        torch.testing.assert_close(run(state, *inputs), grouped_delta_rule(expected, *inputs))
    torch.testing.assert_close(state, expected)
    ((_, why),) = records[0].states
    assert isinstance(why, Declined) and why.rule == "no-gain"


def beside_a_sum(A: Tensor, S: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """Keys over a running sum [B, H, K] of their squares, the one column of a matrix to a sequence of tokens."""
    ones = torch.ones_like(g)[..., None]
    after, sums = torch.ops.kvbuffer.sequence(A[..., None], [g.exp(), k * k, ones, ones], SUMMED)
    new, out = torch.ops.kvbuffer.sequence(S, [g.exp(), k / (1 + sums), v, q], GATED["s"])
    A.copy_(after[..., 0])
    S.copy_(new)
    return out.transpose(1, 2)


def test_a_vector_beside_a_sequence_is_kept(records: list[GraphRecord]) -> None:
    g = torch.Generator().manual_seed(0)
    shapes = (B, H, K), (B, H, K, V)
    dtypes = (torch.float32, torch.float32, torch.float64)
    first = [torch.rand(shape, generator=g) for shape in shapes]
    states, outs = [[x.to(d, copy=True) for x in first] for d in dtypes], ([], [], [])
    run = torch.compile(beside_a_sum, backend="kvbuffer", fullgraph=True, options=FAST)
    with torch.no_grad():
        for _ in range(6):
            q, k, v = (torch.randn(B, H, 4, n, generator=g) for n in (K, K, V))
            given = (q, k, v, -torch.rand(B, H, 4, generator=g))
            for step, held, dtype, kept in zip((run, *[beside_a_sum] * 2), states, dtypes, outs, strict=True):
                kept.append(step(*held, *(x.to(dtype) for x in given)))
    check_steps(*outs)
    for got, eager, exact in zip(*states, strict=True):
        check(got + 0, eager, exact)
    assert [plan.variant for plan in plans(records)] == ["verify"]
    assert [(records[0].name(r.state), r.kept, r.why.rule) for r in records[0].refused] == [("A", True, "vector")]


def test_what_is_done_once_beside_the_tokens_is_refused(records: list[GraphRecord]) -> None:
    """A decay of the state before the call happens once, not for every token."""

    def decayed(S: Tensor, *inputs: Tensor) -> Tensor:
        q, k, v, g, _ = (x.transpose(1, 2) for x in inputs)
        k, q = (x.repeat_interleave(2, 1) for x in (k, q))
        new, out = torch.ops.kvbuffer.sequence(S * 0.5, [g.exp(), k, v, q], GATED["s"])
        S.copy_(new)
        return out

    g = torch.Generator().manual_seed(0)
    state, inputs = torch.randn(B, H, K, V, generator=g), draw(3, g)
    expected = state.clone()
    with torch.no_grad():
        run = torch.compile(decayed, backend="kvbuffer", fullgraph=True, options=FAST)
        torch.testing.assert_close(run(state, *inputs), decayed(expected, *inputs))
    torch.testing.assert_close(state, expected)
    assert "several-sequences" in {r.why.rule for r in records[0].refused} and not records[0].rewritten


def test_other_backends_run_the_call() -> None:
    g = torch.Generator().manual_seed(0)
    state, inputs = torch.randn(B, H, K, V, generator=g), draw(3, g)
    expected = state.clone()
    with torch.no_grad():
        run = torch.compile(grouped_delta_rule, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(run(state, *inputs), grouped_delta_rule(expected, *inputs))
    torch.testing.assert_close(state, expected)


# ------------------------------------------------------------------------------- functions of transformers

DAILY = {"kimi_linear"}  # speculation of qwen3_5 and of mamba2 has the functions of the others, in every run too
CHUNKED = ("kimi_linear", "mamba2", "qwen3_next", "qwen3_5", "qwen3_5_moe", "olmo_hybrid", "bailing_hybrid", "bamba",
           "falcon_h1", "granitemoehybrid", "nemotron_h", "zamba2")  # fmt: skip
LENGTHS = (1, 1, 3, 5, 1, 2, 7, 4, 1, 16)


class Forward:
    """All logits of several tokens, the cache inside."""

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        model = zoo.make_model(name) if dtype == torch.float32 else in_float64(zoo.make_model(name))
        self.step = zoo.prefilled(model, zoo.prompt(2, 6))

    def __call__(self, tokens: Tensor) -> Tensor:
        step, count = self.step, tokens.shape[1]
        extra = {step.argument: step.cache}
        if step.argument == "past_key_values":
            positions = torch.arange(count, device=tokens.device) + step.cache.get_seq_length()
            extra["position_ids"] = positions.expand(tokens.shape[0], count)
        return step.model(tokens, use_cache=True, **extra).logits


@pytest.mark.parametrize("name", chosen(CHUNKED, DAILY))
def test_chunked_functions_verify(name: str, records: list[GraphRecord]) -> None:
    """Any number of tokens on an existing state is one graph that shares its rows with decoding."""
    runs = [Forward(name, d) for d in (torch.float32, torch.float32, torch.float64)]
    compiled = torch.compile(runs[0], backend="kvbuffer", options=FAST)
    tokens = torch.randint(0, VOCAB - 1, (2, sum(LENGTHS)), generator=torch.Generator().manual_seed(5))
    outs: list[list[Tensor]] = [[], [], []]
    with torch.no_grad():
        for part in tokens.split(LENGTHS, 1):
            for run, kept in zip((compiled, *runs[1:]), outs, strict=True):
                kept.append(run(part))
    check_steps(*outs, "logits")
    for (what, got), (_, eager), (_, exact) in zip(*(zoo.states_of(r.step) for r in runs), strict=True):
        check(got + 0, eager, exact, what)
    states = zoo.ARCHS[name].states
    rewritten = [r for r in records if r.rewritten]
    assert [len(r.rewritten) for r in rewritten] == [states] * len(rewritten)
    assert {plan.variant for plan in plans(rewritten[-1:])} == {"verify"}
    assert len(rewritten) <= 4, "decode before and after the states are guarded, several tokens at most twice"
    assert all(plan.shares_rows(plans(rewritten)[0]) for plan in plans(rewritten))


@pytest.mark.nightly
def test_several_tokens_captured_in_parts_verify(records: list[GraphRecord]) -> None:
    """glm5_next breaks its graph at each layer: every part with a state is a verify step of its own."""
    name = "glm5_next"
    runs = [Forward(name, d) for d in (torch.float32, torch.float32, torch.float64)]
    compiled = torch.compile(runs[0], backend="kvbuffer", options=FAST)
    lengths = (3, 3, 1, 5, 3, 2)
    tokens = torch.randint(0, VOCAB - 1, (2, sum(lengths)), generator=torch.Generator().manual_seed(5))
    outs: list[list[Tensor]] = [[], [], []]
    with torch.no_grad():
        for part in tokens.split(lengths, 1):
            for run, kept in zip((compiled, *runs[1:]), outs, strict=True):
                kept.append(run(part))
    accounts = by_hand.accounts_of(runs[0].step.cache)
    assert len(accounts) == zoo.ARCHS[name].states and all(a.cursor[0].max() > 0 for a in accounts)
    check_steps(*outs, "logits")
    for (what, got), (_, eager), (_, exact) in zip(*(zoo.states_of(r.step) for r in runs), strict=True):
        check(got + 0, eager, exact, what)
    several = [r for r in records if r.states and any(lifted.several for lifted, _ in r.states)]
    assert len(several) >= zoo.ARCHS[name].states
    assert [len(r.rewritten) for r in several] == [1] * len(several)
    assert {plan.variant for plan in plans(several)} == {"verify"}
    assert {plan.program.signature for plan in plans(records)} == {zoo.ARCHS[name].signature}
    assert all(plan.shares_rows(plans(several)[0]) for plan in plans(records))


def test_other_backends_keep_the_chunked_function() -> None:
    forward, eager = Forward("qwen3_next", torch.float32), Forward("qwen3_next", torch.float32)
    called = []

    def backend(gm: torch.fx.GraphModule, inputs: object) -> object:
        called.append([n for n in gm.graph.nodes if n.target is torch.ops.kvbuffer.sequence.default])
        return gm.forward

    tokens = zoo.prompt(2, 3, seed=5)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(forward, backend=backend)(tokens), eager(tokens))
    assert called and not any(called)
