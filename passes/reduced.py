"""The sizes of a graph with the batch of a state replaced by two: what is checked on a small batch holds for any."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Any

import sympy
import torch
from torch import Tensor

from kvbuffer_compile.passes.labels import Size, size_of
from kvbuffer_compile.plan import Layout

BATCH = 2
SMALLEST = 7  # smaller numbers could be the index of a dim


@dataclass(frozen=True)
class Sizes:
    """Concrete sizes for those of a graph. whole: sizes that hold the batch, each with what it becomes; symbol: the
    batch where it is symbolic. By default every size is what it is, or what it was when the graph was captured."""

    whole: tuple[tuple[int, int], ...] = ()
    symbol: sympy.Symbol | None = None

    def of(self, size: Any) -> Any:
        """A concrete size."""
        if isinstance(size, torch.SymInt):
            known = size_of(size)
            return self.of(known) if isinstance(known, int) else self._symbolic(size)
        if isinstance(size, torch.SymFloat | torch.SymBool):
            return size.node.hint
        return dict(self.whole).get(size, size) if type(size) is int else size

    def _symbolic(self, size: torch.SymInt) -> int:
        node = size.node
        if self.symbol is None or self.symbol not in node.expr.free_symbols:
            return int(node.hint)
        known = getattr(node.shape_env, "backed_var_to_val", None) or node.shape_env.var_to_val  # the older name
        return int(node.expr.xreplace({**known, self.symbol: sympy.Integer(BATCH)}))


def small_batches(state: Tensor, layout: Layout, inputs: Iterable[Any]) -> list[Sizes]:
    """Sizes for a batch of two, to be tried in turn: the batch alone, and merged with dims beside it as well (which may
    hit a number that only looks like that). None when it is no larger, or cannot be told from other numbers.

    inputs: of the graph. Where the state keeps batch and heads in one dim, they tell how large the batch is.
    """
    sizes = [size_of(n) for n in state.shape]
    if not isinstance(sizes[0], int):
        larger = Sizes().of(state.shape[0]) > BATCH
        return [Sizes(symbol=sizes[0])] if isinstance(sizes[0], sympy.Symbol) and larger else []
    parts = [n for size, dim in zip(sizes, layout.dims, strict=True) for n in _parts(size, dim)]
    firsts = [size_of(x.shape[0]) for x in inputs if isinstance(x, Tensor) and x.dim()]
    alone = {n for n in firsts if isinstance(n, int)}
    batch = next((n for n in sorted(alone) if SMALLEST < n < parts[0] and parts[0] % n == 0), parts[0])
    candidates = [n for n in dict.fromkeys((parts[0], batch)) if n > SMALLEST]
    merged = [Sizes(_merged([n, parts[0] // n, *parts[1:]])) for n in candidates]
    return [*(Sizes(((n, BATCH),)) for n in candidates), *merged]


def _merged(parts: list[int]) -> tuple[tuple[int, int], ...]:
    """Every run of neighbouring dims as one size, and what it becomes when the first dim shrinks."""
    batch = parts[0]
    whole: dict[int, int] = {}
    for start in range(len(parts)):
        for stop in range(start + 1, len(parts) + 1):
            run = parts[start:stop]
            whole.setdefault(prod(run), prod(BATCH if n == batch else n for n in run))
    return tuple(whole.items())


def _parts(size: Size, dim: tuple[int | None, ...]) -> list[int]:
    """The sizes of the parts of a dim, one of which may be left open; without those that are symbolic."""
    known = prod(n for n in dim if n is not None)
    rest = size // known if isinstance(size, int) else None
    return [n for part in dim if (n := rest if part is None else part) is not None]
