"""How long one waits for the first answer: `--help`, the import, and a first `generate` in a new process.

    python -m benchmarks.startup --rounds 5 --layers 4 24 --out benchmarks/results/startup.json

The model is the demo's (4 layers), or one like it with more layers and random weights. Each side has a cache folder of
its own, filled by a first process ("cold"); then processes of the two alternate ("warm"), and each pair gives a ratio.
Imports of torch and transformers and loading the model are not counted. Processor time, children's included, says more
than the clock where other programs run; medians are kept of either, and of the ratios of pairs.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SIDES = ("inductor", "kvbuffer")
PROMPT, TOKENS = b"def fibonacci(n):\n", 8


def child(side: str, layers: int) -> None:
    """In a process of its own: print what the first generate took, what it said, and what came from the caches."""
    import torch
    from torch._dynamo.utils import counters

    model = _model(layers)
    prompt = torch.tensor([list(PROMPT)])
    start, used = time.perf_counter(), processor()
    model.compile(backend=side, options={"flush": 16, "cache": True} if side == "kvbuffer" else None)
    out = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=TOKENS, do_sample=False)
    took = {"seconds": time.perf_counter() - start, "processor": processor() - used}
    hits = counters["aot_autograd"]["autograd_cache_hit"]
    print(json.dumps({**took, "graphs": counters["aot_autograd"]["total"], "hits": hits, "tokens": out[0].tolist()}))


def _model(layers: int) -> Any:
    import torch
    from transformers import AutoConfig, Qwen3_5ForCausalLM

    known = ROOT / "examples/checkpoints/tiny_lm"
    config = AutoConfig.from_pretrained(known)
    if layers == config.num_hidden_layers:
        return Qwen3_5ForCausalLM.from_pretrained(known).eval()
    config.layer_types = (config.layer_types * layers)[:layers]
    config.num_hidden_layers = layers
    torch.manual_seed(0)
    return Qwen3_5ForCausalLM(config).eval()


def processor() -> float:
    """Seconds of processor time of this process and of its children that ended."""
    both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(used.ru_utime + used.ru_stime for used in both)


def first_generate(side: str, cache: Path, layers: int) -> dict[str, Any]:
    """What `child` prints, with this cache folder."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.startup", "--child", side, "--layers", str(layers)], cwd=ROOT, check=True,
        capture_output=True, text=True, env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache)},
    )  # fmt: skip
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def generates(rounds: int, folder: Path, layers: int) -> dict[str, Any]:
    """Cold and warm seconds of both sides; AssertionError when they say different things, or a warm process has
    compiled something. A folder that holds the caches of an earlier run gives no cold numbers."""
    sides = {side: folder / f"{side}-{layers}" for side in SIDES}
    filled = all(path.is_dir() for path in sides.values())
    cold = {side: first_generate(side, path, layers) for side, path in sides.items()}
    rows = [{side: first_generate(side, path, layers) for side, path in sides.items()} for _ in range(rounds)]
    runs = [run for row in rows for run in row.values()]
    assert len({tuple(run["tokens"]) for run in (*cold.values(), *runs)}) == 1
    assert all(run["graphs"] == run["hits"] > 0 for run in runs), "a warm process compiled a graph"
    return {
        "layers": layers,
        "rounds": rounds,
        "cold": None if filled else {side: _times(run) for side, run in cold.items()},
        "warm": {side: _medians([_times(row[side]) for row in rows]) for side in SIDES},
        "warm_over_inductor": _medians([_ratios(row) for row in rows]),
        "warm_pairs": [{side: _times(row[side]) for side in SIDES} for row in rows],
    }


def _times(run: dict[str, Any]) -> dict[str, float]:
    return {what: run[what] for what in ("seconds", "processor")}


def _ratios(row: dict[str, Any]) -> dict[str, float]:
    return {what: row["kvbuffer"][what] / row["inductor"][what] for what in ("seconds", "processor")}


def _medians(runs: list[dict[str, float]]) -> dict[str, float]:
    return {what: statistics.median(run[what] for run in runs) for what in runs[0]}


def command_seconds(rounds: int, *arguments: str) -> dict[str, float]:
    """Of Python with these arguments; the least of the rounds, since whatever else the machine does only adds."""
    runs = []
    for _ in range(rounds):
        start, before = time.perf_counter(), processor()
        subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True, capture_output=True)
        runs.append({"seconds": time.perf_counter() - start, "processor": processor() - before})
    return {what: min(run[what] for run in runs) for what in runs[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="warm processes of each side (3)")
    parser.add_argument("--layers", type=int, nargs="+", default=[4], help="layers of the models (4, the demo's)")
    parser.add_argument("--cache", type=Path, help="folder for the caches of both sides; a new one unless given")
    parser.add_argument("--out", type=Path, help="write the numbers there")
    parser.add_argument("--child", choices=SIDES, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        return child(given.child, given.layers[0])
    from benchmarks.run import machine

    with tempfile.TemporaryDirectory() as scratch:
        found = {
            "command": "python -m benchmarks.startup", "machine": machine(), "load": os.getloadavg()[0],
            "help": command_seconds(given.rounds, "-m", "kvbuffer_compile", "--help"),
            "import": command_seconds(given.rounds, "-c", "import kvbuffer_compile"),
            "first_generate": [generates(given.rounds, given.cache or Path(scratch), n) for n in given.layers],
        }  # fmt: skip
    print(json.dumps(found, indent=1))
    if given.out:
        given.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
