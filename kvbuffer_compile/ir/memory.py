"""What a program means: the same four methods on a dense state and on a state with a log of owed ops.

Everything here works on tensors of any dtype. On int64 the arithmetic is exact (modulo 2^64, a ring), so tests prove
the algebra with no tolerance: dense(op(b)) == op(dense(b)) for Decay, Read and Update.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from kvbuffer_compile.ir.program import REDUCTIONS, Decay, Kind, Map, Program, Var, run
from kvbuffer_compile.ir.program import operands as used
from kvbuffer_compile.process.surroundings import product


def along(x: Tensor, kind: Kind) -> Tensor:
    """A value of a program broadcast against S [*lanes, K, V]."""
    if kind == "scalar":
        return x[..., None, None]
    return x[..., :, None] if kind == "key" else x[..., None, :]


def overload(name: str) -> Any:
    """The ATen overload of a Map's fn, e.g. "aten.mul.Tensor"."""
    namespace, op, variant = name.split(".")
    return getattr(getattr(getattr(torch.ops, namespace), op), variant)


def apply_map(op: Map, args: list[Any]) -> Tensor:
    """Evaluate a Map on tensors: scalars are lifted to the axis of the widest argument, reductions drop it."""
    return overload(op.fn)(*call_arguments(op, args, lambda x: x[..., None]))  # type: ignore[no-any-return]


def call_arguments(op: Map, args: list[Any], unsqueezed: Callable[[Any], Any]) -> list[Any]:
    """What the overload of a Map is called with. unsqueezed: gives a value one more dim at its end."""
    if op.fn in REDUCTIONS:
        return [args[0], [-1]]
    widens = op.out.kind != "scalar"
    return [
        unsqueezed(x) if widens and isinstance(a, Var) and a.kind == "scalar" else x
        for a, x in zip(op.args, args, strict=True)
    ]


def run_tokens(program: Program, memory: Any, operands: Sequence[Tensor], axis: int) -> list[Tensor]:
    """The outputs of a program, token after token on a dense memory; tokens are a dim of operands and outputs."""
    runs = [
        run(program, memory, {v.name: x.select(axis, t) for v, x in zip(program.inputs, operands, strict=True)})
        for t in range(operands[0].shape[axis])
    ]
    return [torch.stack([env[v.name] for env in runs], axis) for v in program.outputs]


def run_block(program: Program, memory: Dense, operands: Sequence[Tensor], axis: int) -> list[Tensor]:
    """The same where all tokens read the memory as it was before the first of them: values of all tokens at once, then
    the decays and updates of token after token. No read of the program stands behind one of these."""
    values = run(program, AtOnce(memory), dict(zip((v.name for v in program.inputs), operands, strict=True)))
    count = max(x.shape[axis] for x in operands)
    each = {n: x.expand(*(count if i == axis else s for i, s in enumerate(x.shape))) for n, x in values.items()}
    for t in range(count):
        for event in program.events:
            now = [each[v.name].select(axis, t) for v in used(event)]
            if isinstance(event, Decay):
                memory.decay(now[0], event.factor.kind)
            else:
                memory.update(now[0], now[1], (event.left.kind, event.right.kind))
    return [each[v.name] for v in program.outputs]


class Readable(Protocol):
    """Anything a contraction can be taken of."""

    def read(self, x: Tensor, kind: Kind) -> Tensor: ...


@dataclass
class Dense:
    """The state itself, [*lanes, K, V]: what the model does today, and the reference."""

    state: Tensor

    def decay(self, factor: Tensor, kind: Kind) -> None:
        self.state = self.state * along(factor, kind)

    def read(self, x: Tensor, kind: Kind) -> Tensor:
        if kind == "key":
            return product(x[..., None, :], self.state)[..., 0, :]
        return product(self.state, x[..., :, None])[..., 0]

    def read_many(self, x: Tensor, kind: Kind) -> Tensor:
        """Reads by n queries at once, [*lanes, n, K or V]."""
        return product(x, self.state if kind == "key" else self.state.transpose(-1, -2))

    def update(self, left: Tensor, right: Tensor, kinds: tuple[Kind, Kind]) -> None:
        self.state = self.state + along(left, kinds[0]) * along(right, kinds[1])

    def map(self, op: Map, args: list[Any]) -> Tensor:
        return apply_map(op, args)


class Many(Protocol):
    """A state that answers n queries of each lane at once: [*lanes, n, K] by [*lanes, n, V], or back."""

    def read_many(self, x: Tensor, kind: Kind) -> Tensor: ...


@dataclass
class AtOnce:
    """What the tokens of a block see, values with a dim of tokens behind the lanes: the state, and nothing of each
    other."""

    state: Many

    def decay(self, factor: Tensor, kind: Kind) -> None: ...

    def update(self, left: Tensor, right: Tensor, kinds: tuple[Kind, Kind]) -> None: ...

    def read(self, x: Tensor, kind: Kind) -> Tensor:
        return self.state.read_many(x, kind)

    def map(self, op: Map, args: list[Any]) -> Tensor:
        return apply_map(op, args)


@dataclass
class Zero:
    """A state that was never written: buffer-only mode reads nothing from it. `sizes` is (K, V)."""

    sizes: tuple[int, int]

    def read(self, x: Tensor, kind: Kind) -> Tensor:
        return x.new_zeros((*x.shape[:-1], self.sizes[1] if kind == "key" else self.sizes[0]))

    read_many = read


@dataclass(frozen=True)
class Fade:
    """A logged decay."""

    factor: Tensor
    kind: Kind


@dataclass(frozen=True)
class Row:
    """A logged update, both sides at full width."""

    left: Tensor
    right: Tensor


@dataclass
class Buffered:
    """A base that is only read, and the ops owed to it, oldest first. Nothing logged is ever changed again,
    so taking tokens back is cutting the log's end.

    A read walks the log backwards. Decays met on the way shrink the query (same axis, or scalar) or the
    contributions of everything older (the other axis); updates add <their row, query> times their other row.
    Only products are formed, no ratio and no exp of a sum: gates of exactly 0 or 1 and underflow are harmless.
    """

    base: Readable
    sizes: tuple[int, int]
    log: list[Fade | Row] = field(default_factory=list)

    def decay(self, factor: Tensor, kind: Kind) -> None:
        self.log.append(Fade(factor, kind))

    def update(self, left: Tensor, right: Tensor, kinds: tuple[Kind, Kind]) -> None:
        self.log.append(Row(widen(left, kinds[0], self.sizes[0]), widen(right, kinds[1], self.sizes[1])))

    def read(self, x: Tensor, kind: Kind) -> Tensor:
        total: Tensor | float = 0
        older: Tensor | float = 1  # what decays of the other axis leave of everything older
        for entry in reversed(self.log):
            if isinstance(entry, Row):
                met, free = (entry.left, entry.right) if kind == "key" else (entry.right, entry.left)
                total = total + (met * x).sum(-1, keepdim=True) * free * older
            elif entry.kind == "scalar":
                x = x * entry.factor[..., None]
            elif entry.kind == kind:
                x = x * entry.factor
            else:
                older = older * entry.factor
        return self.base.read(x, kind) * older + total

    def map(self, op: Map, args: list[Any]) -> Tensor:
        return apply_map(op, args)

    def flushed(self, base: Tensor) -> Tensor:
        """The dense state this stands for: the log replayed on `base`, [*lanes, K, V]."""
        dense = Dense(base)
        for entry in self.log:
            if isinstance(entry, Row):
                dense.update(entry.left, entry.right, ("key", "value"))
            else:
                dense.decay(entry.factor, entry.kind)
        return dense.state


def widen(x: Tensor, kind: Kind, size: int) -> Tensor:
    """One side of an update at full width: a scalar side is constant along its axis."""
    return x[..., None].expand(*x.shape, size) if kind == "scalar" else x
