"""How speculation begins and what it leaves: prompts of any length, states that are not there yet, every accepted
count, and models that are refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from kvbuffer_compile.backend import GraphRecord
from kvbuffer_compile.errors import StateError
from kvbuffer_compile.integrations.transformers import disable_speculation, enable_speculation, speculation_of
from kvbuffer_compile.integrations.transformers.recorded import RecordedForward
from kvbuffer_compile.runtime import by_hand
from tests import zoo
from tests.models.test_models import in_float64
from tests.models.test_speculation import (
    CAPACITY,
    FAST,
    FIRST,
    MORE,
    OLDER,
    Corrupted,
    compiled_model,
    plain_text,
    speculate,
)
from tests.runtime.test_no_memory import state_bytes
from tests.support.daily import chosen
from tests.support.oracle import Oracle
from tests.zoo.build import PREFIXES
from tests.zoo.configs import BASE, BUFFERED
from tests.zoo.weights import remember

LENGTHS = (1, 2, CAPACITY - 1, CAPACITY, CAPACITY + 1, 3 * CAPACITY + 1)
# Layers wide enough for rows alone to pay for longer than a flush length.
WIDE: dict[str, dict[str, Any]] = {
    "mamba2": dict(num_heads=2, head_dim=32, state_size=32, n_groups=1),
    "qwen3_next": dict(linear_key_head_dim=24, linear_value_head_dim=24),
}


def one_of_all(always: str) -> list[Any]:
    """The models, all but one of them nightly."""
    return chosen(FIRST + MORE, {always})


def wide_model(name: str) -> Any:
    prefix = PREFIXES[name]
    config = getattr(transformers, f"{prefix}Config")(**{**BASE, **BUFFERED[name], **WIDE[name]})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, f"{prefix}ForCausalLM")._from_config(config).eval()
        remember(model, 0)
    return model


def states(cache: DynamicCache) -> list[Tensor]:
    return [state for _, state in zoo.states_of(cache)]


@pytest.fixture
def verified(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, list[int]]]:
    """Of each compiled step: how many tokens it had, and how many bytes each state had behind it."""
    seen: list[tuple[int, list[int]]] = []
    verify = RecordedForward._verify

    def watched(self: RecordedForward, cache: DynamicCache, inputs: dict[str, Any]) -> Any:
        out = verify(self, cache, inputs)
        seen.append((inputs["input_ids"].shape[1], [state_bytes(s) for s in states(cache)]))
        return out

    monkeypatch.setattr(RecordedForward, "_verify", watched)
    return seen


# -------------------------------------------------------------------------------------- states that are not there


@pytest.mark.parametrize("name", chosen(["mamba2", "qwen3_next"], {"mamba2"}))
def test_no_state_is_there_before_its_base(name: str, verified: list[tuple[int, list[int]]]) -> None:
    """At every length around the switch: text and states are those of a model that has its states from the start."""
    model, reference = wide_model(name), wide_model(name)
    exact = in_float64(reference)
    model.compile(backend="kvbuffer", options=FAST)
    enable_speculation(model)
    oracle = Oracle()
    for length in (1, 2, *range(10, CAPACITY + 2)):
        ids = zoo.prompt(1, length)
        text = plain_text(reference, ids, 6)
        cache = DynamicCache(config=model.config)
        verified.clear()
        assert torch.equal(speculate(model, ids, Corrupted(text, most=3), 6, past_key_values=cache), text)
        switches = [by_hand.accounts_of(state)[0].first if length <= CAPACITY else 0 for state in states(cache)]
        assert length > CAPACITY or all(FAST["flush"] < switch < CAPACITY for switch in switches)
        assert length > CAPACITY or sum(verified[0][1]) == 0, "the prompt alone needs no state"
        after = text[:, :-1]
        wanted = [states(zoo.prefilled(m, after).cache) for m in (reference, exact)]
        for n, (got, want, true) in enumerate(zip(states(cache), *wanted, strict=True)):
            expected = 0 if after.shape[1] <= switches[n] else got.numel() * got.element_size()
            assert verified[-1][1][n] == expected or after.shape[1] - 4 <= switches[n] < after.shape[1]
            oracle.add(got + 0, want, true, f"state {n}")
    oracle.judge()


@pytest.mark.parametrize("name", one_of_all("mamba2"))
def test_prompts_of_any_length(name: str, records: list[GraphRecord]) -> None:
    """The first call carries drafts and has no state yet; whatever of it is not accepted is taken back. All prompts
    together take three graphs: a first call, several tokens, one token."""
    model, reference = compiled_model(name), zoo.make_model(name)
    enable_speculation(model)
    for length in LENGTHS:
        ids = zoo.prompt(1, length)
        text = plain_text(reference, ids, 20)
        for least in (0, 1):
            drafts = Corrupted(text, wrong=0.5, least=least, most=8 * least)
            assert torch.equal(speculate(model, ids, drafts, 20), text), (length, least)
            assert not least or drafts.rejections
    assert len(records) <= 3


@pytest.mark.parametrize("name", one_of_all("mamba2"))
def test_text_ends_inside_a_draft(name: str, records: list[GraphRecord]) -> None:
    """By length and by an end of text, in the middle of drafts that are all right."""
    model, reference = compiled_model(name), zoo.make_model(name)
    enable_speculation(model)
    for length in (1, 6):
        ids = zoo.prompt(1, length)
        text = plain_text(reference, ids, 40)
        for tokens in (1, 5, 12):
            drafts = Corrupted(text, wrong=0.0, least=8)
            assert torch.equal(speculate(model, ids, drafts, tokens), text[:, : length + tokens])
        if OLDER:
            continue
        end = int(text[0, length + 13])
        expected = torch.cat([ids, zoo.greedy(reference, ids, 40, eos_token_id=end)], 1)
        assert expected.shape[1] < text.shape[1]
        drafts = Corrupted(text, wrong=0.0, least=8)
        assert torch.equal(speculate(model, ids, drafts, 40, eos_token_id=end), expected)
    assert len(records) <= 3


# --------------------------------------------------------------------------------------------- accepted counts


def call(model: Any, cache: DynamicCache, ids: Tensor, seen: int) -> Tensor:
    """Logits of a call as generation makes it."""
    name = "cache_params" if model.config.model_type == "mamba2" else "past_key_values"
    extra: dict[str, Any] = {name: cache, "attention_mask": torch.ones(1, seen + ids.shape[1], dtype=torch.long)}
    if name == "past_key_values":
        extra["position_ids"] = torch.arange(seen, seen + ids.shape[1])[None]
    return model(input_ids=ids, use_cache=True, **extra).logits  # type: ignore[no-any-return]


def contents(cache: DynamicCache) -> Iterator[tuple[str, Tensor]]:
    """What a cache holds beside recurrent states: histories of convolutions, keys and values."""
    for n, layer in enumerate(cache.layers):
        for index, conv in getattr(layer, "conv_states", {}).items():
            if conv is not None:
                yield f"convolution {index} of layer {n}", conv
        if isinstance(layer, DynamicLayer):
            yield f"keys of layer {n}", layer.keys
            yield f"values of layer {n}", layer.values


@pytest.mark.parametrize("name", one_of_all("falcon_h1"))
@torch.no_grad()
def test_a_cache_is_one_of_the_accepted_tokens(name: str) -> None:
    """For every count of drafts that is accepted, in the first call, the next one and the one after: convolutions, keys
    and values, states and lengths are those of a cache that has seen the accepted tokens and nothing else."""
    model, reference = compiled_model(name), zoo.make_model(name)
    exact = in_float64(reference)
    enable_speculation(model)
    drafts, oracle = 4, Oracle()
    for kept in range(drafts + 1):
        cache, seen, text = DynamicCache(config=model.config), 0, torch.empty(1, 0, dtype=torch.long)
        cache.activate_past_recording()
        speculation_of(model).record(cache)
        for round, length in enumerate((6, 1 + drafts, 1 + drafts)):
            ids = zoo.prompt(1, length + drafts * (round == 0), seed=round)
            speculation_of(model).forward.candidates = drafts
            got = call(model, cache, ids, seen)
            cache.crop(kept - drafts)
            text = torch.cat([text, ids], 1)
            text = text[:, : text.shape[1] - drafts + kept]
            caches = [DynamicCache(config=model.config) for _ in range(2)]
            wanted = [call(m, c, text, 0)[:, seen:] for m, c in zip((reference, exact), caches, strict=True)]
            seen = text.shape[1]
            oracle.add(got[:, : wanted[0].shape[1]], *wanted, "logits")
            assert cache.get_seq_length() == seen
            held = [dict(contents(c)) for c in (cache, *caches)]
            assert {what: x.shape for what, x in held[0].items()} == {what: x.shape for what, x in held[1].items()}
            for what, one in held[0].items():
                oracle.add(one, *(h[what] for h in held[1:]), what)
        for n, sides in enumerate(zip(*map(states, (cache, *caches)), strict=True)):
            oracle.add(sides[0] + 0, *sides[1:], f"state {n}")
        speculation_of(model).release()
    oracle.judge()


# -------------------------------------------------------------------------------------------- compiling and undoing


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("order", chosen(["in between", "after", "before", "both"], {"in between"}))
def test_compiling_before_or_after(order: str, records: list[GraphRecord]) -> None:
    """The options that count are those of the last compile; disabling leaves the model compiled and as it was."""
    model, reference = zoo.make_model("mamba2"), zoo.make_model("mamba2")
    ids = zoo.prompt(1, 6)
    text = plain_text(reference, ids, 24)
    if order in ("before", "both"):
        model.compile(backend="kvbuffer", options={**FAST, "flush": 5})
    enable_speculation(model)
    if order == "in between":
        assert torch.equal(speculate(model, ids, Corrupted(text), 24), text)
        assert {plan.flush for r in records for _, plan in r.rewritten} == {16}
        records.clear()
    if order != "before":
        model.compile(backend="kvbuffer", options=FAST)
    assert torch.equal(speculate(model, ids, Corrupted(text), 24), text)
    flush = 5 if order == "before" else FAST["flush"]
    assert {(plan.flush, plan.capacity) for r in records for _, plan in r.rewritten} == {(flush, flush + 16)}
    disable_speculation(model)
    assert type(model)._compiled_call_impl is None and vars(model)["_compiled_call_impl"] is not None
    records.clear()
    cache = zoo.prefilled(reference, ids).cache
    with torch.no_grad():
        assert torch.equal(call(model, cache, text[:, 6:7], 6).argmax(-1), text[:, 7:8])
    assert {plan.variant for r in records for _, plan in r.rewritten} == {"buffered"}


def test_compiling_after_enabling_survives_disabling_at_once() -> None:
    model = zoo.make_model("mamba2")
    enable_speculation(model)
    model.compile(backend="kvbuffer", options=FAST)
    compiled = vars(model)["_compiled_call_impl"]
    disable_speculation(model)
    assert vars(model)["_compiled_call_impl"] is compiled


# ----------------------------------------------------------------------------------------------------- refusals


class Heard:
    """A streamer that counts."""

    def __init__(self) -> None:
        self.tokens = 0

    def put(self, tokens: Tensor) -> None:
        self.tokens += tokens.numel()

    def end(self) -> None:
        pass


REASONS = {
    "mamba": "2 of 2 states of MambaForCausalLM do not run buffered.*: it is overwritten",
    "jamba": "2 of 2 states of JambaForCausalLM do not run buffered.*: (it is overwritten|.*state)",
    "minimax": "MiniMaxForCausalLM keeps its states outside the cache layers",
    "rwkv": "RwkvForCausalLM keeps its states outside the cache layers",
    "recurrent_gemma": "RecurrentGemmaForCausalLM keeps its states outside the cache layers",
    "falcon_mamba": "2 of 2 states of FalconMambaForCausalLM do not run buffered.*: (it is overwritten|.*state)",
    "zamba": "3 of 3 states of ZambaForCausalLM do not run buffered.*: (it is overwritten|.*state)",
    "xlstm": "xLSTMForCausalLM keeps its states outside the cache layers",
}
SLOW = {"falcon_mamba", "zamba", "jamba"}


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("name", chosen(REASONS, REASONS.keys() - SLOW))
def test_states_that_cannot_be_taken_back_are_refused_before_the_first_token(name: str) -> None:
    model = zoo.make_model(name)
    enable_speculation(model)
    for length in (1, 8):
        heard, ids = Heard(), zoo.prompt(1, length)
        with pytest.raises(StateError, match=REASONS[name]):
            model.generate(ids, max_new_tokens=4, do_sample=False, prompt_lookup_num_tokens=2, streamer=heard)
        assert heard.tokens == length, "only the prompt"
    disable_speculation(model)
    assert model.generate(zoo.prompt(1, 3), max_new_tokens=2, do_sample=False).shape == (1, 5)
