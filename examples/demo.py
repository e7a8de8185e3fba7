"""The main job, twice: complete a prompt with a small trained model, then decode a batch with states of real size.

python examples/demo.py [--tokens N] [--prompt TEXT] [--batch N] [--layers N] [--steps N]

The completion compares text and tokens a second of plain Inductor with kvbuffer and prompt lookup. The batch decodes
with a model of random weights, because only sizes matter there: Gated DeltaNet layers with the heads of Qwen3.5.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from batch_model import Decoder, build
from byte_text import decode, encode
from rich.console import Console
from rich.table import Table
from transformers import CompileConfig, Qwen3_5ForCausalLM
from transformers.utils import logging as transformers_logging

import kvbuffer_compile
from kvbuffer_compile.integrations.transformers import enable_speculation

CHECKPOINT = Path(__file__).parent / "checkpoints" / "tiny_lm"
PROMPT = '''class Stack:
    """A last-in, first-out container."""

    def __init__(self, items=None):
        self.items = list(items or [])

    def push(self, item):
'''
DRAFTS = 6
RUNS = 3  # timed completions a side, in turn
WHY = {  # of the second part, by what the cost model took
    "recurrent": "It still writes the state at every token (status `recurrent`): on this machine reading the buffered "
    "rows is predicted to take longer than the writes that they spare. With more sequences, or more cores on the same "
    "memory, that turns.",
    "buffered": "It writes the state every L tokens only (status `buffered`): the writes that are left out are "
    "predicted to take longer than the rows that are read instead.",
    "declined": "Nothing was predicted to be faster than Inductor here.",
}
console = Console()


def main() -> int:
    """Run the demo; exit status 1 when the results differ or no state was rewritten."""
    args = parse_arguments()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    console.print(
        "Two parts, each with plain Inductor and with kvbuffer. One to five minutes on two cores, nearly all of it for "
        "compiling: C++ for every graph, and the first time this machine's kernels are timed as well.\n"
    )
    start = time.perf_counter()
    with torch.no_grad():
        same = completion(torch.tensor([encode(args.prompt)]), args.tokens)
        close = batch(args.layers, args.batch, args.steps)
    console.print(f"[grey50]All in all {time.perf_counter() - start:.0f} s.[/]", highlight=False)
    return 0 if same and close else 1


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=160, help="bytes to generate (default 160)")
    parser.add_argument("--prompt", default=PROMPT, help="text to complete")
    parser.add_argument("--batch", type=int, default=16, help="sequences of the second part (default 16)")
    parser.add_argument("--layers", type=int, default=4, help="layers of its model, every fourth attention (default 4)")
    parser.add_argument("--steps", type=int, default=32, help="timed tokens of each sequence (default 32)")
    args = parser.parse_args()
    if min(args.tokens, args.batch, args.steps) < 1 or args.layers < 4 or not args.prompt:
        parser.error("--tokens, --batch and --steps must be at least 1, --layers 4, --prompt must not be empty")
    return args


# ------------------------------------------------------------------------------------------- one text


def completion(prompt: torch.Tensor, tokens: int) -> bool:
    """Complete the prompt in two ways; whether the texts are the same."""
    console.rule("[bold]1. A text[/] (trained model of 0.94 M parameters, batch 1)")
    plain, lookup = load(), load()
    lookup.compile(backend="kvbuffer")
    enable_speculation(lookup)
    ways: dict[str, Callable[[], list[int]]] = {
        "Inductor": lambda: generate(plain, prompt, tokens, **compiled_by_generate("inductor")),
        "kvbuffer, prompt lookup": lambda: generate(lookup, prompt, tokens, prompt_lookup_num_tokens=DRAFTS),
    }
    first = {name: timed(f"{name}: first run, compiles", run) for name, run in ways.items()}
    texts = {name: text for name, (text, _) in first.items()}
    again = {name: [] for name in ways}
    for _ in range(RUNS):
        for name, run in ways.items():
            again[name].append(timed(f"{name}: again", run)[1])
    text = next(iter(texts.values()))
    console.print(f"[grey50]{decode(prompt[0].tolist())}[/]{decode(text)}\n", highlight=False)
    console.print(completion_table(first, again, len(text)))
    same = all(other == text for other in texts.values())
    console.print("[green]The two texts are the same.[/]" if same else "[red]The texts differ.[/]")
    console.print(
        "Where the gain comes from: the states of this model are small and lie in cache, so leaving out writes gains "
        "nothing. But buffered tokens can be taken back. So the model checks several drafted tokens in one call, which "
        "transformers by itself refuses for models with such states.\n"
    )
    return same


def load() -> Any:
    """The trained byte-level model, in eval mode."""
    return Qwen3_5ForCausalLM.from_pretrained(CHECKPOINT).eval()


def compiled_by_generate(backend: str) -> dict[str, Any]:
    """Arguments by which generate itself compiles the decode step, and only that."""
    config = CompileConfig(backend=backend, mode=None)
    config._compile_all_devices = True  # without it, transformers compiles on GPUs only
    return {"cache_implementation": "static", "compile_config": config}


def generate(model: Any, prompt: torch.Tensor, tokens: int, **how: Any) -> list[int]:
    """The greedy continuation."""
    out = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=tokens, do_sample=False, **how)
    return out[0, prompt.shape[1] :].tolist()


def timed(what: str, run: Callable[[], list[int]]) -> tuple[list[int], float]:
    """A run's tokens and its seconds."""
    start = time.perf_counter()
    with console.status(what):
        tokens = run()
    seconds = time.perf_counter() - start
    console.print(f"[grey50]{what}: {seconds:.1f} s[/]", highlight=False)
    return tokens, seconds


def completion_table(first: dict[str, Any], again: dict[str, list[float]], tokens: int) -> Table:
    table = Table(title=f"{tokens} tokens, best of {RUNS} runs in turn; kvbuffer verifies up to {DRAFTS} drafts a call")
    for column in ("", "first run, s", "tokens a second", "against Inductor"):
        table.add_column(column, justify="right" if column else "left")
    speeds = {name: tokens / min(seconds) for name, seconds in again.items()}
    for name, speed in speeds.items():
        table.add_row(name, f"{first[name][1]:.1f}", f"{speed:.0f}", f"{speed / speeds['Inductor']:.2f}x")
    return table


# ------------------------------------------------------------------------------------------- a batch


def batch(layers: int, sequences: int, steps: int) -> bool:
    """Decode a batch on both sides in turn; whether the logits agree and some state was rewritten."""
    console.rule(f"[bold]2. A batch[/] ({sequences} sequences, {layers} layers, random weights)")
    report = explain_batch(layers, sequences)
    print(report, end="\n\n")
    sides = {name: Decoder(build(layers), sequences) for name in ("inductor", "kvbuffer")}
    for name, side in sides.items():
        start = time.perf_counter()
        with console.status(f"{name}: compiles"):
            side.model.compile(backend=name)
            side.step(0)
        console.print(f"[grey50]{name}: first step {time.perf_counter() - start:.1f} s[/]", highlight=False)
    times, errors = race(sides, steps)
    console.print(batch_table(times, sides["kvbuffer"].state_bytes, sequences))
    close = max(errors) < 1e-3
    status = next((s.status for s in report.states if s.status in ("buffered", "recurrent")), "declined")
    console.print(f"Largest difference of the logits, over their size: {max(errors):.1e}\n")
    console.print(
        "Where the gain comes from: each token goes over every state. Inductor's loops do so several times, kvbuffer's "
        f"kernel once. {WHY[status]}\n"
    )
    return close and status != "declined"


def explain_batch(layers: int, sequences: int) -> Any:
    """The report on one decode step."""
    with console.status("reading the decode step, measuring this machine"):
        decoder = Decoder(build(layers), sequences)
        return kvbuffer_compile.explain(decoder.model, *decoder.next_token(0), **decoder.arguments())


def race(sides: dict[str, Decoder], steps: int) -> tuple[dict[str, list[float]], list[float]]:
    """Milliseconds a step of both sides, and how far their logits are apart."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    errors = []
    for token in range(1, steps + 3):
        logits = []
        for name, side in sides.items():
            start = time.perf_counter()
            logits.append(side.step(token))
            times[name].append((time.perf_counter() - start) * 1e3)
        errors.append(float((logits[0] - logits[1]).abs().max() / logits[0].abs().max()))
    return {name: found[2:] for name, found in times.items()}, errors


def batch_table(times: dict[str, list[float]], state_bytes: int, sequences: int) -> Table:
    table = Table(title=f"{state_bytes / 1e6:.0f} MB of states, median of {len(times['inductor'])} steps in turn")
    for column in ("", "ms a step", "tokens a second", "against Inductor"):
        table.add_column(column, justify="right" if column else "left")
    plain = statistics.median(times["inductor"])
    for name, found in times.items():
        ms = statistics.median(found)
        table.add_row(name, f"{ms:.1f}", f"{sequences / ms * 1e3:.0f}", f"{plain / ms:.2f}x")
    return table


if __name__ == "__main__":
    sys.exit(main())
