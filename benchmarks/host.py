"""What a step costs the host: a call of many small layers, in Inductor and here, in processor time.

    python -m benchmarks.host --layers 1 8 32 --out benchmarks/results/host.json

The states are so small that nothing but calling is measured. Blocks of calls of the two alternate; the minimum over the
blocks is kept, since whatever else the machine does only adds to it. Outputs are compared first.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.run import machine

SHAPE = 1, 2, 8, 8
BLOCKS, CALLS = 400, 20


def layer(state: Tensor, q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    """A step of gated linear attention (arXiv 2312.06635, equation 3, with one gate a head)."""
    state.copy_(state * gate[..., None, None] + k[..., None] * v[..., None, :])
    return (q[..., None] * state).sum(-2)


def compiled(layers: int, backend: str) -> Callable[[], Tensor]:
    """A call of all layers, on states of its own."""
    g = torch.Generator().manual_seed(0)
    states = [torch.zeros(SHAPE) for _ in range(layers)]
    q, k, v = (torch.randn(SHAPE[:-1], generator=g) for _ in range(3))
    gate = torch.rand(SHAPE[:2], generator=g)
    options = {"flush": 16, "target": "cpp"} if backend == "kvbuffer" else None

    def model(states: list[Tensor], *operands: Tensor) -> Tensor:
        return torch.stack([layer(state, *operands) for state in states])

    step = torch.compile(model, backend=backend, fullgraph=True, options=options)
    return lambda: step(states, q, k, v, gate)


@torch.no_grad()
def measure(layers: int) -> dict[str, Any]:
    """Microseconds of processor time a call."""
    torch._dynamo.reset()
    sides = {name: compiled(layers, name) for name in ("inductor", "kvbuffer")}
    for _ in range(50):
        torch.testing.assert_close(*(call() for call in sides.values()))
    best = dict.fromkeys(sides, float("inf"))
    for _ in range(BLOCKS):
        for name, call in sides.items():
            start = time.thread_time()
            for _ in range(CALLS):
                call()
            best[name] = min(best[name], (time.thread_time() - start) / CALLS)
    inductor, ours = (best[name] * 1e6 for name in sides)
    row = {"layers": layers, "inductor_us": inductor, "kvbuffer_us": ours, "ratio": ours / inductor}
    row["added_us_per_state"] = (ours - inductor) / layers
    return {k: round(x, 2) if isinstance(x, float) else x for k, x in row.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="*", default=[1, 8, 32])
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for layers in args.layers:
        rows.append(measure(layers))
        print(rows[-1], flush=True)
    if args.out is not None:
        args.out.write_text(json.dumps({"machine": machine(), "cases": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
