"""explain(fn, *args): what the backend finds in a function and what it would do, without disturbing the arguments."""

from __future__ import annotations

import copy
import inspect
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.nn import Module
from torch.utils._pytree import tree_leaves

from kvbuffer_compile.accounts.opening import reached_by
from kvbuffer_compile.backend import GraphRecord, kvbuffer, observers
from kvbuffer_compile.integrations.functions.substitution import left_alone
from kvbuffer_compile.machine import machine_for
from kvbuffer_compile.options import Options, split
from kvbuffer_compile.passes.lifted import Lifted
from kvbuffer_compile.process.afresh import afresh
from kvbuffer_compile.report.report import Report
from kvbuffer_compile.report.state import StateReport, state_report
from kvbuffer_compile.report.whole import WholeCall, whole_call
from kvbuffer_compile.runtime.by_hand import tensors_in


def explain(fn: Callable[..., Any], *args: Any, options: dict[str, Any] | None = None, **kwargs: Any) -> Report:
    """Run one call of fn under the backend on copies of its arguments and report every state that was found.

    The report is about a call in the grad mode at hand: where it needs gradients, nothing is buffered.

    fn: a function or module. args, kwargs: what it would be called with; tensors and caches in them are copied, modules
    are not, and tensors of fn or of modules that the call writes to are put back. options: as for torch.compile.
    ValueError for an unknown option.
    """
    split(options)  # bad options are reported before anything runs
    given = {**(options or {}), "inner": "eager", "on_decline": "ignore"}
    ours, _ = split(given)
    findings = Findings(ours, _scope(fn, args, kwargs))
    call_args, call_kwargs = _copied((args, kwargs))

    # a backend of its own: Dynamo does not reuse graphs compiled before
    def backend(gm: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        told: list[GraphRecord] = []
        try:
            with observers.also(told.append), warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Error detected in")  # of autograd, which gives up: see below
                kvbuffer(gm, inputs, options=given)
        except Exception:  # the true call fails as well; what is asked for is why its states are not buffered
            if not any(why.rule == "gradients" for record in told for why in record.declined):
                raise
        return gm.forward  # nothing is owed to the caller's states, nor counted of them

    backend.rewrites_recurrences = True  # type: ignore[attr-defined]
    told = left_alone(findings.hear)
    with observers.also(findings.add), told, _restored((fn, call_args, call_kwargs)):
        torch.compile(afresh(fn), backend=backend)(*call_args, **call_kwargs)
    return findings.report(dict(options or {}))


class Findings:
    """Collects what the backend decides, graph by graph, while the graphs still carry their fake tensors."""

    def __init__(self, ours: Options, scope: dict[str, Any]) -> None:
        self.ours = ours
        self.scope = scope
        self.states: list[StateReport] = []
        self.graphs = 0
        self.notes: list[str] = []
        self.calls: list[WholeCall] = []
        self.devices: set[torch.device] = set()  # of states with a prediction

    def add(self, record: GraphRecord) -> None:
        self.graphs += 1
        seen = record.predictions
        lifted = [
            (f.state, state_report(f, plan, seen.get(f.state.name), pool=record.pools.get(f.state.name)))
            for f, plan in record.states
        ]
        lifted = [(s, _with_sources(told, f, record)) for (s, told), (f, _) in zip(lifted, record.states, strict=True)]
        refused = [(r.state, state_report(r.state, r.why, kept=r.kept)) for r in record.refused]
        found = [
            self._named(replace(report, reason=record.told(report.reason)), record.name(state))
            for state, report in lifted + refused
        ]
        self.states += [report for report in found if report.status != "kept" or report not in self.states]
        self.devices |= {f.state.meta["val"].device for f, _ in record.states if f.state.name in seen}
        whole = whole_call((report.prediction for _, report in lifted), record.call)
        self.calls += [whole] if whole and whole not in self.calls else []
        if record.why_not is not None and not record.states and record.why_not.reason not in self.notes:
            self.notes.append(record.why_not.reason)

    def hear(self, function: str, reason: str) -> None:
        """A function of a library hides a recurrence and is left as it is."""
        note = f"{function} is left as it is: {reason}"
        self.notes += [note] if note not in self.notes else []

    def _named(self, report: StateReport, name: str) -> StateReport:
        """By the user's name, and with what is to be said of the tensor that has it."""
        reason = report.reason
        shared = _reached_by(name, self.scope) if report.status == "buffered" else None
        if shared is not None:
            reason += f"; its memory is shared with {shared}: rows are folded in after every step"
        return replace(report, name=name, reason=reason)

    def report(self, options: dict[str, Any]) -> Report:
        """Everything so far; options as the user gave them."""
        states = sorted(self.states, key=lambda state: state.status == "kept")
        machines = [machine_for(device) for device in sorted(self.devices, key=str)]
        busy = [f"the speeds of this machine were measured {machine.advice}" for machine in machines if machine.busy]
        return Report(tuple(states), self.graphs, options, (*self.notes, *busy), tuple(self.calls))


def _scope(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """What the names of a call's inputs mean to its caller."""
    called = fn.forward if isinstance(fn, Module) else fn
    with suppress(TypeError, ValueError):
        scope = inspect.signature(called).bind(*args, **kwargs).arguments
        return {**scope, "self": getattr(called, "__self__", None)}
    return {}


def _with_sources(report: StateReport, lifted: Lifted, record: GraphRecord) -> StateReport:
    """With the user's names behind inputs of the program that are made of one input of the graph each."""
    lines = report.program.splitlines()
    for var, operand in zip(lifted.program.inputs, lifted.operands, strict=True):
        node = operand
        while node.op == "call_function" and len(node.all_input_nodes) == 1:
            node = node.all_input_nodes[0]
        if node.op == "placeholder":
            said = ("" if node is operand else "from ") + record.name(node)
            lines = [f"{line}  # {said}" if line.startswith(f"  input {var}:") else line for line in lines]
    return replace(report, program="\n".join(lines))


def _reached_by(name: str, scope: dict[str, Any]) -> str | None:
    try:
        found = eval(name, {"__builtins__": {}}, scope)  # an expression that Dynamo made of the call's own arguments
    except Exception:  # a name that is none: of a slice, or of a closure
        return None
    return reached_by(found) if isinstance(found, Tensor) else None


def _copied(values: Any) -> Any:
    """Deep copies; modules are shared, they may be large. Tensors that were computed with gradients are copied without
    their history."""
    memo: dict[int, Any] = {id(t): _without_history(t) for t in tensors_in(values) if t.grad_fn is not None}

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


def _without_history(tensor: Tensor) -> Tensor:
    with torch.enable_grad():
        return tensor.detach().requires_grad_().clone()  # a leaf could not be written in place


@contextmanager
def _restored(called: tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]) -> Iterator[None]:
    """Put back what the call changes besides its copied arguments: tensors of the modules and objects involved, and the
    random numbers to come."""
    fn, args, kwargs = called
    involved = [fn, getattr(fn, "__self__", None), *(x for x in tree_leaves((args, kwargs)) if isinstance(x, Module))]
    involved += [cell.cell_contents for cell in getattr(fn, "__closure__", None) or () if _is_filled(cell)]
    tensors = [t for t in tensors_in(involved) if not isinstance(t, torch.nn.Parameter) and _is_writable(t)]
    saved = [(t, t.clone(), t.grad_fn) for t in tensors]
    attributes = [(known, dict(known)) for known in _attributes(involved)]
    lists = [(x, list(x)) for known, _ in attributes for x in known.values() if type(x) is list]
    try:
        with torch.random.fork_rng():
            yield
    finally:
        for known, before in attributes:
            if known.keys() != before.keys() or any(known[name] is not value for name, value in before.items()):
                known.clear()
                known.update(before)
        for changed, items in lists:
            changed[:] = items
        for tensor, value, history in saved:
            _put_back(tensor, value, history)


def _attributes(involved: Sequence[Any]) -> Iterator[dict[str, Any]]:
    """The attributes of the modules and objects involved, and what they hold by name: a call may set them anew."""
    for x in involved:
        for instance in x.modules() if isinstance(x, Module) else [x]:
            if isinstance(getattr(instance, "__dict__", None), dict) and not isinstance(instance, types.ModuleType):
                yield vars(instance)
                yield from (value for value in list(vars(instance).values()) if type(value) is dict)


def _put_back(tensor: Tensor, value: Tensor, history: Any) -> None:
    """Values and history as they were. value: a copy that has the history itself."""
    with torch.inference_mode():  # tensors made in inference mode can be written nowhere else
        tensor.copy_(value)
    if tensor.grad_fn is not history and not tensor._is_view():
        tensor.detach_()
        if history is not None:
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
