"""The kernels that are looked at: recurrences of real models, with the plans that benchmarks.gpu times."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from benchmarks.gpu_sides import forms, plan_of
from benchmarks.static_gpu.kernel import Kernel, compiled
from kvbuffer_compile.codegen.triton.launch import Config
from kvbuffer_compile.commands.recurrences import RECURRENCES
from kvbuffer_compile.ir.plan import Plan

NAMES = ("gdn", "kda", "mamba2", "gla", "rwkv7", "mlstm")
STATES = ("float32", "bfloat16")
VARIANTS = ("recurrent", "buffered", "verify")
FLUSH = 16
ROOM = 8  # slots beyond the flush length of a verify step
DRAFTS = 4  # its tokens
BIG = 2**25  # bytes from which on a launcher tells the L2 cache to keep nothing of a state


@dataclass(frozen=True)
class Case:
    """A step of a recurrence on a state. slots: it is a pool of slots."""

    name: str
    state: str
    variant: str
    slots: bool = False

    @property
    def plan(self) -> Plan:
        flush = 1 if self.variant == "recurrent" else FLUSH
        capacity = flush + (ROOM if self.variant == "verify" else 0)
        plan = plan_of(RECURRENCES[self.name], self.variant, getattr(torch, self.state), flush, capacity)
        return replace(plan, slots=self.slots)

    @property
    def names(self) -> tuple[str, str, str]:
        """What tells it from others in a file."""
        return self.name, self.state, self.variant + " of a pool" * self.slots

    @property
    def tokens(self) -> int:
        return DRAFTS if self.variant == "verify" else 1

    def forms(self) -> dict[str, Config | None]:
        """The kernels there are for it by name, with their launches; None for the only one, as the launcher has it."""
        if self.variant == "recurrent":
            return {self.variant: None}
        start = "verify, " if self.variant == "verify" else ""
        return {f"{start}{name}": config for name, config in forms(self.plan).items()}

    def kernel(self, batch: int, config: Config | None = None) -> Kernel:
        """Compiled once for all batches whose launches have the same constants."""
        r = RECURRENCES[self.name]
        one = r.heads * r.sizes[0] * r.sizes[1] * getattr(torch, self.state).itemsize
        known = 1 if batch == 1 else 2 if one * 2 > BIG or one * batch <= BIG else BIG // one + 1
        return _compiled(self, known, config).of_batch(known, batch)


def cases(names: tuple[str, ...], states: tuple[str, ...], variants: tuple[str, ...]) -> Iterator[Case]:
    return (Case(name, state, variant) for name in names for state in states for variant in variants)


@functools.cache
def _compiled(case: Case, batch: int, config: Config | None) -> Kernel:
    return compiled(case.plan, (batch, RECURRENCES[case.name].heads), case.tokens, config)
