"""Serving a hybrid model on a CPU: the engine of transformers with states in slots, against what there is without it.

    python -m benchmarks.serving [--out FILE.json] [--requests 1 8 32] [--tokens 48]

Requests of 8 to 40 tokens ask for `--tokens` more, all at once, of a Qwen3.5-style model (three layers of Gated
DeltaNet with 8 heads of 128 x 128 and one of attention, hidden size 512, float32, random weights that remember). Sides,
in turn, each run once before it is timed:

alone     `generate` for one request after the other, the model as it is
static    `generate` for requests of one length together: batches as they can be made without an engine
engine    `generate_batch` after `enable_continuous_batching`, flush="auto"

The library refuses to serve such a model without it. Texts must be equal. Also told: bytes of state a request, and what
its rows add.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, Qwen3_5ForCausalLM, Qwen3_5TextConfig

from benchmarks.run import command, machine
from examples.batch_model import remembering
from kvbuffer_compile.accounts.ledger import LEDGER
from kvbuffer_compile.backend import observers
from kvbuffer_compile.integrations.transformers import disable_continuous_batching, enable_continuous_batching

VOCABULARY = 2048
Texts = list[list[int]]


def build() -> Any:
    torch.manual_seed(0)
    config = Qwen3_5TextConfig(
        vocab_size=VOCABULARY, hidden_size=512, intermediate_size=1024, num_hidden_layers=4,
        num_attention_heads=8, num_key_value_heads=2, head_dim=64,
        linear_num_key_heads=8, linear_num_value_heads=8, linear_key_head_dim=128, linear_value_head_dim=128,
        layer_types=["linear_attention"] * 3 + ["full_attention"], pad_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return remembering(Qwen3_5ForCausalLM(config).eval())


def prompts_of(count: int) -> Texts:
    g = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 6, (count,), generator=g) * 8  # five lengths, so that static batches can be made
    return [torch.randint(1, VOCABULARY, (int(n),), generator=g).tolist() for n in lengths]


def together(model: Any, prompts: Texts, tokens: int) -> Texts:
    ids = torch.tensor(prompts)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)
    return out[:, ids.shape[1] :].tolist()  # type: ignore[no-any-return]


def alone(model: Any, prompts: Texts, tokens: int) -> Texts:
    return [text for prompt in prompts for text in together(model, [prompt], tokens)]


def static(model: Any, prompts: Texts, tokens: int) -> Texts:
    groups = defaultdict(list)
    for n, prompt in enumerate(prompts):
        groups[len(prompt)].append(n)
    texts: dict[int, list[int]] = {}
    for group in groups.values():
        texts |= zip(group, together(model, [prompts[n] for n in group], tokens), strict=True)
    return [texts[n] for n in range(len(prompts))]


class Engine:
    """The engine, kept from one run to the next as a server would."""

    def __init__(self, model: Any, requests: int, tokens: int) -> None:
        self.settings = GenerationConfig(max_new_tokens=tokens, do_sample=False, eos_token_id=-1)
        pages = requests * (-(-(40 + tokens) // 32) + 1)
        self.config = ContinuousBatchingConfig(
            page_size=32, num_blocks=pages, max_batch_tokens=256, max_requests_per_batch=requests
        )

    def __call__(self, model: Any, prompts: Texts, tokens: int) -> Texts:
        out = model.generate_batch(
            prompts,
            generation_config=self.settings,
            continuous_batching_config=self.config,
            persistent_manager=True,
        )
        return [answer.generated_tokens for answer in out.values()]


def measure(requests: int, tokens: int, rounds: int) -> dict[str, Any]:
    torch._dynamo.reset()
    model, prompts = build(), prompts_of(requests)
    plans: list[str] = []
    enable_continuous_batching(model, slots=requests)
    sides: dict[str, Callable[[Any, Texts, int], Texts]] = {
        "alone": alone, "static": static, "engine": Engine(model, requests, tokens)
    }  # fmt: skip
    with observers.also(lambda r: plans.extend(re.sub(r" \(/[^)]*\)", "", str(p).split("\n")[0]) for _, p in r.states)):
        want = {name: side(model, prompts, tokens) for name, side in sides.items()}
    assert want["engine"] == want["alone"] == want["static"], "texts differ"
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            gc.collect()
            start = time.perf_counter()
            side(model, prompts, tokens)
            seconds[name].append(time.perf_counter() - start)
    pools = model._cached_continuous_batching_manager.batch_processor.cache.pools
    states = sum(t.nbytes for t in pools.tensors) / requests
    rows = sum(a.row_bytes for found in LEDGER.allocations.values() for a in found.accounts) / requests
    disable_continuous_batching(model)
    row: dict[str, Any] = {"requests": requests, "plans": plans, "state_bytes": states, "row_bytes": rows}
    for name, times in seconds.items():
        middle = statistics.median(times)
        row[name] = {"seconds": middle, "requests_per_second": requests / middle, "ms_a_token": 1e3 * middle / tokens}
    row["over_alone"] = row["alone"]["seconds"] / row["engine"]["seconds"]
    row["over_static"] = row["static"]["seconds"] / row["engine"]["seconds"]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    results: dict[str, Any] = {"command": command("serving"), "machine": machine(), "cases": []}
    with torch.no_grad():
        for requests in args.requests:
            results["cases"].append(measure(requests, args.tokens, args.rounds))
            print(json.dumps(results["cases"][-1]), flush=True)
            if args.out:
                args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
