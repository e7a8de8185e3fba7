"""The main job on a small trained model: complete a prompt three ways, compare the texts, show what was rewritten.

python examples/demo.py [--tokens N] [--prompt TEXT] [--flush L]
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from byte_text import decode, encode
from rich.console import Console
from rich.table import Table
from transformers import DynamicCache, Qwen3_5ForCausalLM

import kvbuffer_compile

CHECKPOINT = Path(__file__).parent / "checkpoints" / "tiny_lm"
PROMPT = '''class Stack:
    """A last-in, first-out container."""

    def __init__(self, items=None):
        self.items = list(items or [])

    def push(self, item):
'''
console = Console()


def main() -> int:
    """Run the demo; exit status 1 when the texts differ or nothing was rewritten."""
    args = parse_arguments()
    prompt = torch.tensor([encode(args.prompt)])
    report = explain_decoding(prompt, args.flush)
    console.print(f"[bold]What was found in one decode step[/] (flush={args.flush})\n")
    print(report)

    runs = [
        complete("eager", prompt, args.tokens),
        complete("inductor", prompt, args.tokens, backend="inductor"),
        complete("kvbuffer", prompt, args.tokens, backend="kvbuffer", options={"flush": args.flush}),
    ]
    console.print("\n[bold]The completion[/] (prompt in grey)\n")
    console.print(f"[grey50]{args.prompt}[/]{decode(runs[0]['tokens'])}", highlight=False)
    console.print()
    console.print(times(runs))
    same = all(run["tokens"] == runs[0]["tokens"] for run in runs)
    console.print("[green]The three texts are the same.[/]" if same else "[red]The texts differ.[/]")
    console.print(
        "This model is small on purpose: its state fits in cache, where writing it costs little. "
        "Speed on states of real size is in benchmarks/."
    )
    rewritten = [s for s in report.states if s.status != "declined"]
    return 0 if same and rewritten else 1


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=160, help="bytes to generate (default 160)")
    parser.add_argument("--prompt", default=PROMPT, help="text to complete")
    parser.add_argument("--flush", type=int, default=16, help="tokens between two writes of a state (default 16)")
    args = parser.parse_args()
    if args.tokens < 1 or args.flush < 1 or not args.prompt:
        parser.error("--tokens and --flush must be at least 1, --prompt must not be empty")
    return args


def load() -> Any:
    """The trained byte-level model, in eval mode."""
    return Qwen3_5ForCausalLM.from_pretrained(CHECKPOINT).eval()


def explain_decoding(prompt: torch.Tensor, flush: int) -> Any:
    """The report for one decode step behind the prompt."""
    model, cache = load(), None
    with torch.no_grad(), console.status("reading the model's decode step"):
        cache = DynamicCache(config=model.config)
        model(prompt, past_key_values=cache, use_cache=True)
        token = prompt[:, -1:]
        return kvbuffer_compile.explain(model, token, past_key_values=cache, options={"flush": flush})


def complete(name: str, prompt: torch.Tensor, tokens: int, **compile_arguments: Any) -> dict[str, Any]:
    """Greedy completion, timed on a second run when everything is compiled."""
    model = load()
    if compile_arguments:
        model.compile(**compile_arguments)
    start = time.perf_counter()
    with console.status(f"{name}: first run, compiles" if compile_arguments else f"{name}: first run"):
        generate(model, prompt, tokens)
    first = time.perf_counter() - start
    start = time.perf_counter()
    with console.status(f"{name}: second run, timed"):
        out = generate(model, prompt, tokens)
    seconds = time.perf_counter() - start
    console.print(f"{name}: first run {first:.1f} s, then {seconds / len(out) * 1e3:.2f} ms per token")
    return {"name": name, "tokens": out, "first": first, "per_token": seconds / len(out)}


def generate(model: Any, prompt: torch.Tensor, tokens: int) -> list[int]:
    with torch.no_grad():
        out = model.generate(prompt, max_new_tokens=tokens, do_sample=False, attention_mask=torch.ones_like(prompt))
    return out[0, prompt.shape[1] :].tolist()


def times(runs: list[dict[str, Any]]) -> Table:
    table = Table(title="Time per token (batch 1, prompt included)")
    for column in ("", "first run, s", "ms per token", "against eager"):
        table.add_column(column, justify="right" if column else "left")
    for run in runs:
        ratio = runs[0]["per_token"] / run["per_token"]
        table.add_row(run["name"], f"{run['first']:.1f}", f"{run['per_token'] * 1e3:.2f}", f"{ratio:.2f}x")
    return table


if __name__ == "__main__":
    sys.exit(main())
