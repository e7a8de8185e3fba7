"""Real transformers models, end to end: greedy tokens equal eager's, logits and states satisfy the oracle."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch

from kvbuffer_compile import materialize
from tests import zoo
from tests.support.daily import chosen, row
from tests.support.oracle import Oracle, check, check_steps

MODELS = ("qwen3_next", "qwen3_5", "mamba2")
FAST = {"inner": "eager", "target": "aten"}


def rewritten_graphs(records):
    return [r for r in records if r.rewritten]


def generate(model, ids, tokens, cache):
    extra = {"cache_implementation": "static"} if cache == "static" else {}
    with torch.no_grad():
        return zoo.greedy(model, ids, tokens, **extra)


def cases():
    """All models x L x batch x cache nightly, one always; `test_inference_mode` has a dynamic cache."""
    yield "qwen3_next", 16, 1, "static", 64
    yield row(("qwen3_5", 7, 3, "dynamic", 128), daily=False)
    yield row(("mamba2", 7, 3, "dynamic", 128), daily=False)
    for case in itertools.product(MODELS, (1, 2, 7, 16, 32), (1, 3), ("dynamic", "static"), (512,)):
        yield row(case, daily=False)


@pytest.mark.parametrize(("name", "flush", "batch", "cache", "tokens"), cases())
def test_generate_gives_the_tokens_of_eager(name, flush, batch, cache, tokens, records):
    model = zoo.make_model(name)
    ids = zoo.prompt(3, 8)[:batch]
    expected = generate(model, ids, tokens, cache)
    model.compile(backend="kvbuffer", options={**FAST, "flush": flush})
    got = generate(model, ids, tokens, cache)
    assert torch.equal(got, expected)
    states = zoo.ARCHS[name].states
    variant = "recurrent" if flush == 1 else "buffered"
    assert rewritten_graphs(records), "nothing was rewritten"
    for record in rewritten_graphs(records):
        assert len(record.rewritten) == states
        assert {plan.variant for _, plan in record.rewritten} == {variant}
        assert {plan.program.signature for _, plan in record.rewritten} == {zoo.ARCHS[name].signature}
    compiled = len(records)
    assert torch.equal(generate(model, ids, 20, cache), expected[:, :20]), "a second generate with a fresh cache"
    assert len(records) == compiled, "a fresh cache must not cause another compilation"


def in_float64(model):
    """A float64 copy; grouped matrix products of experts have no double kernel, so experts run one by one."""
    exact = copy.deepcopy(model).double()
    exact.config._experts_implementation = "eager"
    return exact


def run_in_step(name, dtype, flush, steps, batch=2, dynamic=None, **options):
    """Decode the same tokens with a buffered, an eager and a float64 model, under the oracle: the logits of every step,
    the states at some."""
    models = [zoo.make_model(name, dtype), zoo.make_model(name, dtype)]
    exact_model = in_float64(models[1])
    buffered, eager, exact = (zoo.prefilled(m, zoo.prompt(batch, 6)) for m in (*models, exact_model))
    step = torch.compile(buffered, backend="kvbuffer", dynamic=dynamic, options={**FAST, "flush": flush, **options})
    tokens = zoo.prompt(batch, steps, seed=5)
    with torch.no_grad(), Oracle() as oracle:
        for t in range(steps):
            token = tokens[:, t : t + 1]
            oracle.add(*(run(token) for run in (step, eager, exact)), "logits")
            if t % 11 == 10 or t == steps - 1:
                for (where, got), (_, want), (_, true) in zip(
                    *map(zoo.states_of, (buffered, eager, exact)), strict=True
                ):
                    oracle.add(got + 0, want, true, where)


@pytest.mark.parametrize("name", chosen(MODELS, {"mamba2"}))
def test_logits_and_states_satisfy_the_oracle(name, records):
    """Of other models in every run, over a few flushes, see `test_architectures`."""
    run_in_step(name, torch.float32, flush=7, steps=60)
    assert rewritten_graphs(records)


@pytest.mark.parametrize("name", chosen(MODELS, {"mamba2"}))
def test_a_loop_with_dynamic_shapes(name, records):
    run_in_step(name, torch.float32, flush=5, steps=23, dynamic=True)
    assert rewritten_graphs(records) and all(
        len(r.rewritten) == zoo.ARCHS[name].states for r in rewritten_graphs(records)
    )


@pytest.mark.parametrize("name", chosen(MODELS, {"qwen3_5"}))
def test_bfloat16_models(name, records):
    """A model in bfloat16 rounds its logits; the states, float32 in all three, are held to the oracle as well."""
    model, reference = zoo.make_model(name, torch.bfloat16), zoo.make_model(name, torch.bfloat16)
    exact_model = in_float64(reference)
    buffered, eager, exact = (zoo.prefilled(m, zoo.prompt(2, 6)) for m in (model, reference, exact_model))
    step = torch.compile(buffered, backend="kvbuffer", options={**FAST, "flush": 7})
    tokens = zoo.prompt(2, 24, seed=5)
    got, want, true = [], [], []
    with torch.no_grad():
        for t in range(24):
            for run, kept in ((step, got), (eager, want), (exact, true)):
                kept.append(run(tokens[:, t : t + 1]))
    check_steps(got, want, true, "logits")
    for (where, state), (_, wanted), (_, exactly) in zip(*map(zoo.states_of, (buffered, eager, exact)), strict=True):
        check(state + 0, wanted, exactly, where)
    assert rewritten_graphs(records)


@pytest.mark.parametrize("name", chosen(MODELS, {"mamba2"}))
def test_two_caches_interleave(name, records):
    model, reference = zoo.make_model(name), zoo.make_model(name)
    pairs = [(zoo.prefilled(model, zoo.prompt(2, n)), zoo.prefilled(reference, zoo.prompt(2, n))) for n in (5, 9)]
    model.compile(backend="kvbuffer", options={**FAST, "flush": 4})
    tokens = zoo.prompt(2, 30, seed=3)
    with torch.no_grad():
        for t in range(30):
            for i, (buffered, eager) in enumerate(pairs):
                if t % 3 != i:  # uneven turns, so that the two hold different numbers of rows
                    token = tokens[:, t : t + 1]
                    torch.testing.assert_close(buffered(token), eager(token), rtol=1e-4, atol=1e-4)
    assert rewritten_graphs(records)


def test_inference_mode(records):
    model = zoo.make_model("qwen3_5")
    ids = zoo.prompt(3, 8)
    expected = generate(model, ids, 48, "dynamic")
    model.compile(backend="kvbuffer", options={**FAST, "flush": 7})
    with torch.inference_mode():
        got = zoo.greedy(model, ids, 48)
    assert torch.equal(got, expected) and rewritten_graphs(records)


def test_a_decode_step_with_inductor_and_generated_kernels(records):
    """Without the prompt, which the next test compiles too."""
    steps = [zoo.prefilled(zoo.make_model("mamba2"), zoo.prompt(2, 6)) for _ in range(2)]
    compiled = torch.compile(steps[0], backend="kvbuffer", options={"flush": 4})
    tokens = zoo.prompt(2, 11, seed=5)
    with torch.no_grad():
        for token in tokens.split(1, 1):
            torch.testing.assert_close(compiled(token), steps[1](token), rtol=1e-4, atol=1e-4)
    for record in rewritten_graphs(records):
        assert len(record.rewritten) == zoo.ARCHS["mamba2"].states
        assert {(plan.variant, plan.target) for _, plan in record.rewritten} == {("buffered", "cpp")}
    assert rewritten_graphs(records)


@pytest.mark.nightly
@pytest.mark.parametrize("name", MODELS)
def test_with_inductor_and_generated_kernels(name, records):
    """The whole way, as a user runs it, for some tokens."""
    model = zoo.make_model(name)
    ids = zoo.prompt(3, 8)
    expected = generate(model, ids, 64, "dynamic")
    model.compile(backend="kvbuffer", options={"flush": 8})
    assert torch.equal(generate(model, ids, 64, "dynamic"), expected)
    assert rewritten_graphs(records)


def test_a_cache_can_be_materialised_by_hand():
    model = zoo.make_model("mamba2")
    step = zoo.prefilled(model, zoo.prompt(2, 6))
    reference = zoo.prefilled(zoo.make_model("mamba2"), zoo.prompt(2, 6))
    compiled = torch.compile(step, backend="kvbuffer", options={**FAST, "flush": 16})
    with torch.no_grad():
        for t in range(5):
            token = zoo.prompt(2, 5, seed=1)[:, t : t + 1]
            compiled(token), reference(token)
    from kvbuffer_compile.runtime import by_hand

    accounts = by_hand.accounts_of(step.cache)
    assert len(accounts) == zoo.ARCHS["mamba2"].states and all(a.dirty for a in accounts)
    materialize(step.cache)
    assert not any(a.dirty for a in accounts)
    for account, (_, want) in zip(accounts, reversed(zoo.states_of(reference)), strict=True):
        torch.testing.assert_close(account.state, want, rtol=1e-4, atol=1e-5)
