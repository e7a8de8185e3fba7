"""Speculative decoding of transformers models with recurrent states: the text of plain decoding with any drafts."""

from __future__ import annotations

import inspect
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.generation import utils
from transformers.generation.candidate_generator import CandidateGenerator

from kvbuffer_compile.backend import GraphRecord
from kvbuffer_compile.integrations.transformers import disable_speculation, enable_speculation
from kvbuffer_compile.runtime import by_hand
from tests import zoo
from tests.models.test_models import in_float64
from tests.support.daily import chosen, row
from tests.support.oracle import check

# Assisted decoding as it was in transformers 5.17: it keeps tokens that were drafted behind an end of text.
OLDER = "is_done_candidate" in inspect.signature(utils._speculative_sampling).parameters
FLUSH = 8
CAPACITY = FLUSH + 16
FAST: dict[str, Any] = {"inner": "eager", "target": "aten", "flush": FLUSH}
FIRST = ("qwen3_next", "mamba2", "falcon_h1")
MORE = ("qwen3_5", "qwen3_5_moe", "olmo_hybrid", "kimi_linear", "bamba", "granitemoehybrid")


class Corrupted(CandidateGenerator):
    """Drafts of 0 to `most` tokens of a known text, each token wrong with some probability.

    rounds: of each round how many tokens were drafted and how many accepted.
    """

    def __init__(self, text: Tensor, wrong: float = 0.25, most: int = 8, least: int = 0) -> None:
        self.text = text
        self.wrong, self.most, self.least = wrong, most, least
        self.generator = torch.Generator().manual_seed(0)
        self.rounds: list[tuple[int, int]] = []
        self.drafted = 0

    def get_candidates(self, input_ids: Tensor, **_: Any) -> tuple[Tensor, None]:
        count = int(torch.randint(self.least, self.most + 1, (), generator=self.generator))
        right = self.text[:, input_ids.shape[1] :][:, :count]
        wrong = torch.rand(right.shape, generator=self.generator) < self.wrong
        draft = torch.where(wrong, (right + 1) % (zoo.VOCAB - 1), right)
        self.drafted = draft.shape[1]
        return torch.cat([input_ids, draft], 1), None

    def update_candidate_strategy(self, input_ids: Tensor, scores: Tensor, num_matches: int) -> None:
        self.rounds.append((self.drafted, int(num_matches)))

    @property
    def rejections(self) -> int:
        return sum(accepted < drafted for drafted, accepted in self.rounds)


def plain_text(model: Any, ids: Tensor, tokens: int) -> Tensor:
    return torch.cat([ids, zoo.greedy(model, ids, tokens)], 1)


def speculate(model: Any, ids: Tensor, drafts: CandidateGenerator, tokens: int, **extra: Any) -> Tensor:
    """Prompt and text by speculative decoding with drafts of one's own."""
    with mock.patch.object(type(model), "_get_candidate_generator", lambda *_, **__: drafts):
        return torch.cat([ids, zoo.greedy(model, ids, tokens, prompt_lookup_num_tokens=2, **extra)], 1)


@pytest.fixture
def taken_back(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each rollback took back."""
    counts: list[int] = []
    rollback = by_hand.rollback

    def counting(obj: Any, n: int) -> None:
        counts.append(n)
        rollback(obj, n)

    monkeypatch.setattr(by_hand, "rollback", counting)
    return counts


def variants(records: list[GraphRecord]) -> list[set[str]]:
    return [{plan.variant for _, plan in r.rewritten} for r in records]


def compiled_model(name: str) -> Any:
    model = zoo.make_model(name)
    model.compile(backend="kvbuffer", options=FAST)
    return model


def cases() -> list[Any]:
    """All models nightly, one always: other tests here and those of `test_speculation_starts` have others."""
    short = [row((n, 96, 15), n == "mamba2") for n in FIRST] + [row((n, 64, 8), False) for n in MORE]
    return short + [row((n, 520, 100), False) for n in FIRST + MORE]


@pytest.mark.parametrize(("name", "tokens", "rejections"), cases())
def test_the_text_is_that_of_plain_decoding(
    name: str, tokens: int, rejections: int, records: list[GraphRecord], taken_back: list[int]
) -> None:
    ids = zoo.prompt(1, 8)
    text = plain_text(zoo.make_model(name), ids, tokens)
    model, drafts = compiled_model(name), Corrupted(text)
    enable_speculation(model)
    assert torch.equal(speculate(model, ids, drafts, tokens), text)
    assert drafts.rejections > rejections and len(set(drafts.rounds)) > 10
    assert len(taken_back) >= zoo.ARCHS[name].states * drafts.rejections
    # attention over no past is another graph, and Mamba-2 is handed one argument more with the prompt
    assert sorted(map(sorted, variants(records))) == [["buffered"], ["verify"], ["verify"]], "no other graph"
    assert all(len(r.rewritten) == zoo.ARCHS[name].states for r in records)


def test_what_is_no_model_of_the_library_is_refused() -> None:
    with pytest.raises(ValueError, match="model is a Linear, no PreTrainedModel$"):
        enable_speculation(torch.nn.Linear(2, 2))
    wrapped = torch.compile(zoo.make_model("qwen3_5"), backend="kvbuffer")
    with pytest.raises(ValueError, match=r"compile it in place, by model.compile\(backend='kvbuffer'\)"):
        enable_speculation(wrapped)


def test_disabling_restores_the_model() -> None:
    model = zoo.make_model("qwen3_next")
    before = dict(vars(model))
    enable_speculation(model)
    enable_speculation(model)
    assert vars(model) != before
    disable_speculation(model)
    assert vars(model) == before
    disable_speculation(model)
    with pytest.raises(ValueError, match="stateful"):
        zoo.greedy(model, zoo.prompt(1, 8), 4, prompt_lookup_num_tokens=2)


def test_the_cache_given_back_continues_like_any_other() -> None:
    """Its states are those of the text, it records no more, and its layers have their own classes again."""
    model, reference = compiled_model("qwen3_5"), zoo.make_model("qwen3_5")
    ids = zoo.prompt(1, 6)
    text = plain_text(reference, ids, 40)
    enable_speculation(model)
    cache = DynamicCache(config=model.config)
    assert torch.equal(speculate(model, ids, Corrupted(text), 20, past_key_values=cache), text[:, :26])
    assert not any(getattr(layer, "record_past", False) for layer in cache.layers)
    assert {type(layer).__module__ for layer in cache.layers} == {"transformers.cache_utils"}
    out = model.generate(text[:, :26], past_key_values=cache, max_new_tokens=20, do_sample=False, eos_token_id=None)
    assert torch.equal(out, text)


# ------------------------------------------------------------------------------------------------- assistants


def assistant_for(name: str) -> Any:
    """A model that is right now and then: the target with some noise; or a Llama, which is not."""
    if name == "llama":
        sizes = dict(vocab_size=zoo.VOCAB, hidden_size=32, intermediate_size=32, num_hidden_layers=1)
        ids = dict(pad_token_id=None, bos_token_id=None, eos_token_id=None)
        return LlamaForCausalLM(LlamaConfig(num_attention_heads=4, **sizes, **ids)).eval()
    assistant = zoo.make_model(name)
    with torch.no_grad():
        for p in assistant.parameters():
            p.add_(torch.randn_like(p) * p.std().nan_to_num() * 0.03)
    return assistant


@pytest.mark.parametrize("schedule", chosen(["constant", "heuristic"], {"constant"}))
@pytest.mark.parametrize(
    ("name", "drafter"),
    [
        ("mamba2", "mamba2"),
        row(("mamba2", "llama"), False),
        row(("qwen3_next", "llama"), False),
        row(("qwen3_next", "qwen3_next"), False),
        row(("bamba", "mamba2"), False),
        row(("mamba2", "qwen3_next"), False),
    ],
)
def test_assistants(name: str, drafter: str, schedule: str, taken_back: list[int]) -> None:
    """The assistant may have states of its own, of which it takes back what the target did not accept."""
    model, assistant = zoo.make_model(name), assistant_for(drafter)
    if drafter == name == "mamba2":
        model.compile(backend="kvbuffer", options=FAST)
        assistant.compile(backend="kvbuffer", options=FAST)
    assistant.generation_config.num_assistant_tokens = 5
    assistant.generation_config.num_assistant_tokens_schedule = schedule
    before = dict(vars(assistant))
    reference = zoo.make_model(name)
    enable_speculation(model)
    for length in (1, 8):
        ids = zoo.prompt(1, length)
        text = plain_text(reference, ids, 64)
        got = torch.cat([ids, zoo.greedy(model, ids, 64, assistant_model=assistant)], 1)
        assert torch.equal(got, text)
    assert taken_back and vars(assistant) == before


# --------------------------------------------------------------------------------------------------- sampling


class Watched(Corrupted):
    """Keeps what the target said about every token that stayed."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.scores: list[Tensor] = []

    def update_candidate_strategy(self, input_ids: Tensor, scores: Tensor, num_matches: int) -> None:
        super().update_candidate_strategy(input_ids, scores, num_matches)
        self.scores.append(scores[:, : num_matches + 1])


def test_sampling_draws_from_the_plain_distribution() -> None:
    """The scores behind every sampled token are those of the model on the text before it, read in one go."""
    model, reference, exact = compiled_model("mamba2"), zoo.make_model("mamba2"), in_float64(zoo.make_model("mamba2"))
    enable_speculation(model)
    ids = zoo.prompt(1, 6)
    drafts = Watched(plain_text(reference, ids, 80), least=1)
    text = speculate(model, ids, drafts, 64, do_sample=True, top_k=0, temperature=1.0)
    assert drafts.rejections > 10 and not torch.equal(text, drafts.text[:, : text.shape[1]])
    with torch.no_grad():
        eager, right = (m(text[:, :-1]).logits[:, ids.shape[1] - 1 :] for m in (reference, exact))
    check(torch.cat(drafts.scores, 1), eager, right, "scores")


def test_acceptance_keeps_the_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over five tokens: draft from q, accept as the library does, and what comes out is p exactly."""
    g = torch.Generator().manual_seed(0)
    p, q = torch.randn(2, 5, generator=g).softmax(-1)
    total = torch.zeros(5)
    older = {"is_done_candidate": False} if OLDER else {}
    for token in range(5):
        accept = min(1.0, float(p[token] / q[token]))
        for threshold, weight in ((accept / 2, accept), ((1 + accept) / 2, 1 - accept)):
            if weight == 0:
                continue
            drawn: list[Tensor] = []

            def draw(weights: Tensor, num_samples: int, into: list[Tensor] = drawn) -> Tensor:
                into.append(weights)
                return weights.argmax(-1, keepdim=True)

            monkeypatch.setattr(torch, "rand_like", lambda x, value=threshold: torch.full_like(x, value))
            monkeypatch.setattr(torch, "multinomial", draw)
            ids = torch.tensor([[0, token]])
            scores = torch.stack([p.log(), p.log()])[None]
            _, matches = utils._speculative_sampling(ids, q.log()[None, None], 1, scores, **older)
            total += q[token] * weight * (torch.eye(5)[token] if matches else drawn[0].flatten())
    torch.testing.assert_close(total, p)
