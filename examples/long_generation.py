"""A long generation, printed while it comes: transformers, a static cache, only the decode step compiled.

python examples/long_generation.py [--tokens N] [--prompt TEXT] [--quiet]

`generate` streams to a TextStreamer-like object. The prompt runs as it is, so little is compiled.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from byte_text import decode, encode
from transformers import CompileConfig, Qwen3_5ForCausalLM
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging as transformers_logging

CHECKPOINT = Path(__file__).parent / "checkpoints" / "tiny_lm"
PROMPT = "class Queue:\n    def __init__(self, maxsize=0):\n        self.maxsize = maxsize\n"


class Printed(BaseStreamer):  # type: ignore[misc]
    """Writes tokens as they come, and notes when. Bytes wait until they are a whole character."""

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet
        self.waiting: list[int] = []
        self.times: list[float] = []
        self.prompt_came = False

    def put(self, value: torch.Tensor) -> None:
        if not self.prompt_came:  # generate gives the prompt first
            self.prompt_came = True
            return
        self.times.append(time.perf_counter())
        self.waiting += value.flatten().tolist()
        text = decode(self.waiting)
        if not text.endswith("\ufffd"):
            self.waiting.clear()
            if not self.quiet:
                print(text, end="", flush=True)

    def end(self) -> None:
        if not self.quiet:
            print(decode(self.waiting))


def main() -> int:
    """Generate, then say how fast it was."""
    args = parse_arguments()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    model = Qwen3_5ForCausalLM.from_pretrained(CHECKPOINT).eval()
    prompt = torch.tensor([encode(args.prompt)])
    streamer = Printed(args.quiet)
    print(args.prompt, end="", flush=True)
    out = generate(model, prompt, args.tokens, streamer)
    steps = [b - a for a, b in zip(streamer.times, streamer.times[1:], strict=False)]
    steady = sorted(steps[2:]) or steps  # the first steps compile
    if steady:
        median, most = steady[len(steady) // 2] * 1e3, steady[int(0.99 * (len(steady) - 1))] * 1e3
        count = out.shape[1] - prompt.shape[1]
        print(f"\n{count} tokens; median {median:.2f} ms a token, 99 % within {most:.2f} ms")
        print(f"the slowest step, which compiles, took {max(steps):.1f} s")
    return 0


def generate(model: Any, prompt: torch.Tensor, tokens: int, streamer: BaseStreamer) -> torch.Tensor:
    """Greedy text; generate compiles the decode step for this backend."""
    config = CompileConfig(backend="kvbuffer", mode=None)
    config._compile_all_devices = True  # without it, transformers compiles on GPUs only
    found: torch.Tensor = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=tokens,
        do_sample=False,
        cache_implementation="static",
        compile_config=config,
        streamer=streamer,
    )
    return found


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024, help="bytes to generate (1024)")
    parser.add_argument("--prompt", default=PROMPT, help="text to continue")
    parser.add_argument("--quiet", action="store_true", help="print the numbers alone")
    args = parser.parse_args()
    if args.tokens < 1 or not args.prompt:
        parser.error("--tokens must be at least 1, --prompt must not be empty")
    return args


if __name__ == "__main__":
    sys.exit(main())
