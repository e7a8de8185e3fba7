"""How long one waits for the first answer: `--help`, and a first `generate` of the demo's model in a new process.

    python -m benchmarks.startup --rounds 2 --out benchmarks/results/startup.json

Each side has a cache folder of its own, filled by a first process ("cold"); then processes of the two alternate
("warm"). Imports and loading the model are not counted. Processor time, children's included, says more than the clock
where other programs run; the least of the rounds is kept of either, since whatever else the machine does only adds.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SIDES = ("inductor", "kvbuffer")
PROMPT, TOKENS = b"def fibonacci(n):\n", 8


def child(side: str) -> None:
    """In a process of its own: print what the first generate took, and what it said."""
    import torch
    from transformers import Qwen3_5ForCausalLM

    model = Qwen3_5ForCausalLM.from_pretrained(ROOT / "examples/checkpoints/tiny_lm").eval()
    prompt = torch.tensor([list(PROMPT)])
    start, used = time.perf_counter(), processor()
    model.compile(backend=side, options={"flush": 16} if side == "kvbuffer" else None)
    out = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=TOKENS, do_sample=False)
    took = {"seconds": time.perf_counter() - start, "processor": processor() - used}
    print(json.dumps({**took, "tokens": out[0].tolist()}))


def processor() -> float:
    """Seconds of processor time of this process and of its children that ended."""
    both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(used.ru_utime + used.ru_stime for used in both)


def first_generate(side: str, cache: Path) -> dict[str, Any]:
    """What `child` prints, with this cache folder."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.startup", "--child", side], cwd=ROOT, check=True, capture_output=True,
        text=True, env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache)},
    )  # fmt: skip
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def generates(rounds: int, folder: Path) -> dict[str, Any]:
    """Cold and warm seconds of both sides; AssertionError when they say different things."""
    cold = {side: first_generate(side, folder / side) for side in SIDES}
    warm: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for _ in range(rounds):
        for side in SIDES:
            warm[side].append(first_generate(side, folder / side))
    assert len({tuple(run["tokens"]) for run in (*cold.values(), *warm["inductor"], *warm["kvbuffer"])}) == 1
    kept = {side: {what: min(run[what] for run in runs) for what in ("seconds", "processor")}
            for side, runs in warm.items()}  # fmt: skip
    return {
        "cold": {side: {what: run[what] for what in ("seconds", "processor")} for side, run in cold.items()},
        "warm": kept,
        "warm_over_inductor": kept["kvbuffer"]["processor"] / kept["inductor"]["processor"],
        "rounds": rounds,
    }


def help_seconds(rounds: int) -> dict[str, float]:
    """Of `python -m kvbuffer_compile --help`."""
    clock, used = [], []
    for _ in range(rounds):
        start, before = time.perf_counter(), processor()
        subprocess.run([sys.executable, "-m", "kvbuffer_compile", "--help"], cwd=ROOT, check=True, capture_output=True)
        clock.append(time.perf_counter() - start)
        used.append(processor() - before)
    return {"seconds": min(clock), "processor": min(used)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="warm processes of each side (3)")
    parser.add_argument("--cache", type=Path, help="folder for the caches of both sides; a new one unless given")
    parser.add_argument("--out", type=Path, help="write the numbers there")
    parser.add_argument("--child", choices=SIDES, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        return child(given.child)
    from benchmarks.cpu_kernels import machine

    with tempfile.TemporaryDirectory() as scratch:
        found = {
            "command": "python -m benchmarks.startup", "machine": machine(), "load": os.getloadavg()[0],
            "help": help_seconds(given.rounds), "first_generate": generates(given.rounds, given.cache or Path(scratch)),
        }  # fmt: skip
    print(json.dumps(found, indent=1))
    if given.out:
        given.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
