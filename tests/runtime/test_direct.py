"""Ops called past the dispatcher: the same numbers and errors, and torch's own call wherever somebody listens."""

from __future__ import annotations

import gc
import sys
import threading
import time
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from kvbuffer_compile.codegen import build
from kvbuffer_compile.ir.plan import Plan
from kvbuffer_compile.native import direct
from kvbuffer_compile.steps import ops
from tests.support.programs import NAMED
from tests.support.sessions import make_plan

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler")
B, H, K, V = 3, 2, 8, 8


def plan_of(variant: str = "buffered") -> Plan:
    return make_plan(NAMED["gdn"], variant, sizes=(K, V))


def arguments(plan: Plan, lanes: tuple[int, ...] = (B, H)) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    state = torch.randn(*lanes, K, V, generator=g)
    tails = {"scalar": (), "key": (K,), "value": (V,)}
    operands = [torch.rand(*lanes, *tails[v.kind], generator=g) for v in plan.program.inputs]
    if plan.variant == "recurrent":
        return [state, *operands]
    cursor = ops.new_cursor(plan, lanes, state.device)
    cursor[1].fill_(plan.flush)
    rows = [torch.zeros(plan.row_shape(v, lanes)) for v in plan.program.logged]
    return [state, cursor, *rows, *operands]


@pytest.fixture(params=["buffered", "recurrent"])
def op(request: pytest.FixtureRequest) -> tuple[Plan, Any]:
    plan = plan_of(request.param)
    ops.use_cpp(plan)
    return plan, ops.step_op(plan)


def through_the_dispatcher(op: Any, args: list[Tensor]) -> Any:
    """The call that torch makes of an op, which `op._op` was before."""
    found, _, _ = torch._C._get_operation_overload(op._schema.name, "")
    return found(*args)


@torch.no_grad()
def test_the_same_numbers(op: tuple[Plan, Any]) -> None:
    """Over flushes, with the state and the rows written in place."""
    plan, step = op
    assert step._op.__name__ == "direct"
    ours, torchs = arguments(plan), arguments(plan)
    for _ in range(10):
        a, b = step(*ours), through_the_dispatcher(step, torchs)
        assert torch.equal(a, b) and a.stride() == b.stride() and type(a) is Tensor and a._version == b._version
    assert all(map(torch.equal, ours, torchs)) and not torch.equal(ours[0], arguments(plan)[0])


class Noted(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def test_modes_profilers_fakes_and_subclasses_see_the_op(op: tuple[Plan, Any]) -> None:
    plan, step = op
    args = arguments(plan)
    with Noted() as mode:
        step(*args)
    assert mode.seen == [str(step)]
    with torch.profiler.profile() as profiled:
        step(*args)
    assert f"kvbuffer::{plan.op_name}" in [event.key for event in profiled.key_averages()]
    with FakeTensorMode() as fakes:
        fake = step(*map(fakes.from_tensor, args))
    assert fake.shape == step(*args).shape and type(fake) is not Tensor

    class Told(Tensor):
        called: list[Any] = []

        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            cls.called.append(func)
            return super().__torch_function__(func, types, args, kwargs or {})

    step(args[0].as_subclass(Told), *args[1:])
    assert step in Told.called or any("kvbuffer" in str(f) for f in Told.called)


@torch.no_grad()
def test_keywords_and_parameters(op: tuple[Plan, Any]) -> None:
    plan, step = op
    args, named = arguments(plan), arguments(plan)
    expected = step(*args)
    names = [a.name for a in step._schema.arguments]
    assert torch.equal(step(**dict(zip(names, named, strict=True))), expected)
    args = arguments(plan)
    args[-1] = torch.nn.Parameter(args[-1])
    assert torch.equal(step(*args), expected)


def test_what_would_need_gradients_is_torchs(op: tuple[Plan, Any]) -> None:
    """Grad mode is on: autograd decides, as it does for any op without a derivative."""
    plan, step = op
    ours, torchs = arguments(plan), arguments(plan)
    ours[-1].requires_grad_()
    torchs[-1].requires_grad_()
    assert step(*ours).requires_grad == through_the_dispatcher(step, torchs).requires_grad


@torch.no_grad()
def test_errors_are_the_same(op: tuple[Plan, Any]) -> None:
    plan, step = op
    for change in (
        lambda a: a[:-1],
        lambda a: [a[0][0], *a[1:]],
        lambda a: [*a[:-1], a[-1].int()],
        lambda a: [None] * len(a),
    ):
        told = []
        for call in (lambda a: step(*a), lambda a: through_the_dispatcher(step, a)):
            with pytest.raises(Exception) as raised:
                call(change(arguments(plan)))
            told.append((raised.type, str(raised.value).split("\n")[0]))
        assert told[0] == told[1]


@torch.no_grad()
def test_nothing_is_leaked(op: tuple[Plan, Any]) -> None:
    plan, step = op
    args = arguments(plan)
    before = [sys.getrefcount(a) for a in args]
    uses = [a._use_count() for a in args]
    for _ in range(100):
        step(*args)
        with pytest.raises(RuntimeError):
            step(args[0][0], *args[1:])
    gc.collect()
    assert [sys.getrefcount(a) for a in args] == before and [a._use_count() for a in args] == uses


@torch.no_grad()
def test_other_threads_run_during_the_step_of_a_large_state() -> None:
    plan = plan_of("recurrent")
    ops.use_cpp(plan)
    step, args = ops.step_op(plan), arguments(plan, (20_000, H))
    counted, ended = 0, threading.Event()

    def count() -> None:
        nonlocal counted
        while not ended.is_set():
            counted += 1
            time.sleep(1e-4)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(100)  # a thread that waits gets its turn only where the lock is given away
    other = threading.Thread(target=count)
    try:
        other.start()
        before = counted
        for _ in range(20):
            step(*args)
        during = counted - before
    finally:
        ended.set()
        sys.setswitchinterval(interval)
        other.join()
    assert during > 0


def test_without_the_library_ops_are_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "_functions", lambda: None)
    step = ops.step_op(plan_of("recurrent"))
    before = step._op
    direct.call_directly(step, 0)
    assert step._op is before
