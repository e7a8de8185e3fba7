"""Continuous batching by transformers' own engine: every request has the text it has alone, whoever comes and goes."""

from __future__ import annotations

import copy
import gc
import pickle
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching.requests import RequestState

from kvbuffer_compile.accounts.ledger import LEDGER
from kvbuffer_compile.backend import GraphRecord
from kvbuffer_compile.errors import StateError
from kvbuffer_compile.guard.aliases import plain
from kvbuffer_compile.guard.guarded import plain_calls
from kvbuffer_compile.integrations.transformers import (
    disable_continuous_batching,
    disable_speculation,
    enable_continuous_batching,
    enable_speculation,
    servable,
    serving,
    standins,
)
from kvbuffer_compile.integrations.transformers.paged import HybridCache
from tests.support.daily import chosen
from tests.zoo.build import bare_model
from tests.zoo.configs import VOCAB
from tests.zoo.weights import remember

if not transformers.__version__.startswith(tuple(f"{known}." for known in servable.KNOWN)):
    pytest.skip("the engine of this version of transformers is not known", allow_module_level=True)

FAST: dict[str, Any] = {"inner": "eager", "target": "aten", "flush": 4}
SERVED = ("qwen3_5", "bamba", "qwen3_next", "qwen3_5_moe", "olmo_hybrid", "falcon_h1", "granitemoehybrid", "nemotron_h")


def model_of(name: str, dtype: torch.dtype = torch.float32) -> Any:
    model = bare_model(name, torch.float32)
    remember(model, 0)
    return model.to(dtype)


def prompts_of(count: int, longest: int = 40, seed: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(1, VOCAB) for _ in range(draw.randint(1, longest))] for _ in range(count)]


def alone(model: Any, prompt: list[int], tokens: int) -> list[int]:
    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)
    return out[0, len(prompt) :].tolist()  # type: ignore[no-any-return]


def settings(tokens: int, **generation: Any) -> GenerationConfig:
    return GenerationConfig(**{"max_new_tokens": tokens, "do_sample": False, "eos_token_id": -1, **generation})


def engine(**changes: Any) -> ContinuousBatchingConfig:
    """Small pages and batches, so that prompts come in pieces."""
    return ContinuousBatchingConfig(
        **{"page_size": 16, "num_blocks": 60, "max_batch_tokens": 24, "max_memory_percent": 0.2, **changes}
    )


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[HybridCache]]:
    """Memory is known without psutil, and the states of requests that are gone are NaN. Gives the caches there were."""
    monkeypatch.setattr(serving, "get_device_and_memory_breakdown", lambda: (torch.device("cpu"), 8 << 30, 0, 0))
    monkeypatch.setattr(
        "transformers.generation.continuous_batching.cache.get_device_and_memory_breakdown",
        lambda: (torch.device("cpu"), 8 << 30, 0, 0),
    )
    free, seen = HybridCache.free_blocks, []

    def free_blocks(self: HybridCache, request_id: str, no_cache: bool = False) -> None:
        slot = self.pools.slots[request_id] if request_id in self.pools.slots else None
        free(self, request_id, no_cache)
        seen.append(self)
        if slot is not None:
            with plain_calls():
                for pool in self.pools.tensors:  # as memory is: what is owed to the slot is owed to the next request
                    plain(pool)[slot] = float("nan")

    monkeypatch.setattr(HybridCache, "free_blocks", free_blocks)
    yield seen


def buffered(records: list[GraphRecord]) -> bool:
    return (
        bool(records)
        and all(plan.variant != "recurrent" for r in records for _, plan in r.rewritten)
        and all(r.rewritten for r in records)
    )


@pytest.mark.parametrize("name", chosen(SERVED, {"qwen3_5"}))  # other tests here have bamba
def test_requests_have_the_text_they_have_alone(
    name: str, records: list[GraphRecord], poisoned: list[HybridCache]
) -> None:
    """More requests than slots, prompts longer than a batch, text of several flushes, two graphs for all layers."""
    model = model_of(name)
    prompts = prompts_of(7)
    want = [alone(model, prompt, 10) for prompt in prompts]
    enable_continuous_batching(model, slots=3, options=FAST)
    records.clear()
    out = model.generate_batch(prompts, generation_config=settings(10), continuous_batching_config=engine())
    assert [o.error for o in out.values()] == [None] * len(prompts)
    assert [o.generated_tokens for o in out.values()] == want
    assert buffered(records) and len(records) <= 2
    assert poisoned[-1].pools.slots.free == 3


def test_a_request_that_forks(records: list[GraphRecord]) -> None:
    """Several texts of one prompt go on from copies of its states."""
    model = model_of("qwen3_5")
    prompts = prompts_of(2)
    want = [alone(model, prompt, 8) for prompt in prompts for _ in range(3)]
    enable_continuous_batching(model, slots=6, options=FAST)
    several = settings(8, num_return_sequences=3, do_sample=True, top_k=1)  # greedy, as it may be asked for here
    out = model.generate_batch(prompts, generation_config=several, continuous_batching_config=engine())
    assert [o.generated_tokens for o in out.values()] == want
    assert buffered(records)


def test_the_model_is_as_before(records: list[GraphRecord]) -> None:
    """While it is served, beside it and after."""
    model = model_of("bamba")
    before = dict(vars(model))
    prompt = prompts_of(1)[0]
    want = alone(model, prompt, 8)
    enable_continuous_batching(model, slots=2, options=FAST)
    enable_continuous_batching(model)  # changes nothing
    assert alone(model, prompt, 8) == want
    copied = copy.deepcopy(model)
    assert alone(copied, prompt, 8) == want
    assert serving.INIT not in vars(copied)
    assert alone(pickle.loads(pickle.dumps(model)), prompt, 8) == want
    with model.continuous_batching_context_manager(
        generation_config=settings(8), continuous_batching_config=engine()
    ) as manager:
        manager.add_request(prompt, request_id="served", eos_token_id=-1)
        beside = alone(model, prompt, 8)
        with pytest.raises(StateError, match="stop the manager first"):
            disable_continuous_batching(model)
        assert _result(manager, "served") == want == beside
    disable_continuous_batching(model)
    disable_continuous_batching(model)
    assert vars(model).keys() == before.keys()
    left = {"forward", standins.MARK, standins.STATE}
    assert not any(left & vars(module).keys() for module in model.modules())
    with pytest.raises(ValueError, match="linear_attention"):
        model.init_continuous_batching(settings(8))


def _result(manager: Any, request: str) -> list[int]:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        out = manager.get_result(request_id=request, timeout=0.1)
        if out is not None and out.is_finished():
            return list(out.generated_tokens)
        time.sleep(0.01)  # results of other requests are put back and come again at once: let the engine have the GIL
    raise TimeoutError(request)


def test_one_request_after_another(records: list[GraphRecord], poisoned: list[HybridCache]) -> None:
    """The engine sizes itself for what it is asked for; forks of a prompt of one token begin anew; starting again."""
    model = model_of("bamba")
    prompts = prompts_of(1)
    want = alone(model, prompts[0], 6)
    enable_continuous_batching(model, slots=2, options=FAST)
    for _ in range(2):
        out = model.generate_batch(prompts, generation_config=settings(6), continuous_batching_config=engine())
        assert [o.generated_tokens for o in out.values()] == [want]
    several = settings(6, num_return_sequences=2, do_sample=True, top_k=1)
    out = model.generate_batch([[5], prompts[0]], generation_config=several, continuous_batching_config=engine())
    assert [o.generated_tokens for o in out.values()] == [*[alone(model, [5], 6)] * 2, *[want] * 2]
    manager = model.init_continuous_batching(settings(6), engine(num_blocks=None))
    for _ in range(2):
        manager.start()
        manager.add_request(prompts[0], request_id="served", eos_token_id=-1)
        assert _result(manager, "served") == want
        manager.stop(block=True)
        assert manager.batch_processor is None and not manager.model.layers
    assert len(records) <= 2 and buffered(records)


def test_beside_speculation() -> None:
    """Each is put on and taken off by itself, in any order."""
    model = model_of("bamba")
    prompt = prompts_of(1)[0]
    want = alone(model, prompt, 8)
    both = [disable_speculation, disable_continuous_batching]
    for first, last in (both, both[::-1]):
        enable_continuous_batching(model, slots=2, options=FAST)
        enable_speculation(model)
        assert alone(copy.deepcopy(model), prompt, 8) == want
        first(model)
        assert standins.MARK in vars(model)
        assert alone(pickle.loads(pickle.dumps(model)), prompt, 8) == want
        last(model)
        assert not {standins.MARK, standins.STATE, serving.INIT, "generate", "_is_stateful"} & vars(model).keys()
    assert alone(model, prompt, 8) == want


def test_a_model_whose_attention_is_switched(records: list[GraphRecord]) -> None:
    """Eager attention has pages of its own kind; the model has its own again, also after a refusal."""
    model = model_of("qwen3_5")
    model.set_attn_implementation("eager")
    prompt = prompts_of(1)[0]
    want = alone(model, prompt, 6)
    enable_continuous_batching(model, slots=2, options=FAST)
    with pytest.raises(MemoryError):
        model.init_continuous_batching(settings(6), engine(max_memory_percent=1e-9))
    assert alone(model, prompt, 6) == want
    out = model.generate_batch([prompt], generation_config=settings(6), continuous_batching_config=engine())
    assert [o.generated_tokens for o in out.values()] == [want]
    assert alone(model, prompt, 6) == want and model.config._attn_implementation == "eager"


# ------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("mamba2", "has no attention"),
        ("minimax", "keeps no states of linear layers"),
        ("kimi_linear", "the engine's pages hold"),
    ],
)
def test_models_that_cannot_be_served(name: str, reason: str) -> None:
    model = bare_model(name, torch.float32)
    before = set(vars(model))
    with pytest.raises(StateError, match=reason):
        enable_continuous_batching(model)
    assert set(vars(model)) == before


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"default_compile_level": 1}, "default_compile_level=1 is not allowed"),
    ({"cpu_offload_space": 1.0}, "states are not offloaded"),
    ({"use_cuda_graph": True}, "use_cuda_graph=True is not allowed"),
    ({"use_async_batching": True}, "must be None or False"),
]


@pytest.mark.parametrize(("changes", "reason"), REFUSED)
def test_settings_that_states_do_not_allow(changes: dict[str, Any], reason: str) -> None:
    model = model_of("qwen3_5")
    enable_continuous_batching(model, options=FAST)
    with pytest.raises(ValueError, match=reason):
        model.init_continuous_batching(settings(4), engine(**changes))


def test_arguments_and_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("qwen3_5")
    with pytest.raises(ValueError, match="slots=0 is not allowed"):
        enable_continuous_batching(model, slots=0)
    with pytest.raises(ValueError, match="unknown option 'flsh'"):
        enable_continuous_batching(model, options={"flsh": 4})
    monkeypatch.setattr(transformers, "__version__", "9.0.0")
    with pytest.raises(StateError, match=r"transformers 9\.0\.0 is not known"):
        enable_continuous_batching(model)


def test_more_states_than_memory() -> None:
    model = model_of("qwen3_5")
    enable_continuous_batching(model, slots=1 << 24, options=FAST)
    with pytest.raises(MemoryError, match="the states of a request take"):
        model.init_continuous_batching(settings(4), engine())


@pytest.mark.parametrize("name", chosen(["jamba", "zamba2"], {"jamba"}))
def test_models_whose_logits_would_be_others(name: str) -> None:
    """Jamba's layers forget the state when a prompt goes on; Zamba2's attention has no pages of its own number."""
    model = model_of(name)
    enable_continuous_batching(model, slots=3, options=FAST)
    with pytest.raises(StateError, match="it is not served"):
        model.init_continuous_batching(settings(4), engine())


# ------------------------------------------------------------------------------------------------- long runs


class Load:
    """Requests that come at random, some of which are cancelled."""

    def __init__(self, model: Any, count: int, tokens: int, cancel: float) -> None:
        self.draw = random.Random(1)
        self.prompts = prompts_of(count, longest=60, seed=1)
        self.tokens = [self.draw.randint(1, tokens) for _ in range(count)]
        self.want = [alone(model, p, n) for p, n in zip(self.prompts, self.tokens, strict=True)]
        self.cancelled = {n for n in range(count) if self.draw.random() < cancel}

    def run(self, manager: Any, wait: Callable[[], float]) -> dict[int, list[int]]:
        """The text of every request that was not cancelled."""
        for n, prompt in enumerate(self.prompts):
            manager.add_request(prompt, request_id=str(n), max_new_tokens=self.tokens[n], eos_token_id=-1)
            time.sleep(wait())
            if n in self.cancelled:
                manager.cancel_request(str(n))
        got: dict[int, list[int]] = {}
        end = time.monotonic() + 1200
        while len(got.keys() | self.cancelled) < len(self.prompts) and time.monotonic() < end:
            out = manager.get_result(timeout=1)
            if out is not None and out.is_finished():
                assert out.error is None
                got[int(out.request_id)] = list(out.generated_tokens)
        return got


@pytest.mark.nightly
def test_many_requests(
    records: list[GraphRecord], poisoned: list[HybridCache], monkeypatch: pytest.MonkeyPatch
) -> None:
    """200 requests, a tenth cancelled, so few pages that some are put off and computed anew, again and again."""
    put_off = []
    anew = RequestState.create_equivalent_initial_request
    monkeypatch.setattr(RequestState, "create_equivalent_initial_request", lambda self: put_off.append(1) or anew(self))
    model = model_of("qwen3_5", torch.float64)
    load = Load(model, 200, 24, 0.1)
    enable_continuous_batching(model, slots=6, options=FAST)
    records.clear()
    with model.continuous_batching_context_manager(
        generation_config=settings(24), continuous_batching_config=engine(num_blocks=14)
    ) as manager:
        got = load.run(manager, lambda: load.draw.choice([0, 0, 0.02, 0.1]))
        missing = [n for n in range(200) if n not in got and n not in load.cancelled]
        assert not missing
        assert all(got[n] == load.want[n] for n in got)
        assert put_off, "no request was put off"
        assert buffered(records) and len(records) <= 2
        assert poisoned[-1].pools.slots.free == 6
        accounts = len(LEDGER.accounts)
        again = load.run(manager, lambda: 0.0)
        assert again.keys() | load.cancelled == set(range(200))
        assert all(again[n] == load.want[n] for n in again)
        gc.collect()
        assert len(LEDGER.accounts) == accounts and len(records) <= 2


def test_pools_of_all_dtypes() -> None:
    """States in float32 under a model in bfloat16 stay so."""
    model = model_of("qwen3_5", torch.bfloat16)
    shape = serving.shape_of_cache(model)
    assert {dtype for state in shape.states.values() for _, dtype in state.recurrent} == {torch.float32}
    assert {dtype for state in shape.states.values() for _, dtype in state.convolutions} == {torch.bfloat16}
    assert set(shape.attention.values()) == {"full_attention"}
