"""Speculative decoding: memory of drafts, time of a verify step, tokens a second with prompt lookup.

    python -m benchmarks.speculation [--out FILE.json] [--parts bytes verify text]

bytes   what a request holds for 4 drafts: state and rows, against state and one snapshot for each draft.
verify  T tokens in one call against T calls of one token; Gated DeltaNet, 32 heads of 128 x 128, float32, batch 1.
text    greedy text of examples/checkpoints/tiny_lm with prompt lookup against plain decoding, texts equal; the part
        before a text falls into a loop is counted apart.
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

from benchmarks.run import command, machine
from kvbuffer_compile import rollback
from kvbuffer_compile.integrations.functions.adapters import GATED_DELTA
from kvbuffer_compile.integrations.transformers import enable_speculation
from kvbuffer_compile.runtime import by_hand

HEADS, SIZE = 32, 128
FLUSH, DRAFTS = 8, 4
CHECKPOINT = Path(__file__).parent.parent / "examples" / "checkpoints" / "tiny_lm"
PROMPTS = (
    "class Point:\n    def __init__(self, x, y):\n        self.x = x\n        self.y = y\n\n    def move(self, x):\n",
    "import os\nimport sys\n\ndef main(argv=None):\n    parser = argparse.ArgumentParser(",
    "    def test_encode(self):\n        self.assertEqual(encode(b'abc'), 'YWJj')\n        self.assertEqual(",
    "def read_file(path, mode='r'):\n    with open(path, mode) as f:\n        for line in f:\n            ",
)
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
    if decay.shape[2] > DRAFTS + 1:  # what bounds the rows of a call
        raise ValueError("too many tokens")
    new, out = torch.ops.kvbuffer.sequence(S, [decay, k, v, beta, q], GATED_DELTA["s"])
    S.copy_(new)
    return out


def tokens(count: int) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(count)
    keys = [torch.nn.functional.normalize(torch.randn(1, HEADS, count, SIZE, generator=g), dim=-1) for _ in range(2)]
    rates = [torch.rand(1, HEADS, count, generator=g) for _ in range(2)]
    return rates[0], keys[0], torch.randn(1, HEADS, count, SIZE, generator=g), rates[1], keys[1]


def session(target: str, flush: int = FLUSH, row_dtype: torch.dtype | None = None) -> tuple[Any, Tensor]:
    """A compiled step and its state, warm for one token and for several."""
    torch._dynamo.reset()
    options = {"inner": "eager", "target": target, "flush": flush, "capacity": flush + DRAFTS + 1,
               "row_dtype": row_dtype}  # fmt: skip
    step, state = torch.compile(delta_rule, backend="kvbuffer", options=options), torch.zeros(1, HEADS, SIZE, SIZE)
    for count in (3, 4, 1, 1, DRAFTS + 1):
        step(state, *tokens(count))
    return step, state


def draft_bytes() -> list[dict[str, Any]]:
    """The rows of some flush lengths; the state itself is float32."""
    one, found = HEADS * SIZE * SIZE * 4, []
    for flush, dtype in ((4, None), (FLUSH, None), (16, None), (FLUSH, torch.bfloat16)):
        _, state = session("aten", flush, dtype)
        (account,) = by_hand.accounts_of(state)
        rows = account.row_bytes
        found.append(
            {"drafts": DRAFTS, "flush": flush, "row_dtype": str(dtype or torch.float32).removeprefix("torch."),
             "state": one, "rows": rows, "snapshots": DRAFTS * one, "rows_over_snapshots": rows / (DRAFTS * one),
             "request_over_snapshots": (one + rows) / ((1 + DRAFTS) * one),
             "requests_in_the_same_memory": (1 + DRAFTS) * one / (one + rows)}
        )  # fmt: skip
    return found


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
    """How many tokens each call of the model gave and when, the prompt first."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.sizes.append(value.numel())
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is held back."""

    def until(self, count: int) -> tuple[float, int]:
        """Seconds and calls of the model until so many tokens were there, from the first one on."""
        there = 0
        for calls, (size, when) in enumerate(zip(self.sizes[1:], self.times[1:], strict=True)):
            there += size
            if there >= count:
                return when - self.times[1], calls
        raise ValueError(f"count must be at most {there}, not {count}")


def text_speed(count: int = 256, drafts: int = 6, repeats: int = 3) -> dict[str, Any]:
    """Plain and with prompt lookup, in turn; the better of some runs of each, summed over the prompts."""
    torch._dynamo.reset()
    model: Any = Qwen3_5ForCausalLM.from_pretrained(CHECKPOINT).eval()
    model.compile(backend="kvbuffer", options={"flush": 16, "capacity": 32})
    enable_speculation(model)
    rows = [prompted(model, text, count, drafts, repeats) for text in PROMPTS]
    total = {part: compared([row[part] for row in rows]) for part in ("whole", "before_loop")}
    return {"tokens": count, "drafts": drafts, **total, "prompts": rows}


def prompted(model: Any, text: str, count: int, drafts: int, repeats: int) -> dict[str, Any]:
    prompt = torch.tensor([list(text.encode())])
    kinds: dict[str, dict[str, int]] = {"plain": {}, "prompt_lookup": {"prompt_lookup_num_tokens": drafts}}
    runs: dict[str, list[Rounds]] = {name: [] for name in kinds}
    texts: dict[str, list[int]] = {}
    for _ in range(repeats + 1):  # the first one compiles
        for name, how in kinds.items():
            runs[name].append(Rounds())
            out = model.generate(prompt, max_new_tokens=count, do_sample=False, streamer=runs[name][-1], **how)
            texts[name] = out[0, prompt.shape[1] :].tolist()
    assert texts["plain"] == texts["prompt_lookup"], "the texts differ"
    loop = loop_start(texts["plain"])
    parts: dict[str, Any] = {}
    for part, end in (("whole", len(texts["plain"])), ("before_loop", loop)):
        best = {name: min(run.until(end) for run in found[1:]) for name, found in runs.items()}
        parts[part] = {"tokens": end - 1} | {
            name: {"seconds": seconds, "calls": calls} for name, (seconds, calls) in best.items()
        }
    return {"prompt": text, "text": bytes(texts["plain"]).decode(errors="replace"), "loop_from": loop, **parts}


def compared(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Some texts together: tokens a second of both kinds, tokens a call with drafts, and the gain."""
    made = sum(part["tokens"] for part in parts)
    seconds = {name: sum(part[name]["seconds"] for part in parts) for name in ("plain", "prompt_lookup")}
    calls = sum(part["prompt_lookup"]["calls"] for part in parts)
    return {
        "tokens": made,
        "gain": seconds["plain"] / seconds["prompt_lookup"],
        "tokens_per_call": made / calls,
        "tokens_per_second": {name: made / s for name, s in seconds.items()},
    }


def loop_start(text: list[int], longest: int = 64, least: int = 40) -> int:
    """From where on the text repeats itself to its end, with a period of `longest` or less and at least `least` bytes;
    its length if it does not."""
    starts = []
    for period in range(1, longest + 1):
        at = len(text)
        while at > period and text[at - 1] == text[at - 1 - period]:
            at -= 1
        if len(text) - at >= least:
            starts.append(at)
    return min(starts, default=len(text))


if __name__ == "__main__":
    main()
