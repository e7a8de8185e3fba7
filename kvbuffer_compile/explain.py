"""explain(fn, *args): what the backend finds in a function and what it would do, without disturbing the arguments."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from kvbuffer_compile import options as option_module
from kvbuffer_compile.backend import GraphRecord, kvbuffer, observers
from kvbuffer_compile.report import Report, StateReport, state_report


def explain(fn: Callable[..., Any], *args: Any, options: dict[str, Any] | None = None, **kwargs: Any) -> Report:
    """Run one call of fn under the backend on copies of its arguments and report every state that was found.

    fn: a function or module. args, kwargs: what it would be called with; tensors and caches in them are copied, modules
    are not, and tensors of fn that the call writes to are put back. options: as for torch.compile.
    ValueError for an unknown option.
    """
    given = {**(options or {}), "inner": "eager"}
    option_module.split(given)  # bad options are reported before anything runs
    call_args, call_kwargs = _copied((args, kwargs))
    records: list[GraphRecord] = []

    def backend(gm: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        return kvbuffer(gm, inputs, options=given)  # a backend of its own: Dynamo does not reuse graphs compiled before

    with _listening(records), _restored(fn), torch.no_grad():
        torch.compile(fn, backend=backend)(*call_args, **call_kwargs)
    return report_of(records, dict(options or {}))


def report_of(records: list[GraphRecord], options: dict[str, Any]) -> Report:
    """The report of what the backend decided on a number of graphs."""
    states: list[StateReport] = []
    hidden = 0
    for record in records:
        states += [state_report(lifted, plan) for lifted, plan in record.states]
        for refused in record.refused:
            hidden += refused.hopeless
            if not refused.hopeless:
                states.append(state_report(refused.state, refused.why))
    return Report(tuple(states), hidden, len(records), options)


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
def _listening(records: list[GraphRecord]) -> Iterator[None]:
    observers.listeners.append(records.append)
    try:
        yield
    finally:
        observers.listeners.remove(records.append)


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
