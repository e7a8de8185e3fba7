"""Speculative decoding of transformers models with recurrent states: the text of plain decoding with any drafts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.generation.candidate_generator import CandidateGenerator

from kvbuffer_compile import runtime
from kvbuffer_compile.backend import GraphRecord
from kvbuffer_compile.errors import StateError
from kvbuffer_compile.integrations.transformers import disable_speculation, enable_speculation, speculation_of
from tests import zoo

NIGHTLY = pytest.mark.nightly
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
    speculation = speculation_of(model)
    library = speculation.before["_get_candidate_generator"]
    speculation.before["_get_candidate_generator"] = lambda *_, **__: drafts
    try:
        return torch.cat([ids, zoo.greedy(model, ids, tokens, prompt_lookup_num_tokens=2, **extra)], 1)
    finally:
        speculation.before["_get_candidate_generator"] = library


@pytest.fixture
def taken_back(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each rollback took back."""
    counts: list[int] = []
    rollback = runtime.rollback

    def counting(obj: Any, n: int) -> None:
        counts.append(n)
        rollback(obj, n)

    monkeypatch.setattr(runtime, "rollback", counting)
    return counts


def variants(records: list[GraphRecord]) -> list[set[str]]:
    return [{plan.variant for _, plan in r.rewritten} for r in records]


def compiled_model(name: str) -> Any:
    model = zoo.make_model(name)
    model.compile(backend="kvbuffer", options=FAST)
    return model


def cases() -> list[Any]:
    short = [pytest.param(n, 96, 15) for n in FIRST]
    more = [pytest.param(n, 64, 8, marks=NIGHTLY) for n in MORE]
    return short + more + [pytest.param(n, 520, 100, marks=NIGHTLY) for n in FIRST + MORE]


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
    assert sorted(map(sorted, variants(records))) == [["buffered"], ["verify"]], "one graph for each, and no other"
    assert all(len(r.rewritten) == zoo.ARCHS[name].states for r in records)


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


def test_a_state_that_cannot_be_rolled_back_is_refused_with_the_reason() -> None:
    model = zoo.make_model("mamba")
    enable_speculation(model)
    for length in (1, 8):
        with pytest.raises(StateError, match="2 of 2 states of MambaForCausalLM do not run buffered.*:.*state"):
            zoo.greedy(model, zoo.prompt(1, length), 4, prompt_lookup_num_tokens=2)
