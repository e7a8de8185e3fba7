"""Tokens one after another on a stored state that is read ahead, once for all of them.

What no read goes into is known before the first token: keys, queries, gates, whatever is computed from them. A run of
the program on all tokens at once finds these values, and the queries among them; one product with the state serves all
of those. Then the tokens follow each other, each of them a row or more to those behind it.

Here tokens are a dim of values and operands: the one behind the lanes, at `axis`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kvbuffer_compile.ir.memory import AtOnce, Many, apply_map, widen
from kvbuffer_compile.ir.program import Kind, Map, Program, Var, run
from kvbuffer_compile.process.surroundings import product

OTHER: dict[Kind, Kind] = {"key": "value", "value": "key"}


def run_ahead(
    program: Program,
    stored: Many,
    room: tuple[Tensor, Tensor],
    inputs: Mapping[str, Tensor],
    axis: int,
    wanted: Iterable[Var],
) -> dict[Var, Tensor]:
    """The wanted values for every token. room: zeros [*lanes, rows of all tokens, K] and [..., V], to work in."""
    count = max(x.shape[axis] for x in inputs.values())
    sight = Sight()
    known = run(program, sight, {n: expanded(x, axis, count) for n, x in inputs.items()})
    by_token = {n: x.unbind(axis) for n, x in known.items() if x is not None}
    ahead = [None if x is None else x.unbind(axis) for x in sight.ahead(stored, axis, count)]
    memory = Tokens(stored, *room, by_token, ahead)
    runs = [memory.run(program, t) for t in range(count)]
    return {v: x if (x := known[v.name]) is not None else torch.stack([r[v.name] for r in runs], axis) for v in wanted}


def run_at_once(
    program: Program, stored: Many, inputs: Mapping[str, Tensor], axis: int, wanted: Iterable[Var]
) -> dict[Var, Tensor]:
    """The wanted values for every token of a block, which sees what is stored and nothing of the others."""
    count = max(x.shape[axis] for x in inputs.values())
    env = run(program, AtOnce(stored), {n: expanded(x, axis, count) for n, x in inputs.items()})
    return {v: env[v.name] for v in wanted}


def expanded(x: Tensor, dim: int, size: int) -> Tensor:
    """The same values along a dim that may have had size 1."""
    return x.expand(*(size if i == dim else n for i, n in enumerate(x.shape)))


def common_lanes(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The same rows [*lanes, n, K or V] with common lane sizes (a key shared by a group has size 1 there)."""
    given = list(tensors)
    lanes = torch.broadcast_shapes(*(t.shape[:-2] for t in given))
    return [t.expand(*lanes, *t.shape[-2:]) for t in given]


Fades = dict[Kind, Tensor]


def fade(fades: Fades, kind: Kind, factor: Tensor) -> None:
    """One more decay in the products of each kind."""
    fades[kind] = fades[kind] * factor if kind in fades else factor


@dataclass
class Sight:
    """A memory that is never read: what depends on a read is None. Notes each query, and the decays before it."""

    fades: Fades = field(default_factory=dict)
    queries: list[tuple[Tensor | None, Kind, Fades]] = field(default_factory=list)

    def decay(self, factor: Tensor | None, kind: Kind) -> None:
        assert factor is not None, "no decay depends on a read"
        fade(self.fades, kind, factor)

    def read(self, x: Tensor | None, kind: Kind) -> None:
        self.queries.append((x, kind, dict(self.fades)))

    def update(self, left: Tensor | None, right: Tensor | None, kinds: tuple[Kind, Kind]) -> None:
        """Rows of the step itself are no matter of the stored state."""

    def map(self, op: Map, args: list[Any]) -> Tensor | None:
        return None if any(a is None for a in args) else apply_map(op, args)

    def ahead(self, stored: Many, axis: int, count: int) -> list[Tensor | None]:
        """For each query what the stored state adds to its read, for every token; None where it is not known."""
        for _, _, fades in self.queries if count > 1 else ():
            for kind, gate in self.fades.items():
                fade(fades, kind, _before(gate, axis))
        out: list[Tensor | None] = [None] * len(self.queries)
        for kind in OTHER:
            at = [i for i, (x, k, _) in enumerate(self.queries) if k == kind and x is not None]
            if at:
                queries = common_lanes(_faded(self.queries[i][0], self.queries[i][2], kind) for i in at)
                parts = stored.read_many(torch.cat(queries, axis), kind).split(count, axis)
                for i, part in zip(at, parts, strict=True):
                    out[i] = _unfaded(part, self.queries[i][2], kind)
        return out


def _before(gate: Tensor, axis: int) -> Tensor:
    """The product of a gate over all tokens before each."""
    running = gate.cumprod(axis).narrow(axis, 0, gate.shape[axis] - 1)
    return torch.cat([torch.ones_like(gate.narrow(axis, 0, 1)), running], axis)


def _faded(x: Tensor | None, fades: Fades, kind: Kind) -> Tensor:
    """A query times the decays of its own axis."""
    assert x is not None
    return x * fades[kind] if kind in fades else x


def _unfaded(read: Tensor, fades: Fades, kind: Kind) -> Tensor:
    """What the other decays leave of a read."""
    read = read * fades["scalar"][..., None] if "scalar" in fades else read
    return read * fades[OTHER[kind]] if OTHER[kind] in fades else read


class Tokens:
    """The memory of the second run: the stored state, and the rows of the tokens so far, decayed to now.

    known: by name, token by token, the values that no read goes into. ahead: for each read of the program, token by
    token, the stored state's part; None for a query that another read goes into.
    """

    def __init__(
        self,
        stored: Many,
        left: Tensor,
        right: Tensor,
        known: Mapping[str, Sequence[Tensor]],
        ahead: Sequence[Sequence[Tensor] | None],
    ) -> None:
        self.stored, self.left, self.right, self.known, self.ahead = stored, left, right, known, ahead
        self.late = any(x is None for x in ahead)
        self.rows = 0
        self.fades: Fades = {}
        self.token = self.next_read = 0

    def run(self, program: Program, token: int) -> dict[str, Tensor]:
        """One token; all its values."""
        self.token, self.next_read = token, 0
        return run(program, self, {v.name: self.known[v.name][token] for v in program.inputs})

    def decay(self, factor: Tensor, kind: Kind) -> None:
        if self.late:
            fade(self.fades, kind, factor)
        if self.rows:
            side = self.left if kind == "key" else self.right
            side[..., : self.rows, :] *= factor[..., None, None] if kind == "scalar" else factor[..., None, :]

    def update(self, left: Tensor, right: Tensor, kinds: tuple[Kind, Kind]) -> None:
        self.left[..., self.rows, :] = widen(left, kinds[0], self.left.shape[-1])
        self.right[..., self.rows, :] = widen(right, kinds[1], self.right.shape[-1])
        self.rows += 1

    def read(self, x: Tensor, kind: Kind) -> Tensor:
        found = self.ahead[self.next_read]
        self.next_read += 1
        out = self._late(x, kind) if found is None else found[self.token]
        if not self.rows:
            return out
        left, right = self.left[..., : self.rows, :], self.right[..., : self.rows, :]
        met, free = (left, right) if kind == "key" else (right, left)
        return out + product(product(x[..., None, :], met.transpose(-1, -2)), free)[..., 0, :]

    def _late(self, x: Tensor, kind: Kind) -> Tensor:
        """A read by a query that another read goes into."""
        part = self.stored.read_many(_faded(x, self.fades, kind)[..., None, :], kind)[..., 0, :]
        return _unfaded(part, self.fades, kind)

    def map(self, op: Map, args: list[Any]) -> Tensor:
        known = self.known.get(op.out.name)
        return apply_map(op, args) if known is None else known[self.token]
