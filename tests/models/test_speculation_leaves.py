"""What speculation leaves behind: a model like any other, ordinary copies, nothing in memory, the next model alone."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch._dynamo.pgo import CodeId
from torch._subclasses import FakeTensor

from kvbuffer_compile.accounts.ledger import LEDGER
from kvbuffer_compile.backend import GraphRecord, observers
from kvbuffer_compile.errors import StateError
from kvbuffer_compile.integrations.transformers import disable_speculation, enable_speculation, speculation_of
from kvbuffer_compile.integrations.transformers.recorded import _apart
from kvbuffer_compile.runtime import by_hand
from tests import zoo
from tests.support.daily import chosen
from tests.zoo.configs import BASE, BUFFERED
from tests.zoo.weights import remember

FAST: dict[str, Any] = {"inner": "eager", "target": "aten", "flush": 8}
NAMES = ("qwen3_next", "kimi_linear", "bamba")


def one_layer(heads: int = 4) -> Any:
    config = transformers.Mamba2Config(
        **BASE, **{**BUFFERED["mamba2"], "num_heads": heads, "head_dim": 64 // heads, "num_hidden_layers": 1}
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.Mamba2ForCausalLM._from_config(config).eval()
        remember(model, 0)
    return model


def repeating(length: int) -> Tensor:
    """A prompt in which prompt lookup finds drafts."""
    return torch.arange(1, 10).repeat(1, length // 9 + 1)[:, :length]


def lookup(model: Any, ids: Tensor, tokens: int = 8) -> Tensor:
    """The text by prompt lookup, checked against that of plain decoding."""
    got = zoo.greedy(model, ids, tokens, prompt_lookup_num_tokens=4)
    assert torch.equal(got, zoo.greedy(model, ids, tokens))
    return got


# ----------------------------------------------------------------------------------------------- the next model


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Of each graph the sizes of its states, numbers or symbols."""
    seen: list[str] = []

    def note(record: GraphRecord) -> None:  # while the graph has its fake tensors
        seen.append(str([tuple(found.state.meta["val"].shape) for found, _ in record.rewritten]))

    monkeypatch.setattr(observers, "listeners", [note])
    return seen


@pytest.mark.usefixtures("uncompiled")
def test_the_next_model_has_the_graphs_that_it_has_alone(sizes: list[str]) -> None:
    """Graphs of other models neither count against its own, nor teach torch.compile that its sizes change."""
    model, ids = one_layer(), repeating(30)
    enable_speculation(model)
    lookup(model, ids)
    alone = list(sizes)
    assert alone and "[]" not in alone
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=len(alone)):
        for heads in (8, 4):
            model = one_layer(heads)
            enable_speculation(model)
            sizes.clear()
            lookup(model, ids)
    assert sizes == alone


def test_torch_compile_remembers_sizes_by_model() -> None:
    """Sizes that change between models, of attention heads for one, would else be symbols in the graphs."""
    known = [CodeId.make(_apart(one_layer()).__code__) for _ in range(2)]
    assert known[0] != known[1]


@pytest.mark.nightly
def test_models_one_after_another() -> None:
    for name in NAMES:
        model = zoo.make_model(name)
        enable_speculation(model)
        lookup(model, repeating(27), 12)


@pytest.mark.usefixtures("uncompiled")
def test_too_many_graphs_are_the_reason_that_is_given() -> None:
    model = one_layer()
    enable_speculation(model)
    with torch._dynamo.config.patch(recompile_limit=1), pytest.raises(StateError, match=r"config\.recompile_limit"):
        lookup(model, repeating(30))


# -------------------------------------------------------------------------------------------------------- copies


def pickled(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


def saved(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def within(model: Any) -> Any:
    return copy.deepcopy(torch.nn.Sequential(model))[0]


COPIES: dict[str, Callable[[Any], Any]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "within": within,
    "pickle": pickled,
    "save": saved,
}


@pytest.mark.usefixtures("uncompiled")
def test_copies_are_ordinary_models(tmp_path: Path) -> None:
    """And the model that was copied goes on; a copy of a copy can speculate in its turn."""
    plain, model, ids = one_layer(), one_layer(), repeating(20)
    model.compile(backend="kvbuffer", options=FAST)
    enable_speculation(model)
    for moment in ("before the first call", "after it"):
        for how, made in COPIES.items():
            found = made(model)
            assert vars(found).keys() == vars(plain).keys(), f"{how} {moment}"
            assert speculation_of(found) is None and found._is_stateful
            assert torch.equal(zoo.greedy(found, ids, 8), zoo.greedy(plain, ids, 8))
        text = lookup(model, ids)
    with pytest.raises(ValueError, match="stateful"):
        zoo.greedy(found, ids, 4, prompt_lookup_num_tokens=4)
    enable_speculation(found)
    assert torch.equal(lookup(found, ids), text)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    for name, value in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], value) and torch.equal(loaded.state_dict()[name], value)


def test_what_the_instance_had_itself_is_copied() -> None:
    model = one_layer()
    model.generate = "its own"
    enable_speculation(model)
    assert copy.deepcopy(model).generate == "its own"
    disable_speculation(model)
    assert model.generate == "its own"


def test_nothing_in_the_model_leads_to_graphs() -> None:
    model = one_layer()
    enable_speculation(model)
    lookup(model, repeating(20))
    assert speculation_of(model).forward.steps is not None
    found = list(by_hand.tensors_in(model))
    assert found and not any(isinstance(x, FakeTensor) for x in found)
    assert speculation_of(model) not in [getattr(x, "__self__", x) for x in vars(model).values()]


@pytest.mark.usefixtures("uncompiled")
def test_a_model_that_moves_speculates_as_before(records: list[GraphRecord]) -> None:
    """Whatever was remembered about it in another dtype is forgotten."""
    model, ids = one_layer(), repeating(20)
    enable_speculation(model)
    lookup(model, ids)
    made = len(records)
    lookup(model.double(), ids)
    assert len(records) == 2 * made
    lookup(model, ids)
    assert len(records) == 2 * made


# ------------------------------------------------------------------------------------------------ plain decoding


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 2},
    "without cache": {"use_cache": False},
    "embeddings": {},
}


@pytest.mark.parametrize("name", chosen(["mamba2", "qwen3_next"], {"mamba2"}))
def test_plain_decoding_is_what_it_was(name: str) -> None:
    model, ids = zoo.make_model(name), zoo.prompt(2, 7)
    for way, extra in WAYS.items():
        given = (
            {"inputs_embeds": model.get_input_embeddings()(ids).detach()} if way == "embeddings" else {"inputs": ids}
        )
        call = dict(do_sample=False, max_new_tokens=5, return_dict_in_generate=True, **given, **extra)
        wanted = model.generate(**call)
        enable_speculation(model)
        got = model.generate(**call)
        disable_speculation(model)
        assert got.keys() == wanted.keys() and torch.equal(got.sequences, wanted.sequences), way


# -------------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("how", chosen(["compiled", "as it is", "disabled"], {"compiled"}))
def test_a_model_that_is_dropped_is_freed(how: str) -> None:
    model = one_layer()
    if how == "compiled":
        model.compile(backend="kvbuffer", options=FAST)
    enable_speculation(model)
    lookup(model, repeating(20))
    weight = weakref.ref(model.lm_head.weight)
    watched = [weakref.ref(model), weakref.ref(speculation_of(model)), weight]
    if how == "disabled":
        disable_speculation(model)
    del model
    gc.collect()
    assert [ref() for ref in watched] == [None] * len(watched)
    assert not LEDGER.accounts


@pytest.mark.parametrize("calls", chosen([12, 200], {"12"}))
def test_many_calls_of_many_lengths_leave_nothing(
    calls: int, records: list[GraphRecord], request: pytest.FixtureRequest
) -> None:
    """Graphs and tensors are those of the first calls: a prompt of one token, short ones, long ones; at night with
    Inductor."""
    if calls < 100:
        request.getfixturevalue("uncompiled")
    model = one_layer()
    enable_speculation(model)
    lengths = [1, 9, 70] + [int(n) for n in torch.randint(1, 90, (calls - 3,))]
    for count, length in enumerate(lengths):
        lookup(model, repeating(length), 5)
        if count == 2:
            made, tensors = len(records), alive()
    assert len(records) == made and alive() <= tensors
    assert not LEDGER.accounts and not LEDGER.allocations


def alive() -> int:
    """How many tensors there are."""
    gc.collect()
    return sum(issubclass(type(x), Tensor) for x in gc.get_objects())
