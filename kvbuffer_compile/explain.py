"""explain(fn, *args): what the backend finds in a function and what it would do, without disturbing the arguments."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.nn import Module
from torch.utils._pytree import tree_leaves

from kvbuffer_compile.afresh import afresh
from kvbuffer_compile.backend import GraphRecord, kvbuffer, observers
from kvbuffer_compile.options import Options, split
from kvbuffer_compile.report import Report, StateReport, state_report
from kvbuffer_compile.runtime import tensors_in


def explain(fn: Callable[..., Any], *args: Any, options: dict[str, Any] | None = None, **kwargs: Any) -> Report:
    """Run one call of fn under the backend on copies of its arguments and report every state that was found.

    fn: a function or module. args, kwargs: what it would be called with; tensors and caches in them are copied, modules
    are not, and tensors of fn or of modules that the call writes to are put back. options: as for torch.compile.
    ValueError for an unknown option.
    """
    given = {**(options or {}), "inner": "eager"}
    ours, _ = split(given)  # bad options are reported before anything runs
    call_args, call_kwargs = _copied((args, kwargs))
    findings = Findings(ours)

    def backend(gm: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        return kvbuffer(gm, inputs, options=given)  # a backend of its own: Dynamo does not reuse graphs compiled before

    backend.rewrites_recurrences = True  # type: ignore[attr-defined]
    with observers.also(findings.add), _restored((fn, call_args, call_kwargs)), torch.no_grad():
        torch.compile(afresh(fn), backend=backend)(*call_args, **call_kwargs)
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
def _restored(called: tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]) -> Iterator[None]:
    """Put back what the call changes besides its copied arguments: tensors of the modules and objects involved, and the
    random numbers to come."""
    fn, args, kwargs = called
    involved = [fn, getattr(fn, "__self__", None), *(x for x in tree_leaves((args, kwargs)) if isinstance(x, Module))]
    involved += [cell.cell_contents for cell in getattr(fn, "__closure__", None) or () if _is_filled(cell)]
    tensors = [t for t in tensors_in(involved) if not isinstance(t, torch.nn.Parameter) and _is_writable(t)]
    saved: list[tuple[Tensor, Tensor]] = [(t, t.detach().clone()) for t in tensors]
    try:
        with torch.random.fork_rng():
            yield
    finally:
        with torch.inference_mode():  # tensors made in inference mode can be written nowhere else
            for tensor, value in saved:
                tensor.copy_(value)


def _is_writable(tensor: Tensor) -> bool:
    """Expanded tensors are not."""
    return tensor.layout is torch.strided and all(
        s or n < 2 for s, n in zip(tensor.stride(), tensor.shape, strict=True)
    )


def _is_filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False
