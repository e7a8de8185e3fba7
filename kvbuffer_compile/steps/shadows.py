"""Shadows in plain ATen: what steps read in a state's place, and how it is made anew."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from kvbuffer_compile.ir.memory import along
from kvbuffer_compile.ir.plan import Plan
from kvbuffer_compile.ir.shadow import Shadow, scale_kind, shadow_of
from kvbuffer_compile.process.at_once import at_once


def shadow_in(plan: Plan, sides: Sequence[Tensor]) -> Shadow | None:
    """A step op's arguments for a shadow as views [N, *lanes, K, V] and [N, *lanes, K or V]; None of none."""
    kind = scale_kind(plan.program)
    if not sides or kind is None:
        return None
    values, scale = plan.layout.canonical(sides[0]), sides[1]
    return Shadow(values, scale, kind) if plan.layout.sequence else Shadow(values[None], scale[None], kind)


def in_place_of(base: Tensor, shadow: Shadow, cursor: Tensor, flushed: Tensor) -> Tensor:
    """What a step reads instead of the base [N, *lanes, K, V]. Sequences that lack a shadow are given one."""
    lacking = (shadow.scale == 0).flatten(1).any(1) & (cursor[0] >= 0) & (cursor[3] == 0) & ~flushed
    there = (shadow.scale > 0) & ~by_sequence(flushed | lacking, shadow.scale)
    read = torch.where(along(there, shadow.kind), shadow.state(base.dtype), base)
    if lacking.device.type != "cpu" or bool(lacking.any()):  # elsewhere asking would stall the queue
        at_once(*renewed(shadow, base, lacking))
    return read


def renewed(shadow: Shadow | None, state: Tensor, which: Tensor) -> list[Callable[[], object]]:
    """Writes, to be done at once, that make a shadow of `state` [N, *lanes, K, V] for the sequences in `which`."""
    if shadow is None:
        return []
    new = shadow_of(state, shadow.kind, shadow.values.dtype)
    values = torch.where(by_sequence(which, state), new.values, shadow.values)
    scale = torch.where(by_sequence(which, new.scale), new.scale, shadow.scale)
    return [partial(shadow.values.copy_, values), partial(shadow.scale.copy_, scale)]


def by_sequence(which: Tensor, like: Tensor) -> Tensor:
    """A choice of sequences, bool [N], laid along the first dim of another tensor."""
    return which.view(-1, *[1] * (like.dim() - 1))
