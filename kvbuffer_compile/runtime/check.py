"""options={"check": True}: run every rewritten step beside the original graph and compare what they give."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from kvbuffer_compile.accounts.account import Account
from kvbuffer_compile.errors import StateError
from kvbuffer_compile.guard.aliases import alias
from kvbuffer_compile.guard.overlap import has_memory
from kvbuffer_compile.passes.lifted import Part
from kvbuffer_compile.passes.rewrite import Spliced
from kvbuffer_compile.process.surroundings import neutral
from kvbuffer_compile.steps import composite


def run(
    original: GraphModule,
    states: list[Spliced],
    parts: Sequence[Part],
    donated: Sequence[tuple[int, int]],
    run_step: Callable[[list[Any]], Any],
    args: list[Any],
    accounts: list[Account],
) -> Any:
    """One step both ways; StateError when an output or a state differs by more than the tolerance of its dtype.

    args: of the rewritten graph; parts: which of them are slices of others; donated: which of them are
    returned, and where.
    """
    count = sum(n.op == "placeholder" for n in original.graph.nodes)
    copies = [a.as_subclass(Tensor).clone() if isinstance(a, Tensor) else a for a in args[:count]]
    values = [*copies, *(alias(copies[part.index], part.place) for part in parts)]  # in the order of args
    owing = iter(accounts)
    current: list[tuple[int, Callable[[], Tensor]]] = []  # each state's position, and its value at the time of asking
    for state in states:
        if state.plan.variant != "recurrent":
            account = next(owing)
            values[state.index].copy_(dense(account))
            current.append((state.index, functools.partial(dense, account)))
        else:
            current.append((state.index, functools.partial(_itself, args[state.index])))
    expected = original(*copies)
    for index, position in donated:
        copies[index].copy_(expected[position])
    out = run_step(args)
    returned = {state.returned for state in states}
    rounding = max((torch.finfo(d).eps for state in states if (d := state.plan.read_dtype) is not None), default=0.0)
    stored = {position for _, position in donated}
    for i, (got, want) in enumerate(zip(out, expected, strict=True)):
        if i in stored:
            continue
        if i in returned:
            values[next(s.index for s in states if s.returned == i)] = want
        else:
            _compare(f"output {i}", got, want, rounding)
    for index, value in current:
        _compare(f"state {index}", value(), values[index], rounding)
    return out


def _itself(state: Tensor) -> Tensor:
    return state


@neutral
def dense(account: Account) -> Tensor:
    """A copy of the state with its owed rows folded in; the account itself is left as it is."""
    state = torch.empty_like(account.state)
    if has_memory(account.state):
        state.copy_(account.state)
    cursor = account.cursor.clone()
    composite.flush(account.plan, state, cursor, account.rows, account.unsettled)
    return state


def _compare(name: str, got: Any, want: Any, rounding: float) -> None:
    """rounding: of the shadows that steps read."""
    if not isinstance(want, Tensor) or not want.dtype.is_floating_point:
        return
    scale = want.abs().max().item() if want.numel() else 0.0
    error = (got.double() - want.double()).abs().max().item() if want.numel() else 0.0
    tolerance = 200 * max(torch.finfo(want.dtype).eps, rounding / 10) * max(scale, 1e-6)
    if error > tolerance:
        raise StateError(
            f"kvbuffer check: {name} differs from the original graph by {error:.3g} (allowed {tolerance:.3g})"
        )
