"""Speculative decoding: memory of drafts, time of a verify step, tokens a second with prompt lookup.

    python -m benchmarks.speculation [--out FILE.json] [--parts bytes verify text]

bytes   what a request holds for 4 drafts: state and rows, against state and one snapshot for each draft.
verify  T tokens in one call against T calls of one token; Gated DeltaNet, 32 heads of 128 x 128, float32, batch 1.
text    greedy text of examples/checkpoints/tiny_lm with prompt lookup against plain decoding, texts equal.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3_5ForCausalLM
from transformers.generation.streamers import BaseStreamer

from benchmarks.cpu_kernels import command, machine
from kvbuffer_compile import rollback, runtime
from kvbuffer_compile.integrations.adapters import GATED_DELTA, MOST_TOKENS
from kvbuffer_compile.integrations.transformers import enable_speculation

HEADS, SIZE = 32, 128
FLUSH, DRAFTS = 8, 4
CHECKPOINT = Path(__file__).parent.parent / "examples" / "checkpoints" / "tiny_lm"
CODE = "class Point:\n    def __init__(self, x, y):\n        self.x = x\n        self.y = y\n\n    def move(self, x):\n"
PARTS = ("bytes", "verify", "text")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    args = parser.parse_args()
    results: dict[str, Any] = {"command": command("speculation"), "machine": machine()}
    measures: dict[str, Callable[[], Any]] = {"bytes": draft_bytes, "verify": verify_times, "text": text_speed}
    for part in args.parts:
        with torch.no_grad():
            results[part] = measures[part]()
        print(part, json.dumps(results[part], indent=1), flush=True)
        if args.out:
            args.out.write_text(json.dumps(results, indent=1) + "\n")


def delta_rule(S: Tensor, decay: Tensor, k: Tensor, v: Tensor, beta: Tensor, q: Tensor) -> Tensor:
    """T tokens of Gated DeltaNet on a state [1, heads, K, V]."""
    if decay.shape[2] > MOST_TOKENS:  # what bounds the rows of a call
        raise ValueError("too many tokens")
    new, out = torch.ops.kvbuffer.sequence(S, [decay, k, v, beta, q], GATED_DELTA["s"])
    S.copy_(new)
    return out


def tokens(count: int) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(count)
    keys = [torch.nn.functional.normalize(torch.randn(1, HEADS, count, SIZE, generator=g), dim=-1) for _ in range(2)]
    rates = [torch.rand(1, HEADS, count, generator=g) for _ in range(2)]
    return rates[0], keys[0], torch.randn(1, HEADS, count, SIZE, generator=g), rates[1], keys[1]


def session(target: str) -> tuple[Callable[..., Tensor], Tensor]:
    """A compiled step and its state, warm for one token and for several."""
    torch._dynamo.reset()
    options = {"inner": "eager", "target": target, "flush": FLUSH, "capacity": FLUSH + DRAFTS + 1}
    step, state = torch.compile(delta_rule, backend="kvbuffer", options=options), torch.zeros(1, HEADS, SIZE, SIZE)
    for count in (3, 4, 1, 1, DRAFTS + 1):
        step(state, *tokens(count))
    return step, state


def draft_bytes() -> dict[str, Any]:
    _, state = session("aten")
    (account,) = runtime.accounts_of(state)
    one = HEADS * SIZE * SIZE * 4
    return {
        "drafts": DRAFTS,
        "capacity": account.plan.capacity,
        "state": one,
        "rows": account.row_bytes,
        "snapshots": DRAFTS * one,
        "rows_over_snapshots": account.row_bytes / (DRAFTS * one),
        "requests_in_the_same_memory": (1 + DRAFTS) * one / (one + account.row_bytes),
    }


def verify_times() -> list[dict[str, Any]]:
    """Medians in microseconds; each verify has all but one of its tokens taken back, as after a rejection."""
    rows = []
    for target in ("aten", "cpp"):
        step, state = session(target)
        several, single = tokens(DRAFTS + 1), tokens(1)
        at_once = timed(lambda s=step, x=state, t=several: (s(x, *t), rollback(x, DRAFTS)))
        one = timed(lambda s=step, x=state, t=single: s(x, *t))
        rows.append({"target": target, "tokens": DRAFTS + 1, "verify_us": at_once, "one_token_us": one,
                     "verify_over_steps": at_once / ((DRAFTS + 1) * one)})  # fmt: skip
    return rows


def timed(run: Callable[[], Any], times: int = 200) -> float:
    found = []
    for _ in range(times):
        start = time.perf_counter()
        run()
        found.append((time.perf_counter() - start) * 1e6)
    return statistics.median(found)


class Rounds(BaseStreamer):  # type: ignore[misc]
    """How many tokens each call of the model gave, the prompt first."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def put(self, value: Tensor) -> None:
        self.sizes.append(value.numel())

    def end(self) -> None:
        """Nothing is held back."""


def text_speed(count: int = 256, drafts: int = 6, repeats: int = 3) -> dict[str, Any]:
    """The better of some runs of each kind, taken in turn."""
    torch._dynamo.reset()
    model: Any = Qwen3_5ForCausalLM.from_pretrained(CHECKPOINT).eval()
    model.compile(backend="kvbuffer", options={"flush": 16, "capacity": 32})
    enable_speculation(model)
    prompt = torch.tensor([list(CODE.encode())])
    kinds: dict[str, dict[str, int]] = {"plain": {}, "prompt_lookup": {"prompt_lookup_num_tokens": drafts}}
    best: dict[str, dict[str, Any]] = {}
    texts: dict[str, list[int]] = {}
    for turn in range(repeats + 1):  # the first one compiles
        for name, how in kinds.items():
            rounds = Rounds()
            start = time.perf_counter()
            out = model.generate(prompt, max_new_tokens=count, do_sample=False, streamer=rounds, **how)
            seconds = time.perf_counter() - start
            texts[name] = out[0, prompt.shape[1] :].tolist()
            if turn and seconds < best.get(name, {"seconds": float("inf")})["seconds"]:
                calls = len(rounds.sizes) - 1
                best[name] = {"seconds": seconds, "tokens_per_second": count / seconds, "calls": calls,
                              "calls_per_second": calls / seconds, "tokens_per_call": count / calls,
                              "sizes": rounds.sizes[1:]}  # fmt: skip
    assert texts["plain"] == texts["prompt_lookup"], "the texts differ"
    best["plain"].pop("sizes")
    text = bytes(texts["plain"]).decode(errors="replace")
    gain = best["plain"]["seconds"] / best["prompt_lookup"]["seconds"]
    loop = loop_start(texts["plain"])
    return {"tokens": count, "drafts": drafts, "gain": gain, "loop_from": loop, "text": text, **best}


def loop_start(text: list[int], longest: int = 40) -> int:
    """From where on the text repeats itself to its end, at least 40 bytes with a period of 40 or less; its length if
    it does not."""
    starts = []
    for period in range(1, longest + 1):
        at = len(text)
        while at > period and text[at - 1] == text[at - 1 - period]:
            at -= 1
        if len(text) - at >= longest:
            starts.append(at)
    return min(starts, default=len(text))


if __name__ == "__main__":
    main()
