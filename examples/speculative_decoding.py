"""Speculative decoding of a small trained model with linear attention: plain, by prompt lookup, by a draft model.

python examples/speculative_decoding.py [--tokens N] [--prompt TEXT] [--drafts N]
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from byte_text import decode, encode
from rich.console import Console
from rich.table import Table
from transformers import Qwen3_5ForCausalLM
from transformers.generation.streamers import BaseStreamer

from kvbuffer_compile.integrations.transformers import enable_speculation

CHECKPOINTS = Path(__file__).parent / "checkpoints"
PROMPT = '''class Stack:
    """A last-in, first-out container."""

    def __init__(self, items=None):
        self.items = list(items or [])

    def push(self, item):
        self.items.append(item)

    def pop(self):
'''
console = Console()


@dataclass(frozen=True)
class Run:
    """One way of completing the prompt. rounds: calls of the model, of which each gives one token or more."""

    name: str
    text: list[int]
    seconds: float
    rounds: int

    @property
    def accepted(self) -> float:
        """Drafted tokens that stayed, for each call of the model."""
        return len(self.text) / self.rounds - 1


def main() -> int:
    """Run the example; exit status 1 when the texts differ."""
    args = parse_arguments()
    prompt = torch.tensor([encode(args.prompt)])
    model, draft = load("tiny_lm"), load("tiny_draft")
    draft.generation_config.num_assistant_tokens = args.drafts
    draft.generation_config.num_assistant_tokens_schedule = "constant"
    runs = [
        complete("plain", model, prompt, args.tokens),
        complete("prompt lookup", model, prompt, args.tokens, prompt_lookup_num_tokens=args.drafts),
        complete("draft model", model, prompt, args.tokens, assistant_model=draft),
    ]
    console.print(f"\n[grey50]{args.prompt}[/]{decode(runs[0].text)}\n", highlight=False)
    console.print(table(runs))
    same = all(run.text == runs[0].text for run in runs)
    console.print("[green]The three texts are the same.[/]" if same else "[red]The texts differ.[/]")
    return 0 if same else 1


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=256, help="bytes to generate (default 256)")
    parser.add_argument("--prompt", default=PROMPT, help="text to complete")
    parser.add_argument("--drafts", type=int, default=6, help="tokens drafted in a round, at most 15 (default 6)")
    args = parser.parse_args()
    if args.tokens < 1 or args.drafts < 1 or not args.prompt:
        parser.error("--tokens and --drafts must be at least 1, --prompt must not be empty")
    return args


def load(name: str) -> Any:
    """A trained byte-level model, in eval mode and compiled, that can speculate."""
    model = Qwen3_5ForCausalLM.from_pretrained(CHECKPOINTS / name).eval()
    model.compile(backend="kvbuffer", options={"flush": 16, "capacity": 32})
    enable_speculation(model)
    return model


class Rounds(BaseStreamer):  # type: ignore[misc]
    """Counts the calls of the model: each gives out some tokens, and the prompt comes first."""

    def __init__(self) -> None:
        self.count = -1

    def put(self, value: torch.Tensor) -> None:
        self.count += 1

    def end(self) -> None:
        """Nothing is held back."""


def complete(name: str, model: Any, prompt: torch.Tensor, tokens: int, **how: Any) -> Run:
    """Greedy completion, timed on a second run when everything is compiled."""
    with console.status(f"{name}: first run, compiles"):
        generate(model, prompt, tokens, Rounds(), **how)
    rounds = Rounds()
    start = time.perf_counter()
    text = generate(model, prompt, tokens, rounds, **how)
    return Run(name, text, time.perf_counter() - start, rounds.count)


def generate(model: Any, prompt: torch.Tensor, tokens: int, rounds: Rounds, **how: Any) -> list[int]:
    mask = torch.ones_like(prompt)
    with torch.no_grad():
        out = model.generate(
            prompt, attention_mask=mask, max_new_tokens=tokens, do_sample=False, streamer=rounds, **how
        )
    return out[0, prompt.shape[1] :].tolist()


def table(runs: list[Run]) -> Table:
    out = Table(title="Greedy text (batch 1, prompt included)")
    for column in ("", "calls", "drafts accepted a call", "calls a second", "tokens a second", "against plain"):
        out.add_column(column, justify="right" if column else "left")
    for run in runs:
        speed = len(run.text) / run.seconds
        ratio = runs[0].seconds / run.seconds
        rate = run.rounds / run.seconds
        row = (run.name, str(run.rounds), f"{run.accepted:.2f}", f"{rate:.0f}", f"{speed:.0f}", f"{ratio:.2f}x")
        out.add_row(*row)
    return out


if __name__ == "__main__":
    sys.exit(main())
