"""Decode on a CPU, whole models: plain Inductor against kvbuffer, in turn, with equal logits asserted.

    python -m benchmarks.cpu [--out FILE.json] [--batches 1 16 64] [--steps 34] [--layers 8]
                             [--sides inductor kvbuffer half_reads]

A Qwen3.5-style hybrid (every fourth layer full attention, else Gated DeltaNet with 32 value heads of 128 x 128), hidden
size 1024, vocabulary 4096, float32, random weights. benchmarks/cpu_kernels.py times the steps alone. half_reads: the
same as kvbuffer, but that steps read the states in float16 (benchmarks/half_reads.py); it is asked for, with L = 16
unless --flush says otherwise.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig, StaticCache

from benchmarks.run import command, machine
from examples.batch_model import remembering
from kvbuffer_compile.backend import GraphRecord, observers

PROMPT = 4
LONGEST = 256  # positions of the attention caches
SIDES = ("inductor", "kvbuffer", "half_reads")
TOLERANCE = {"half_reads": 2e-2}  # of logits; else 1e-3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--steps", type=int, default=34, help="timed steps a side: two flush periods and more")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--flush", default="auto", help='"auto" or a number')
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES[:2])
    args = parser.parse_args()
    flush = args.flush if args.flush == "auto" else int(args.flush)
    results: dict[str, Any] = {"command": command("cpu"), "machine": machine(), "cases": []}
    print(results["machine"], flush=True)
    for batch in args.batches:
        row = measure(batch, args.steps, args.layers, flush, args.sides)
        results["cases"].append(row)
        print({k: v for k, v in row.items() if k not in SIDES}, *(line(n, row[n]) for n in args.sides), flush=True)
        if args.out:
            args.out.write_text(json.dumps(results, indent=1) + "\n")


def build(layers: int) -> Qwen3_5ForCausalLM:
    """The model, the same weights at every call; decays that remember (0.5 to 0.999 a token)."""
    torch.manual_seed(0)
    config = Qwen3_5TextConfig(
        vocab_size=4096, hidden_size=1024, intermediate_size=3072, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=2, head_dim=128,
        linear_num_key_heads=16, linear_num_value_heads=32, linear_key_head_dim=128, linear_value_head_dim=128,
        layer_types=["full_attention" if i % 4 == 3 else "linear_attention" for i in range(layers)],
    )  # fmt: skip
    return remembering(Qwen3_5ForCausalLM(config).eval())


class Decoder:
    """One side: a model with its cache, decoding given tokens."""

    def __init__(self, batch: int, layers: int, **compile_arguments: Any) -> None:
        self.model = build(layers)
        self.cache = StaticCache(config=self.model.config, max_cache_len=LONGEST)
        self.position = 0
        self.forward(torch.arange(PROMPT).expand(batch, PROMPT))
        self.records: list[GraphRecord] = []
        self.model.compile(**compile_arguments)

    @torch.no_grad()
    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        positions = torch.arange(self.position, self.position + length).expand(tokens.shape)
        self.position += length
        out = self.model(tokens, past_key_values=self.cache, position_ids=positions, use_cache=True)
        return out.logits[:, -1]


def measure(batch: int, steps: int, layers: int, flush: int | str, wanted: Sequence[str]) -> dict[str, Any]:
    """Milliseconds a step of both sides, and how many states were rewritten."""
    torch._dynamo.reset()
    records: list[GraphRecord] = []
    observers.listeners.append(records.append)
    given: dict[str, Any] = {"inductor": None, "kvbuffer": {"flush": flush}}
    given["half_reads"] = {"flush": 16 if flush == "auto" else flush, "read_dtype": torch.float16}
    backend = {name: "inductor" if name == "inductor" else "kvbuffer" for name in wanted}
    sides = {name: Decoder(batch, layers, backend=backend[name], options=given[name]) for name in wanted}
    times: dict[str, list[float]] = {name: [] for name in sides}
    for t in range(steps + 6):
        token = torch.randint(0, 4096, (batch, 1), generator=torch.Generator().manual_seed(t))
        logits = {}
        for name, side in sides.items():
            start = time.perf_counter()
            logits[name] = side.forward(token)
            if t >= 6:  # both compile in the first steps, kvbuffer once more when its states are guarded
                times[name].append((time.perf_counter() - start) * 1e3)
        for name in wanted[1:]:
            bound = TOLERANCE.get(name, 1e-3)
            torch.testing.assert_close(logits[name], logits[wanted[0]], rtol=bound, atol=bound)
    observers.listeners.clear()
    return {"batch": batch, "layers": layers, "steps": steps, **summary(times), "plans": plans(records)}


def summary(times: dict[str, list[float]]) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for name, found in times.items():
        ordered = sorted(found)
        row[name] = {
            "median_ms": statistics.median(found), "mean_ms": statistics.mean(found), "best_ms": ordered[0],
            "p99_over_median": ordered[int(0.99 * (len(ordered) - 1))] / statistics.median(found),
            "times_ms": [round(x, 2) for x in found],
        }  # fmt: skip
    if {"inductor", "kvbuffer"} <= set(times):
        row["gain_of_means"] = row["inductor"]["mean_ms"] / row["kvbuffer"]["mean_ms"]
        row["gain_of_medians"] = row["inductor"]["median_ms"] / row["kvbuffer"]["median_ms"]
    if {"kvbuffer", "half_reads"} <= set(times):
        row["half_reads_over_kvbuffer"] = row["kvbuffer"]["mean_ms"] / row["half_reads"]["mean_ms"]
    return row


def line(name: str, side: dict[str, Any]) -> str:
    """One side for people."""
    return f"\n  {name} median {side['median_ms']:.1f} ms, p99/median {side['p99_over_median']:.2f}"


def plans(records: list[GraphRecord]) -> list[str]:
    """The variants and flush lengths that were chosen, each once."""
    taken = [plan for record in records for _, plan in record.rewritten]
    return sorted({f"{p.variant} L={p.flush} {p.target}{' half reads' * p.shadowed}" for p in taken})


if __name__ == "__main__":
    main()
