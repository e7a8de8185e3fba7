"""Many requests of different lengths in one pool of slots: they come, decode together, and go.

python examples/batch_decode.py [--requests N] [--slots N] [--batch N] [--layers N] [--heads N] [--size N]

A decoder of random weights (its text means nothing, its sizes are real) keeps the states of all requests in one tensor
a layer, [slots, heads, size, size]. Each call steps the slots of the requests that are running. A new request begins
with a copy of the states behind a shared prefix. In the end each request's tokens are compared with decoding it alone,
without the backend.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from kvbuffer_compile.backend import observers

VOCABULARY = 512
PREFIX = (7, 11, 13, 17)  # tokens that all requests share


class Layer(nn.Module):
    """Gated DeltaNet on a pool of states."""

    def __init__(self, width: int, heads: int, size: int) -> None:
        super().__init__()
        self.heads, self.size = heads, size
        self.inner = nn.Linear(width, 3 * heads * size, bias=False)
        self.gates = nn.Linear(width, 2 * heads)
        self.outer = nn.Linear(heads * size, width, bias=False)
        self.norm = nn.RMSNorm(width)

    def forward(self, x: Tensor, pool: Tensor, slots: Tensor) -> Tensor:
        """x [batch, width]; pool [slots, heads, size, size]; slots [batch]."""
        h = self.norm(x)
        q, k, v = self.inner(h).view(-1, 3, self.heads, self.size).unbind(1)
        q, k = nn.functional.normalize(q, dim=-1), nn.functional.normalize(k, dim=-1)
        forget, beta = self.gates(h).view(-1, 2, self.heads).sigmoid().unbind(1)
        state = pool[slots] * (0.9 + 0.1 * forget)[..., None, None]
        delta = beta[..., None] * (v - (state * k[..., None]).sum(-2))
        state = state + k[..., None] * delta[..., None, :]
        pool[slots] = state
        return x + self.outer((state * q[..., None]).sum(-2).flatten(1))


class Decoder(nn.Module):
    """Layers between an embedding and its transpose."""

    def __init__(self, layers: int, heads: int, size: int, width: int = 256) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.layers = nn.ModuleList(Layer(width, heads, size) for _ in range(layers))
        self.norm = nn.RMSNorm(width)

    def forward(self, tokens: Tensor, pools: list[Tensor], slots: Tensor) -> Tensor:
        """The next tokens [batch], greedy; the pools of all layers are stepped at these slots."""
        x = self.embedding(tokens)
        for layer, pool in zip(self.layers, pools, strict=True):
            x = layer(x, pool, slots)
        return (self.norm(x) @ self.embedding.weight.T).argmax(-1)


@dataclass
class Request:
    """first: its own first token, behind the prefix. length: how many tokens it wants."""

    first: int
    length: int
    tokens: list[int] = field(default_factory=list)

    @property
    def last(self) -> int:
        return self.tokens[-1] if self.tokens else self.first


class Engine:
    """Continuous batching: whoever waits takes a free slot."""

    def __init__(self, step: Callable[..., Tensor], pools: list[Tensor], batch: int) -> None:
        self.step, self.pools, self.batch = step, pools, batch
        self.free = list(range(2, len(pools[0])))  # slot 0 is for padding, slot 1 keeps the prefix
        self.running: dict[int, Request] = {}
        for token in PREFIX:
            self._call([token], [1])

    def serve(self, waiting: list[Request]) -> int:
        """Decode all requests; returns the number of calls."""
        calls = 0
        while waiting or self.running:
            while waiting and self.free and len(self.running) < self.batch:
                self._admit(waiting.pop(0))
            slots = list(self.running)
            out = self._call([self.running[s].last for s in slots], slots)
            calls += 1
            for slot, token in zip(slots, out, strict=True):
                self._took(slot, token)
        return calls

    def _admit(self, request: Request) -> None:
        slot = self.free.pop()
        for pool in self.pools:
            pool[slot].copy_(pool[1])  # an ordinary tensor: what is owed to slot 1 is folded in before it is read
        self.running[slot] = request

    def _took(self, slot: int, token: int) -> None:
        request = self.running[slot]
        request.tokens.append(token)
        if len(request.tokens) == request.length:
            del self.running[slot]
            self.free.append(slot)

    def _call(self, tokens: list[int], slots: list[int]) -> list[int]:
        """One call of the full batch: entries that nobody needs step slot 0."""
        padding = [0] * (self.batch - len(slots))
        out = self.step(torch.tensor(tokens + padding), self.pools, torch.tensor(slots + padding))
        return out[: len(slots)].tolist()


# ----------------------------------------------------------------------------------------- what it gives


def main() -> int:
    """Serve with Inductor, with kvbuffer, and each request alone; exit status 1 when tokens differ."""
    args = parse_arguments()
    torch.manual_seed(0)
    model = Decoder(args.layers, args.heads, args.size).eval()
    shape = (args.slots, args.heads, args.size, args.size)
    rewritten: list[int] = []
    observers.listeners.append(lambda record: rewritten.append(len(record.rewritten)))
    tokens = {}
    with torch.no_grad():
        for name, step in {
            "eager": model,
            "Inductor": torch.compile(model),
            "kvbuffer": torch.compile(model, backend="kvbuffer", options={"flush": args.flush}),
        }.items():
            requests = draw(args.requests)
            engine = Engine(step, [torch.zeros(shape) for _ in range(args.layers)], args.batch)
            start = time.perf_counter()
            calls = engine.serve(list(requests))
            seconds = time.perf_counter() - start
            tokens[name] = [r.tokens for r in requests]
            print(f"{name:9}{calls} calls, {sum(r.length for r in requests) / seconds:7.0f} tokens a second")
        alone = [by_itself(model, request, shape) for request in draw(args.requests)]
    observers.listeners.pop()
    same = all(found == alone for found in tokens.values())
    print(f"states that kvbuffer rewrote: {max(rewritten, default=0)} of {args.layers}")
    print("each request got the tokens it gets alone" if same else "the tokens differ")
    return 0 if same else 1


def by_itself(model: Decoder, request: Request, shape: tuple[int, ...]) -> list[int]:
    """The request without any other, and without a compiler."""
    engine = Engine(model, [torch.zeros((3, *shape[1:])) for _ in model.layers], 1)
    engine.serve([request])
    return request.tokens


def draw(count: int) -> list[Request]:
    """Requests of 8 to 40 tokens."""
    g = torch.Generator().manual_seed(0)
    numbers = torch.randint(0, VOCABULARY, (count,), generator=g), torch.randint(8, 41, (count,), generator=g)
    return [Request(int(first), int(length)) for first, length in zip(*numbers, strict=True)]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default, what in (
        ("requests", 24, "requests in all"),
        ("slots", 20, "slots of the pool, two of them for padding and the prefix"),
        ("batch", 16, "requests that decode together"),
        ("layers", 2, "layers"),
        ("heads", 16, "heads of a layer"),
        ("size", 128, "keys and values of a head"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{what} ({default})")
    parser.add_argument(
        "--flush", type=lambda x: x if x == "auto" else int(x), default="auto", help='"auto" or a number'
    )
    args = parser.parse_args()
    if min(args.requests, args.batch, args.layers, args.heads, args.size) < 1 or args.slots < args.batch + 2:
        parser.error("all numbers must be at least 1, and --slots at least two more than --batch")
    return args


if __name__ == "__main__":
    sys.exit(main())
