"""explain(fn, *args): what the backend finds in a function and what it would do, without disturbing the arguments."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from kvbuffer_compile.backend import GraphRecord, kvbuffer, observers
from kvbuffer_compile.options import Options, split
from kvbuffer_compile.report import Report, StateReport, state_report


def explain(fn: Callable[..., Any], *args: Any, options: dict[str, Any] | None = None, **kwargs: Any) -> Report:
    """Run one call of fn under the backend on copies of its arguments and report every state that was found.

    fn: a function or module. args, kwargs: what it would be called with; tensors and caches in them are copied, modules
    are not, and tensors of fn that the call writes to are put back. options: as for torch.compile.
    ValueError for an unknown option.
    """
    given = {**(options or {}), "inner": "eager"}
    ours, _ = split(given)  # bad options are reported before anything runs
    call_args, call_kwargs = _copied((args, kwargs))
    findings = Findings(ours)

    def backend(gm: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        return kvbuffer(gm, inputs, options=given)  # a backend of its own: Dynamo does not reuse graphs compiled before

    with _listening(findings.add), _restored(fn), torch.no_grad():
        torch.compile(fn, backend=backend)(*call_args, **call_kwargs)
    return findings.report(dict(options or {}))


class Findings:
    """Collects what the backend decides, graph by graph, while the graphs still carry their fake tensors."""

    def __init__(self, ours: Options) -> None:
        self.ours = ours
        self.states: list[StateReport] = []
        self.hidden = 0
        self.graphs = 0
        self.notes: list[str] = []

    def add(self, record: GraphRecord) -> None:
        self.graphs += 1
        lifted = [(found.state, state_report(found, plan, self.ours)) for found, plan in record.states]
        refused = [(r.state, state_report(r.state, r.why)) for r in record.refused if not r.hopeless]
        self.states += [replace(report, name=record.name(state)) for state, report in lifted + refused]
        self.hidden += sum(r.hopeless for r in record.refused)
        if record.why_not is not None:
            self.notes.append(record.why_not.reason)

    def report(self, options: dict[str, Any]) -> Report:
        """Everything so far; options as the user gave them."""
        return Report(tuple(self.states), self.hidden, self.graphs, options, tuple(self.notes))


def _copied(values: Any) -> Any:
    """Deep copies; modules are shared, they may be large."""
    memo: dict[int, Any] = {}

    def share(x: Any) -> None:
        if isinstance(x, torch.nn.Module):
            memo[id(x)] = x
        elif isinstance(x, list | tuple):
            for y in x:
                share(y)
        elif isinstance(x, dict):
            share(list(x.values()))

    share(values)
    return copy.deepcopy(values, memo)


@contextmanager
def _listening(listener: Callable[[GraphRecord], None]) -> Iterator[None]:
    observers.listeners.append(listener)
    try:
        yield
    finally:
        observers.listeners.remove(listener)


@contextmanager
def _restored(fn: Callable[..., Any]) -> Iterator[None]:
    """Put back the buffers of a module that the call writes to."""
    owner = fn if isinstance(fn, torch.nn.Module) else getattr(fn, "__self__", None)
    buffers = list(owner.buffers()) if isinstance(owner, torch.nn.Module) else []
    saved: list[tuple[Tensor, Tensor]] = [(b, b.detach().clone()) for b in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in saved:
                buffer.copy_(value)
