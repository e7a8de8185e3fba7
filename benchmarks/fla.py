"""Layers of flash-linear-attention, decoding on a CPU through the library's own cache: this backend against Inductor.

    python -m benchmarks.fla [NAMES] [--out benchmarks/results/fla.json]

Needs `pip install --no-deps flash-linear-attention==0.6.0 fla-core==0.6.0`. Both sides compile the layer with its
functions spelled out in torch ops, as its Triton kernels cannot run here: once with states buffered where the cost
model says so, once with all of it left to Inductor. They take turns, a token each, on the same inputs, and must agree.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.run import machine
from kvbuffer_compile.backend import GraphRecord, observers
from kvbuffer_compile.integrations.functions import substitution
from tests.spelled import fla_calls

BATCH, HIDDEN, HEADS, HEAD_DIM, SLOTS, RANK = 16, 1024, 8, 128, 64, 32
SIZES = {  # by argument of a layer, in the place of what the tests take
    "hidden_size": HIDDEN, "num_heads": HEADS, "head_dim": HEAD_DIM, "num_slots": SLOTS, "expand_ratio": HEAD_DIM,
    "proj_low_rank_dim": RANK, **dict.fromkeys(fla_calls.LOW, RANK),
}  # fmt: skip
WARM, TIMED = 20, 60  # tokens
TOLERANCE = 1e-4  # largest difference, of the largest value


class Side:
    """A layer compiled with some options, and its own cache."""

    def __init__(self, layer: torch.nn.Module, **options: Any) -> None:
        from fla.models.utils import FLACache

        self.cache, self.records = FLACache(), list[GraphRecord]()
        self.step = torch.compile(layer, backend="kvbuffer", fullgraph=True, options=options)

    def __call__(self, x: Tensor) -> Tensor:
        with torch.no_grad(), observers.also(self.records.append):
            return self.step(x, past_key_values=self.cache, use_cache=True)[0]  # type: ignore[no-any-return]


def measure(name: str) -> dict[str, Any]:
    """One layer. AssertionError when the sides disagree."""
    from tests.spelled.fla_table import layer_of

    torch._dynamo.reset()
    substitution.watch()
    given = {argument: SIZES.get(argument, value) for argument, value in fla_calls.LAYERS[name].items()}
    layer = layer_of(name, given, WARM + TIMED)
    sides = {"kvbuffer": Side(layer, donate=True), "inductor": Side(layer, donate=False)}
    times: dict[str, list[float]] = {side: [] for side in sides}
    for t in range(WARM + TIMED):
        x = torch.randn(BATCH, 1, HIDDEN, generator=torch.Generator().manual_seed(t))
        outs = {}
        for side in sorted(sides, reverse=t % 2 == 0):
            start = time.perf_counter()
            outs[side] = sides[side](x)
            times[side].append(time.perf_counter() - start)
        error = float((outs["kvbuffer"] - outs["inductor"]).abs().max() / outs["inductor"].abs().max())
        assert error < TOLERANCE, f"{name}: the sides differ by {error:.1e} of the largest value at token {t}"
    timed = {side: taken[WARM:] for side, taken in times.items()}
    plans = [plan for _, plan in sides["kvbuffer"].records[-1].rewritten]
    assert not sides["inductor"].records[-1].rewritten, "nothing was left to Inductor"
    return {
        "layer": name,
        "states": len(plans),
        "flush": [plan.flush for plan in plans],
        "keys_and_values": [plan.sizes for plan in plans],
        "ms": {side: 1e3 * statistics.median(taken) for side, taken in timed.items()},
        "inductor_over_kvbuffer": statistics.median(
            theirs / ours for ours, theirs in zip(timed["kvbuffer"], timed["inductor"], strict=True)
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="layers; all of those the tests know, unless given")
    parser.add_argument("--out", type=Path, help="write the numbers there; those of other layers stay")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    known = json.loads(given.out.read_text(encoding="utf-8")) if given.out and given.out.exists() else {"rows": []}
    rows = {row["layer"]: row for row in known["rows"]}
    for name in given.names or fla_calls.LAYERS:
        try:
            rows[name] = measure(name)
        except torch._dynamo.exc.Unsupported as error:  # what the page says is declined
            print(f"{name}: {str(error).splitlines()[0]}", flush=True)
            continue
        print(json.dumps(rows[name]), flush=True)
        if given.out:
            found = {"machine": machine(), "batch": BATCH, "hidden_size": HIDDEN, "rows": [*rows.values()]}
            given.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
