"""Continuous batching over many requests and in bfloat16: memory stays what it was, logits are those of the model."""

from __future__ import annotations

import copy
import gc
import os
from typing import Any

import pytest
import torch
from torch import Tensor

from kvbuffer_compile.accounts.ledger import LEDGER
from kvbuffer_compile.integrations.transformers import enable_continuous_batching, serving
from tests.models.test_serving import FAST, engine, model_of, poisoned, prompts_of, settings
from tests.support.oracle import Oracle

__all__ = ["poisoned"]  # a fixture of this module too


class Logits:
    """What the engine's model says of the next token, by request and position."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, swap: bool = False) -> None:
        self.seen: dict[tuple[str, int], Tensor] = {}
        self.batches = 0
        pieces, call = serving._pieces, serving.Face.__call__

        def noted(requests: Any, pools: Any) -> Any:
            self.rows = [(r.state.request_id, r.state.position_offset) for r in requests if r.has_new_token]
            found = list(pieces(requests, pools))
            if swap and len(found) > 1 and all(p.started for p in found[:2]):  # a fault: somebody else's state, once
                self.batches += 1
                if self.batches == 6:
                    slots = found[1].slot, found[0].slot
                    found[:2] = [serving.Piece(s, p.begin, p.end, True) for s, p in zip(slots, found, strict=False)]
            return found

        def called(face: Any, **kwargs: Any) -> Any:
            out = call(face, **kwargs)
            if "logits_to_keep" in kwargs:  # not in the trial
                self.seen.update(zip(self.rows, out.logits[0].clone(), strict=False))
            return out

        monkeypatch.setattr(serving, "_pieces", noted)
        monkeypatch.setattr(serving.Face, "__call__", called)


@torch.no_grad()
def stepped(model: Any, prompt: list[int], text: list[int]) -> list[Tensor]:
    """The logits behind a prompt and each token of a text but the last, token by token."""
    out = model(torch.tensor([prompt]), use_cache=True)
    logits = [out.logits[0, -1]]
    for n, token in enumerate(text[:-1], len(prompt)):
        place = torch.tensor([[n]])  # Bamba would ask the cache of its first layer, which counts no tokens
        out = model(torch.tensor([[token]]), position_ids=place, past_key_values=out.past_key_values, use_cache=True)
        logits.append(out.logits[0, -1])
    return logits


def judged(name: str, logits: Logits) -> None:
    """Serve requests and hold every logit they came from to the oracle."""
    model = model_of(name, torch.bfloat16)
    alone, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    enable_continuous_batching(model, slots=4, options=FAST)
    prompts = prompts_of(6)
    out = model.generate_batch(prompts, generation_config=settings(12), continuous_batching_config=engine())
    with Oracle() as oracle:
        for request, answer in out.items():
            text = list(answer.generated_tokens)
            assert answer.error is None and len(text) == 12
            sides = zip(*(stepped(m, answer.prompt_ids, text) for m in (alone, exact)), strict=True)
            for n, (eager, true) in enumerate(sides):
                got = logits.seen[request, len(answer.prompt_ids) + n]
                assert int(got.argmax()) == text[n]
                oracle.add(got, eager, true, "logits")


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["qwen3_5", "bamba"])
def test_bfloat16(name: str, monkeypatch: pytest.MonkeyPatch, records: list[Any]) -> None:
    """Batches round in another order, so text may differ from that of `generate`: every logit is held to the oracle."""
    judged(name, Logits(monkeypatch))
    assert any(plan.variant == "buffered" for record in records for _, plan in record.rewritten)


@pytest.mark.nightly
def test_the_oracle_sees_one_wrong_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = Logits(monkeypatch, swap=True)
    with pytest.raises(AssertionError, match="logits: "):
        judged("qwen3_5", logits)
    assert logits.batches >= 6


# ---------------------------------------------------------------------------------------------------- memory


def resident() -> int:
    """Bytes of memory that this process has."""
    with open("/proc/self/statm", encoding="ascii") as numbers:
        return int(numbers.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def held() -> dict[str, int]:
    """What there is in this process."""
    gc.collect()
    objects = gc.get_objects()
    return {
        "accounts": len(LEDGER.accounts),
        "allocations": len(LEDGER.allocations),
        "tensors": sum(isinstance(x, Tensor) for x in objects),
        "objects": len(objects),
        "bytes": resident(),
    }


@pytest.mark.nightly
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs Linux")
def test_memory_after_many_requests(poisoned: list[Any], records: list[Any]) -> None:
    """1,000 requests of a few tokens through one engine; some are cancelled. What is there behind them is what was
    there behind the first 200."""
    model = model_of("qwen3_5")
    enable_continuous_batching(model, slots=8, options=FAST)
    prompts = prompts_of(1000, longest=8)
    seen: dict[int, dict[str, int]] = {}
    tokens = 0
    with model.continuous_batching_context_manager(
        generation_config=settings(6), continuous_batching_config=engine()
    ) as manager:
        for begin in range(0, 1000, 50):
            wanted = set()
            for n in range(begin, begin + 50):
                manager.add_request(prompts[n], request_id=str(n), eos_token_id=-1)
                if n % 10 == 9:
                    manager.cancel_request(str(n))
                else:
                    wanted.add(str(n))
            while wanted:
                out = manager.get_result(timeout=60)
                assert out is not None and out.error is None
                if out.is_finished():
                    wanted.discard(out.request_id)
                    tokens += len(out.prompt_ids) + len(out.generated_tokens)
            del out
            slots = poisoned[-1].pools.slots
            for _ in range(1000):
                if slots.free == slots.count:
                    break
                manager.get_result(timeout=0.01)
            assert slots.free == slots.count == 8
            seen[begin + 50] = held()
    first, last = seen[200], seen[1000]
    assert tokens > 6000
    assert last["accounts"] == first["accounts"] > 0 and last["allocations"] == first["allocations"]
    assert last["tensors"] <= first["tensors"]
    assert last["objects"] <= first["objects"] + 800, seen  # less than one for each of the 800 requests between them
    assert last["bytes"] <= first["bytes"] + (8 << 20), seen
    assert records and all(record.rewritten for record in records)
    print(first, last, tokens)
