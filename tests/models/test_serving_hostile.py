"""Continuous batching and whatever requests and callers do to it: others have their own text, and no slot is lost."""

from __future__ import annotations

from typing import Any

import pytest

from kvbuffer_compile.integrations.transformers import (
    disable_continuous_batching,
    enable_continuous_batching,
    serving,
)
from kvbuffer_compile.integrations.transformers.packed import PackedLayer
from tests.models.test_serving import FAST, _result, alone, engine, model_of, poisoned, prompts_of, settings

__all__ = ["poisoned"]  # a fixture of this module too
pytestmark = pytest.mark.nightly


@pytest.fixture(scope="module")
def model() -> Any:
    return model_of("qwen3_5")


def test_odd_requests_among_others(model: Any, poisoned: list[Any]) -> None:
    """One token, nothing, and one of many batches that is cancelled in the middle of its prompt."""
    prompts = prompts_of(4, longest=12)
    want = [alone(model, p, 8) for p in prompts]
    long = prompts_of(1, longest=1)[0] * 150
    enable_continuous_batching(model, slots=3, options=FAST)
    with model.continuous_batching_context_manager(
        generation_config=settings(8), continuous_batching_config=engine(num_blocks=14)
    ) as manager:
        manager.add_request(long, request_id="chunked", max_new_tokens=8, eos_token_id=-1)
        manager.add_request(prompts[0], request_id="a", eos_token_id=-1)
        manager.add_request(prompts[1], request_id="one", max_new_tokens=1, eos_token_id=-1)
        manager.cancel_request("chunked")
        with pytest.raises(ValueError, match="longer than all pages, which hold 2[0-9][0-9] tokens"):
            manager.add_request(long + long, request_id="too long", eos_token_id=-1)
        with pytest.raises(ValueError, match="1 tokens and 5000 new ones"):
            manager.add_request([1], "too long", 5000)
        try:
            manager.add_request([], request_id="empty", eos_token_id=-1)
        except ValueError:
            pass  # the engine's own error, or an answer with none
        manager.add_request(prompts[2], request_id="b", eos_token_id=-1)
        manager.add_request(prompts[3], request_id="c", eos_token_id=-1)
        assert _result(manager, "a") == want[0]
        assert _result(manager, "one") == want[1][:1]
        assert _result(manager, "b") == want[2]
        assert _result(manager, "c") == want[3]
        manager.add_request(prompts[0], request_id="again", eos_token_id=-1)
        assert _result(manager, "again") == want[0]
    disable_continuous_batching(model)


def test_an_end_of_text(model: Any) -> None:
    prompts = prompts_of(3)
    want = [alone(model, p, 12) for p in prompts]
    enable_continuous_batching(model, slots=3, options=FAST)
    with model.continuous_batching_context_manager(
        generation_config=settings(12), continuous_batching_config=engine()
    ) as manager:
        for n, prompt in enumerate(prompts):
            manager.add_request(prompt, request_id=str(n), eos_token_id=want[n][4])
        for n, text in enumerate(want):
            assert _result(manager, str(n)) == text[: text.index(text[4]) + 1]
    disable_continuous_batching(model)


def test_sampling(model: Any) -> None:
    """Sampled requests end, with tokens there are, and a greedy run after them is as before."""
    prompts = prompts_of(5)
    want = [alone(model, p, 6) for p in prompts]
    enable_continuous_batching(model, slots=3, options=FAST)
    sampled = settings(6, do_sample=True, temperature=0.8, top_p=0.9, top_k=20)
    out = model.generate_batch(prompts, generation_config=sampled, continuous_batching_config=engine())
    assert [len(o.generated_tokens) for o in out.values()] == [6] * 5
    out = model.generate_batch(prompts, generation_config=settings(6), continuous_batching_config=engine())
    assert [o.generated_tokens for o in out.values()] == want
    disable_continuous_batching(model)


def test_on_and_off(model: Any) -> None:
    """Two managers after each other, on and off twice, and a model that was left in training mode."""
    prompts = prompts_of(2)
    want = [alone(model, p, 6) for p in prompts]
    for _ in range(2):
        model.train()
        enable_continuous_batching(model, slots=2, options=FAST)
        for _ in range(2):
            manager = model.init_continuous_batching(settings(6), engine())
            manager.start()
            manager.add_request(prompts[0], request_id="served", eos_token_id=-1)
            assert _result(manager, "served") == want[0]
            manager.stop(block=True)
        disable_continuous_batching(model)
        model.eval()
        assert alone(model, prompts[1], 6) == want[1]


def test_a_step_that_fails(model: Any, poisoned: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine answers what it had with the error. The next engine serves the same model."""
    prompts = prompts_of(3)
    want = [alone(model, p, 8) for p in prompts]
    enable_continuous_batching(model, slots=3, options=FAST)
    decode, calls = PackedLayer._decode, []

    def failing(self: PackedLayer, batch: Any, hidden: Any) -> Any:
        out = decode(self, batch, hidden)
        calls.append(len(batch.slots))
        if len(calls) == 12:  # in the middle of a batch, after this layer has stepped
            raise RuntimeError("a layer failed")
        return out

    monkeypatch.setattr(PackedLayer, "_decode", failing)
    out = model.generate_batch(prompts, generation_config=settings(8), continuous_batching_config=engine())
    assert len(calls) == 12 and any("a layer failed" in (o.error or "") for o in out.values())
    monkeypatch.undo()
    monkeypatch.setattr(serving, "get_device_and_memory_breakdown", lambda: ("cpu", 8 << 30, 0, 0))
    out = model.generate_batch(prompts, generation_config=settings(8), continuous_batching_config=engine())
    assert [o.generated_tokens for o in out.values()] == want
    disable_continuous_batching(model)
