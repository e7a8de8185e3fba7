"""Never stale: every public callable of torch, called on a state that owes rows.

The result must be that of a call on an ordinary tensor with the same values, and so must the state be afterwards;
whatever shares memory with the state must follow it through the next step.
"""

from __future__ import annotations

import functools
import itertools
import re
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kvbuffer_compile.codegen import build
from tests.support import daily
from tests.support.callables import SHAPES, STATE, Call, Public, first_call, overridable, same, values, variants
from tests.support.callables_by_hand import ARGUMENTS, BY_HAND, NEVER
from tests.support.equality import equal
from tests.support.op_samples import samples
from tests.support.owing import owed

ROOT = Path(__file__).resolve().parents[2]

SOLVED = 1e-4  # what badly conditioned solves may differ by from call to call, of their largest value
TARGET = "cpp" if build.compiler() else "aten"
ROWS = torch.tensor([[1.0, -2.0, 0.5, 2.0], [0.5, 1.0, -1.0, -3.0]])  # what two steps append: keys, and values
COLUMNS = torch.tensor([[1.0, 0.25, -1.0, 3.0], [-2.0, 1.0, 1.0, 0.5]])


# --------------------------------------------------------------------------------------------- owed states


def gla(state: Tensor, q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    new = state * gate[..., None] + k[..., None] * v[..., None, :]
    state.copy_(new)
    return (q[..., None] * new).sum(-2)


class States:
    """Makes states that hold `values(shape)` but owe two rows of it, for every shape with one compiled step."""

    def __init__(self) -> None:
        options = {"flush": 8, "inner": "eager", "target": TARGET}
        self.compiled = torch.compile(gla, backend="kvbuffer", options=options, dynamic=False)

    def make(self, shape: tuple[int, ...]) -> Tensor:
        state = values(shape)
        for row, column in zip(ROWS, COLUMNS, strict=True):
            state -= row[:, None] * column
        for t in range(len(ROWS)):
            self.step(state, t)
        assert owed(state) > 0, f"a state of shape {shape} owes nothing: no call on it would prove a thing"
        return state

    def step(self, state: Tensor, t: int, step: Callable[..., Tensor] | None = None) -> None:
        lanes = state.shape[:-2]
        k, v = ROWS[t].expand(*lanes, 4).contiguous(), COLUMNS[t].expand(*lanes, 4).contiguous()
        with torch.no_grad():
            (step or self.compiled)(state, k, k, v, torch.ones(*lanes, 4))


@pytest.fixture
def states() -> States:
    return States()


# ------------------------------------------------------------------------------------------------- judging


def shares(x: Any, state: Tensor) -> bool:
    """Whether a result lies in the memory of an ordinary tensor."""
    if isinstance(x, Tensor):
        return x.layout is torch.strided and x.untyped_storage().data_ptr() == state.untyped_storage().data_ptr()
    if isinstance(x, np.ndarray):
        return np.shares_memory(x, state.numpy())
    return isinstance(x, list | tuple) and any(shares(y, state) for y in x)


# What tells nothing about values, or what nobody wrote yet.
UNKNOWN = re.compile(
    r"empty|\.new\(|resize|__hash__|data_ptr|_cdata|_version|grad_fn|share_memory|set_$|__(reduce|reduce_ex|dir)__|"
    r"hash_tensor|rename|names|_use_count|untyped_storage|\.storage$|_typed_storage|dlpack_device"
)


def probe(call: Call, states: States) -> list[str]:
    """What is wrong with a call on a state that owes rows: "result", "state", "held", "raises"; nothing if right."""
    twin, state = values(call.shape), states.make(call.shape)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        want = call(twin)
        try:
            got = call(state)
        except Exception as e:
            return [f"raises {type(e).__name__}: {e}"[:100]]
        wrong = [] if UNKNOWN.search(call.name) or equal(got, want, SOLVED) else ["result"]
        if not equal(state, twin) and not UNKNOWN.search(call.name):
            return [*wrong, "state"]
        return wrong + (["held"] if shares(want, twin) and not _follows(states, got, want, state, twin) else [])


def _follows(states: States, got: Any, want: Any, state: Tensor, twin: Tensor) -> bool:
    """Whether what lies in a state's memory is right after one more step."""
    if state.shape not in SHAPES or not twin.is_contiguous():
        return True  # it was turned or resized: no step takes it any more
    states.step(state, 0)
    states.step(twin, 0, gla)
    return equal(got, want, SOLVED) and equal(state, twin)


# ---------------------------------------------------------------------------------------------- the callables

_never = re.compile("|".join(NEVER.values()))


@functools.cache
def callables() -> list[Public]:
    return [p for p in overridable() if not _never.search(p.name)]


def call_of(public: Public) -> Call | None:
    last = public.name.rsplit(".", 1)[-1]
    given = ARGUMENTS.get(public.name) or ARGUMENTS.get(last if last.endswith("__") else last.rstrip("_"))
    if given:
        call = Call(public.name, public.func, given.shape, given.args, given.kwargs)
        return call if call.works() else None
    return first_call(public.name, public.func, public.params) if public.params else None


# ----------------------------------------------------------------------------------- inside of other graphs


def _graph(call: Call) -> Callable[[Tensor], Any]:
    """The call as a function with a code object of its own, so that no cache of graphs is shared with another call."""
    args = [_marked(a, call.shape) for a in call.args]
    kwargs = {k: _marked(a, call.shape) for k, a in call.kwargs.items()}
    func = call.func

    def graph(state: Tensor) -> Any:
        given = [state if a is None else [state, state] if a is all else a[0] for a in args]
        return func(*given, **{k: state if a is None else a[0] for k, a in kwargs.items()})

    return types.FunctionType(graph.__code__.replace(), graph.__globals__, "graph", None, graph.__closure__)


def _marked(arg: Any, shape: tuple[int, ...]) -> Any:
    """None for the state, all for a list of it, anything else in a tuple."""
    return None if arg is STATE else all if isinstance(arg, list) else (arg(shape),)


def probe_graph(call: Call, states: States) -> list[str]:
    """The same of a graph of another backend that makes the call; "breaks" when only the state's class breaks it."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        twin = values(call.shape)
        try:
            want, whole = _compiled(call, twin, lambda: values(call.shape))
        except Exception:
            return []  # no graph of an ordinary tensor either
        state = states.make(call.shape)
        try:
            got, unbroken = _compiled(call, state, lambda: states.make(call.shape))
        except Exception as e:
            return [f"raises {type(e).__name__}: {e}"[:100]]
        wrong = ["breaks"] if whole and not unbroken else []
        if UNKNOWN.search(call.name) or not whole:
            return wrong
        wrong += [] if equal(got, want, SOLVED) else ["result"]
        return wrong + ([] if equal(state, twin) or not unbroken else ["state"])


def _compiled(call: Call, state: Tensor, again: Callable[[], Tensor]) -> tuple[Any, bool]:
    """What a graph makes of a state, and whether it is one graph; another state is taken for the second attempt."""
    for whole, given in ((True, lambda: state), (False, again)):
        torch.manual_seed(0)
        try:
            return torch.compile(_graph(call), backend="eager", fullgraph=whole)(given()), whole
        except Exception:
            if not whole:
                raise
    raise AssertionError


# -------------------------------------------------------------------------------------------------- the tests

PARTS = 2
SOME = 8
# What the README names among its limits, by the words it does so with: no call asks the class of a tensor there.
LIMITS = {
    "torch.utils.dlpack.to_dlpack": "torch.utils.dlpack.to_dlpack",
    "torch.func.linearize": "torch.func.linearize",
    "torch.utils.swap_tensors": "torch.utils.swap_tensors",
}


def calls(part: int, parts: int) -> Iterator[tuple[Public, Call]]:
    for public in callables()[part::parts]:
        call = call_of(public)
        assert call is not None, f"no arguments were found for {public.name}{public.params}: give it some by hand"
        yield public, call


def tells(call: Call) -> bool:
    """Whether a call on the memory of a state without what it owes has another result."""
    stale = values(call.shape)
    for row, column in zip(ROWS, COLUMNS, strict=True):
        stale -= row[:, None] * column
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            return not equal(call(stale), call(values(call.shape)), SOLVED)
        except Exception:  # no matrix to be inverted any more
            return True


@pytest.mark.parametrize(("part", "moved"), [daily.row((n, m), not m) for n in range(PARTS) for m in (0, 1)])
def test_every_callable_sees_the_true_value(part: int, moved: int, states: States) -> None:
    """Every callable as it is called first, some with the state elsewhere among the arguments; all these at night."""
    wrong, made, telling = {}, 0, 0
    for n, (public, first) in enumerate(calls(part, PARTS)):
        for call in (first, *(variants(first, public.params) if moved or n % SOME == 0 else ())):
            made, telling = made + 1, telling + tells(call)
            if problems := probe(call, states):
                wrong[call.name] = problems
    least = (2000 if moved else 1000) / PARTS
    assert made > least and telling > 0.6 * made, f"{made} calls, of which {telling} can tell a stale state"
    assert not wrong


def test_what_asks_no_class_is_seen_or_named(states: States) -> None:
    wrong = {name: found for name, func in BY_HAND.items() if (found := probe(Call(name, func, SHAPES[0]), states))}
    assert wrong.keys() == LIMITS.keys(), wrong


def test_the_readme_names_the_limits() -> None:
    limits = (ROOT / "README.md").read_text(encoding="utf-8").split("## Limits")[1].split("\n## ")[0]
    assert not [name for name, words in LIMITS.items() if words not in limits]


def _in_graphs(found: Iterator[Call], states: States) -> dict[str, list[str]]:
    wrong = {}
    for call in found:
        if problems := probe_graph(call, states):
            wrong[call.name] = problems
    return wrong


def test_some_callables_in_graphs_of_another_backend(states: States) -> None:
    """Every 100th, and what hides a state in a list or behind a keyword."""
    hidden = [
        Call("keyword", torch.sum, SHAPES[0], (), {"input": STATE}),
        Call("list", torch.stack, SHAPES[0], ([STATE, STATE],)),
    ]
    attention = Call(
        "attention", torch.nn.functional.scaled_dot_product_attention, SHAPES[0], (same,), {"key": STATE, "value": same}
    )
    some = (call_of(p) for p in callables()[::100])
    assert not _in_graphs((c for c in (*some, *hidden, attention) if c), states)


@pytest.mark.nightly
@pytest.mark.parametrize("part", range(12))
def test_every_callable_in_graphs_of_another_backend(part: int, states: States) -> None:
    found = (v for p, c in calls(part, 12) for v in (c, *variants(c, p.params)))
    assert not _in_graphs(found, states)


@pytest.mark.nightly
def test_calls_by_hand_in_graphs_of_another_backend(states: States) -> None:
    found = (Call(name, func, SHAPES[0]) for name, func in BY_HAND.items() if name not in LIMITS)
    assert not _in_graphs(found, states)


@pytest.mark.nightly
@pytest.mark.parametrize("part", range(4))
def test_samples_of_operators(part: int, states: States) -> None:
    """The arguments with which torch tests its own operators, wherever a state fits into them."""
    wrong, made = {}, 0
    for call in itertools.islice(samples(), part, None, 4):
        made += 1
        if problems := probe(call, states):
            wrong[call.name] = problems
    assert made > 300 and not wrong


# The checks above must be able to fail.


def test_a_state_that_is_not_settled_is_found(states: States, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvbuffer_compile.steps.composite.flush", lambda *args: None)
    wrong = [probe(Call(name, func, SHAPES[0], args), states) for name, func, args in MISSED]
    assert all("result" in w or "state" in w for w in wrong), wrong


MISSED: list[tuple[str, Callable[..., Any], tuple[Any, ...]]] = [
    ("read", torch.neg, (STATE,)),
    ("in a list", torch.stack, ([STATE, STATE],)),
    ("written", Tensor.add_, (STATE, same)),
    ("given as another", torch.add, (same, STATE)),
    ("tolist", Tensor.tolist, (STATE,)),
]
