"""The zoo itself: its states remember, its decays are where they should be, its text is worth comparing.

A wrong buffered update must show in the tokens of these models. Otherwise tests that use them prove nothing.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch
from transformers import PreTrainedModel

from tests.zoo import (
    ARCHS,
    Arch,
    decode_step,
    greedy,
    greedy_text,
    make_model,
    prefilled,
    prompt,
    skip_where_nothing_compiles,
    states_of,
)
from tests.zoo.measure import influence, transition

# One of each family in every run, the rest nightly.
DAILY = {"qwen3_next", "qwen3_5", "olmo_hybrid", "kimi_linear", "mamba2", "falcon_h1", "minimax", "xlstm", "mamba"}
WITH_DECAY = {"mamba", "falcon_mamba", "jamba", "zamba"} | {a.name for a in ARCHS.values() if a.states}
REMEMBERING = {a.name for a in ARCHS.values() if a.remembers}


def params(names: set[str]) -> list:
    """One parameter for each architecture of `names`, nightly unless it is one of DAILY."""
    marks = {name: () if name in DAILY else pytest.mark.nightly for name in ARCHS if name in names}
    return [pytest.param(ARCHS[name], id=name, marks=mark) for name, mark in marks.items()]


def batch(arch: Arch) -> int:
    return 1 if arch.name == "rwkv" else 3  # the library's own one-token step of RWKV is wrong for more


@cache
def model(name: str) -> PreTrainedModel:
    return make_model(name)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("arch", params(REMEMBERING))
def test_a_state_of_16_tokens_ago_is_seen_in_the_logits(arch: Arch):
    for index, (name, _) in enumerate(states_of(decode_step(model(arch.name), 1)[0])):
        assert influence(model(arch.name), index, ago=16) > 1e-3, name


@pytest.mark.parametrize("arch", params(WITH_DECAY))
def test_decays_remember_and_forget(arch: Arch):
    states = states_of(decode_step(model(arch.name), 1)[0])
    assert len(states) == arch.states or not arch.states
    for index in range(len(states)):
        found = transition(model(arch.name), index)
        assert 0.25 < found.decay.min() < 0.85
        # The stabiliser of xLSTM takes its decay over where nothing larger comes in.
        assert 0.99 < found.decay.max() < (1.00001 if arch.name == "xlstm" else 0.9995)
        if "RU" in arch.signature:
            assert found.beta.max() > 0.3
        else:
            assert found.beta.abs().max() < 1e-4
        if arch.name == "olmo_hybrid":
            assert found.beta.max() > 1


@pytest.mark.parametrize("arch", params(WITH_DECAY - {"kimi_linear", "glm5_next", "bailing_hybrid"}))
def test_only_dense_decays_vary_within_a_head(arch: Arch):
    decay = transition(model(arch.name), 0).decay
    spread = (decay.amax((-1, -2)) - decay.amin((-1, -2))).max()
    assert (spread < 1e-4) == (arch.states > 0)


@pytest.mark.parametrize("arch", params(set(ARCHS)))
def test_decode_steps_say_what_generate_says(arch: Arch):
    ids = prompt(batch(arch), 8)
    expected = greedy_text(model(arch.name), ids, 16).tokens
    assert torch.equal(greedy(model(arch.name), ids, 16), expected)
    if arch.static_cache:
        assert torch.equal(greedy_text(model(arch.name), ids, 16, cache="static").tokens, expected)


@pytest.mark.parametrize("arch", params(set(ARCHS)))
def test_weights_depend_on_name_and_seed_alone(arch: Arch):
    torch.manual_seed(5)
    same, rounded, other = arch.make(), arch.make(torch.bfloat16), make_model(arch.name, seed=1)
    first = dict(model(arch.name).named_parameters())
    assert all(torch.equal(p, first[n]) for n, p in same.named_parameters())
    assert all(torch.equal(p.float(), first[n].to(p.dtype).float()) for n, p in rounded.named_parameters())
    assert any(not torch.equal(p, first[n]) for n, p in other.named_parameters())
    step = prefilled(rounded, prompt(batch(arch), 5))
    assert step(prompt(batch(arch), 1)).isfinite().all()


@pytest.mark.nightly
@pytest.mark.parametrize("arch", params(set(ARCHS)))
def test_greedy_text_is_worth_comparing(arch: Arch):
    """No near-ties that rounding decides, and no loop in which every wrong state looks right."""
    text = greedy_text(model(arch.name), prompt(batch(arch), 8), 256)
    assert text.margins.min() > 1e-4
    assert text.looped_at() > 200
    assert min(len(row.unique()) for row in text.tokens) > (10 if arch.name == "zaya" else 40)


@pytest.mark.nightly
@pytest.mark.parametrize("arch", params(set(ARCHS)))
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_decode_step_is_captured_whole(arch: Arch, kind: str):
    if kind == "static" and not arch.static_cache:
        pytest.skip("brings a cache of its own")
    skip_where_nothing_compiles(arch.name)
    torch._dynamo.reset()
    graphs = []
    backend = lambda graph, _: graphs.append(graph) or graph.forward  # noqa: E731
    step, _ = decode_step(model(arch.name), batch(arch), kind)
    with torch.no_grad():
        torch.compile(step, fullgraph=arch.fullgraph, backend=backend)(prompt(batch(arch), 1))
    assert (len(graphs) == 1) == arch.fullgraph
