"""Compiled steps and readers of the stress machine, compiled once for all of its examples.

Operands are whole numbers and decays are 1, -1 or 0, so that sums are exact in any order: an ordinary tensor stepped by
the plain function holds what a compiled one must hold, bit for bit, in float32 as in float64.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.support.fuse import fuse

B, H, K, V = 2, 2, 4, 6
SLOTS = 5  # of a pool
TOKENS = (2, 4)  # of the verify graphs
FLUSH, CAPACITY = 4, 12
Inputs = tuple[Tensor, ...]


# ---------------------------------------------------------------------------------------------------- steps


def gla(S: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    new = S * g[..., None] + k[..., None] * v[..., None, :]
    S.copy_(new)
    return (q[..., None] * new).sum(-2)


def tokens(S: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """[B, T, H, *] operands."""
    new, out = S, []
    for t in range(q.shape[1]):
        new = new * g[:, t, :, :, None] + k[:, t, :, :, None] * v[:, t, :, None, :]
        out.append((q[:, t, :, :, None] * new).sum(-2))
    S.copy_(new)
    return torch.stack(out, 1)


def delta(S: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """Keys are signed unit vectors: what was at a key is replaced, and nothing grows."""
    new = S * g[..., :1, None]
    new = new + k[..., None] * (v - (new * k[..., None]).sum(-2))[..., None, :]
    S.copy_(new)
    return (q[..., None] * new).sum(-2)


def donated(S: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    new = S * g[..., None] + k[..., None] * v[..., None, :]
    return (q[..., None] * new).sum(-2), new


def declined(S: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """Not linear in the state: stays as it is, and reads and writes the state itself."""
    S.copy_(torch.relu(S * g[..., None]) + k[..., None] * v[..., None, :])
    return (q[..., None] * S).sum(-2)


def two(S1: Tensor, S2: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """An exception may come when the first state has stepped and the second has not."""
    out = fuse(gla(S1, q, k, v, g))
    return out + gla(S2, q, k, v + out * 0, g)


def layers(S: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """[layers, B, H, K, V], all in one tensor."""
    return gla(S[0], q, k, v, g) + gla(S[1], q, k, v, g)


def pooled(S: Tensor, slots: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    new = S[slots] * g[..., None] + k[..., None] * v[..., None, :]
    S[slots] = new
    return (q[..., None] * new).sum(-2)


# ------------------------------------------------------------------------------------- readers and writers


def summed(s: Tensor) -> Tensor:
    return s.sum(-1)


def of_list(states: list[Tensor]) -> Tensor:
    return torch.stack(states).sum(0)


def by_keyword(s: dict[str, Tensor]) -> Tensor:
    return torch.sum(input=s["state"], dim=-1)


def negated(s: Tensor) -> Tensor:
    return s.mul_(-1)


# ------------------------------------------------------------------------------------------------- compiled


@dataclass(frozen=True)
class Graph:
    """A step as it is and compiled."""

    name: str
    plain: Callable[..., Any]
    compiled: Callable[..., Any]
    count: int | None = None  # tokens of an operand's second dim


def own(fn: Callable[..., Any]) -> Callable[..., Any]:
    """The same function with a code object of its own, for which Dynamo keeps graphs of its own."""
    return types.FunctionType(fn.__code__.replace(), fn.__globals__, fn.__name__, None, fn.__closure__)


def _compile(fn: Callable[..., Any], target: str, dynamic: bool = False, **options: Any) -> Callable[..., Any]:
    """Not with fullgraph: two threads that call such functions may be told by torch that it found no compiled frame."""
    given = {"flush": FLUSH, "capacity": CAPACITY, "inner": "eager", "target": target, **options}
    return torch.compile(own(fn), backend="kvbuffer", options=given, dynamic=dynamic)


def steps(target: str) -> dict[str, Graph]:
    found = [
        Graph("decode", gla, _compile(gla, target)),
        Graph("other flush", gla, _compile(gla, target, flush=7)),
        Graph("at once", gla, _compile(gla, target, flush=1, capacity=None)),
        Graph("any batch", gla, _compile(gla, target, dynamic=True)),
        Graph("delta", delta, _compile(delta, target)),
        Graph("donated", donated, _compile(donated, target, donate=True)),
        Graph("declined", declined, _compile(declined, target)),
        Graph("two", two, _compile(two, target)),
        Graph("layers", layers, _compile(layers, target)),
        Graph("pool", pooled, _compile(pooled, target)),
        *(Graph(f"verify {n}", tokens, _compile(tokens, target), n) for n in TOKENS),
    ]
    return {graph.name: graph for graph in found}


def readers() -> dict[str, Callable[[Tensor], Any]]:
    """Graphs of other backends that read a state."""
    one, several, keyword = (torch.compile(own(f), backend="eager") for f in (summed, of_list, by_keyword))
    lowered = torch.compile(own(summed), backend="aot_eager")
    return {
        "graph": one,
        "graph of a list": lambda s: several([s, s]),
        "graph of a dict": lambda s: keyword({"state": s}),
        "lowered graph": lowered,
    }


def writers() -> dict[str, Callable[[Tensor], Any]]:
    return {"graph that writes": torch.compile(own(negated), backend="eager")}


# ------------------------------------------------------------------------------------------------- operands


def whole(low: int, high: int, sizes: tuple[int, ...], g: torch.Generator) -> Tensor:
    return torch.randint(low, high, sizes, generator=g).float()


def operands(graph: Graph, batch: int, g: torch.Generator) -> Inputs:
    lanes = (batch, H) if graph.count is None else (batch, graph.count, H)
    k = whole(-2, 3, (*lanes, K), g)
    if graph.name == "delta":
        k = torch.nn.functional.one_hot(torch.randint(K, lanes, generator=g), K) * (whole(0, 2, (*lanes, 1), g) * 2 - 1)
    gate = torch.tensor([1.0, 1.0, 1.0, 1.0, -1.0, -1.0, 0.0])[torch.randint(7, (*lanes, K), generator=g)]
    return whole(-3, 4, (*lanes, K), g), k, whole(-999, 1000, (*lanes, V), g), gate
