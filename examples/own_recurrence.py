"""A recurrence that no library has, in 20 lines: what is found in it, and how fast it decodes.

python examples/own_recurrence.py [--batch N] [--heads N] [--size N] [--steps N]

Two memories a head that share keys: a slow one, and a fast one that stores what the slow one got wrong. The gate of the
fast memory is a vector, that of the slow one a number. Nothing is registered and no kernel is written.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

import kvbuffer_compile


def token(slow: Tensor, fast: Tensor, q: Tensor, k: Tensor, v: Tensor, forget: Tensor, gate: Tensor) -> Tensor:
    """One token. slow, fast: states [batch, heads, K, V], changed in place. q, k, gate [batch, heads, K]; v [batch,
    heads, V]; forget [batch, heads]. Returns [batch, heads, V]."""
    slow.mul_(forget[..., None, None])
    error = v - read(slow, k)
    slow.add_(outer(k, 0.1 * error))
    fast.mul_(gate[..., None])
    fast.add_(outer(k, error - read(fast, k)))
    return read(slow, q) + read(fast, q)


def read(state: Tensor, x: Tensor) -> Tensor:
    """What the state holds for a key: S^T x."""
    return torch.einsum("bhkv,bhk->bhv", state, x)


def outer(k: Tensor, u: Tensor) -> Tensor:
    """The rank-1 matrix k u^T."""
    return k[..., None] * u[..., None, :]


# ----------------------------------------------------------------------------------------- what it gives


def main() -> int:
    """Report, then compare; exit status 1 when outputs differ."""
    args = parse_arguments()
    with torch.no_grad():
        states = [torch.zeros(args.batch, args.heads, args.size, args.size) for _ in range(2)]
        print(kvbuffer_compile.explain(token, *states, *draw(args, 0)), end="\n\n")
        sides = {"Inductor": torch.compile(token), "kvbuffer": torch.compile(token, backend="kvbuffer")}
        times, outputs = race(sides, states, args)
    for name, found in times.items():
        print(f"{name:9}{statistics.median(found):8.2f} ms a step (median of {len(found)}, in turn)")
    print(f"gain     {statistics.median(times['Inductor']) / statistics.median(times['kvbuffer']):8.2f}x")
    error = float((outputs["Inductor"] - outputs["kvbuffer"]).abs().max() / outputs["Inductor"].abs().max())
    print(f"largest difference of the last outputs, over their size: {error:.1e}")
    return 0 if error < 1e-3 else 1


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8, help="sequences (8)")
    parser.add_argument("--heads", type=int, default=16, help="heads (16)")
    parser.add_argument("--size", type=int, default=128, help="keys and values of a head (128)")
    parser.add_argument("--steps", type=int, default=48, help="timed tokens (48)")
    args = parser.parse_args()
    if min(args.batch, args.heads, args.size, args.steps) < 1:
        parser.error("--batch, --heads, --size and --steps must be at least 1")
    return args


def draw(args: argparse.Namespace, seed: int) -> tuple[Tensor, ...]:
    """The operands of one token."""
    g = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, args.batch, args.heads, args.size, generator=g)
    q, k = torch.nn.functional.normalize(q, dim=-1), torch.nn.functional.normalize(k, dim=-1)
    forget = 0.98 + 0.02 * torch.rand(args.batch, args.heads, generator=g)
    gate = 0.5 + 0.5 * torch.rand(args.batch, args.heads, args.size, generator=g)
    return q, k, v, forget, gate


def race(
    sides: dict[str, Callable[..., Tensor]], states: list[Tensor], args: argparse.Namespace
) -> tuple[dict[str, list[float]], dict[str, Tensor]]:
    """Milliseconds of each step, both sides in turn on states of their own; and the last outputs."""
    own = {name: [s.clone() for s in states] for name in sides}
    times: dict[str, list[float]] = {name: [] for name in sides}
    outputs: dict[str, Tensor] = {}
    for step in range(args.steps + 2):
        operands = draw(args, step)
        for name, run in sides.items():
            start = time.perf_counter()
            outputs[name] = run(*own[name], *operands)
            times[name].append((time.perf_counter() - start) * 1e3)
    return {name: found[2:] for name, found in times.items()}, outputs


if __name__ == "__main__":
    sys.exit(main())
