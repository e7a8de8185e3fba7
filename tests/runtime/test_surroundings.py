"""Whatever a caller has set around a call of ours, states and outputs are what they are without it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from kvbuffer_compile import accept, draft_tree, materialize, rollback
from kvbuffer_compile.codegen import build
from kvbuffer_compile.ir.memory import Dense
from kvbuffer_compile.ir.plan import Plan
from kvbuffer_compile.machine import measure
from kvbuffer_compile.process import surroundings
from kvbuffer_compile.process.surroundings import neutral, product
from kvbuffer_compile.runtime import by_hand
from kvbuffer_compile.runtime.check import dense
from kvbuffer_compile.steps import ops, timing
from tests.lift.test_sequence import H, K, V, grouped_delta_rule
from tests.lift.test_sequence import draw as draw_tokens
from tests.runtime.test_runtime import Pair
from tests.runtime.test_runtime import draw as draw_one
from tests.support.machines import CPU
from tests.support.oracle import check
from tests.support.programs import NAMED
from tests.support.sessions import LANES, make_plan

TARGETS = ["aten", *(["cpp"] if build.compiler() else [])]

# ---------------------------------------------------------------------------------------------- what may be set


class Functions(TorchFunctionMode):
    """Halves what every call but that of a step gives."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _halved(func, func(*args, **(kwargs or {})))


class Calls(TorchDispatchMode):
    """The same below autograd."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _halved(func, func(*args, **(kwargs or {})))


def _halved(func: Any, out: Any) -> Any:
    halves = isinstance(out, Tensor) and out.dtype.is_floating_point and "kvbuffer" not in str(func)
    return out / 2 if halves else out


@contextmanager
def setting(change: Callable[[Any], Any], value: Any, usual: Any) -> Iterator[None]:
    change(value)
    try:
        yield
    finally:
        change(usual)


def default_dtype(dtype: torch.dtype) -> AbstractContextManager[Any]:
    return setting(torch.set_default_dtype, dtype, torch.float32)


def precision(name: str) -> AbstractContextManager[Any]:
    return setting(torch.set_float32_matmul_precision, name, "highest")


MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast off": lambda: torch.autocast("cpu", enabled=False),
    "grad": torch.enable_grad,
    "inference": torch.inference_mode,
    "anomaly": lambda: torch.autograd.detect_anomaly(check_nan=False),
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "another device": lambda: torch.device("meta"),
    "deterministic": lambda: setting(torch.use_deterministic_algorithms, True, False),
    "denormals": lambda: setting(torch.set_flush_denormal, True, False),
    "precision high": lambda: precision("high"),
    "precision medium": lambda: precision("medium"),
    "two threads": lambda: setting(torch.set_num_threads, 2, 1),
    "function mode": Functions,
    "dispatch mode": Calls,
    "python dispatcher": enable_python_dispatcher,
}


def within(name: str, act: Callable[[], Any]) -> None:
    with MODES[name]():
        act()


def inside(transform: Callable[..., Any]) -> Callable[[Callable[[], Any]], None]:
    """An act while a transform runs a function."""

    def run(act: Callable[[], Any]) -> None:
        transform(lambda x: (act(), (x * x).sum())[1], torch.ones(2, 3))

    return run


def fake(act: Callable[[], Any]) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        act()


TRANSFORMS: dict[str, Callable[[Callable[[], Any]], None]] = {
    "vmap": inside(lambda f, x: torch.func.vmap(f)(x)),
    "grad transform": inside(lambda f, x: torch.func.grad(f)(x)),
    "jvp": inside(lambda f, x: torch.func.jvp(f, (x,), (x,))),
    "functionalize": inside(lambda f, x: torch.func.functionalize(f)(x)),
    "make_fx": inside(lambda f, x: make_fx(f)(x)),
    "jit.trace": inside(lambda f, x: torch.jit.trace(f, (x,), check_trace=False)),
    "fake tensors": fake,
}

ROUNDED = {"precision high", "precision medium", "two threads"}  # sums may be taken in another order


def same(name: str, got: Tensor, plain: Tensor, exact: Tensor, what: str) -> None:
    """Bit for bit, or by the oracle where rounding may differ."""
    assert got.dtype == plain.dtype and got.device == plain.device
    if name in ROUNDED:
        check(got, plain, exact, what)
    else:
        assert torch.equal(got, plain), what


# ----------------------------------------------------------------------------------------------------- step ops


class Steps:
    """A step op called a few times on a state of one dtype, with a flush among them."""

    def __init__(self, plan: Plan, seed: int = 0) -> None:
        self.plan, lanes = plan, tuple(LANES[x] for x in plan.program.lanes)
        g = torch.Generator().manual_seed(seed)
        tails = {"scalar": (), "key": plan.sizes[:1], "value": plan.sizes[1:]}
        tokens = (3,) if plan.several else ()
        dtype = plan.compute
        self.inputs = [
            [
                torch.rand(*lanes, *tokens, *tails[v.kind], generator=g, dtype=torch.float64).to(dtype)
                for v in plan.program.inputs
            ]
            for _ in range(6)
        ]
        self.state = torch.rand(*lanes, *plan.sizes, generator=g, dtype=torch.float64).to(dtype)
        self.cursor = torch.zeros(4, lanes[0], dtype=torch.int32)
        self.cursor[1] = plan.flush
        self.rows = [torch.full(plan.row_shape(v, lanes), torch.nan, dtype=dtype) for v in plan.program.logged]
        self.outs: list[Tensor] = []

    def run(self) -> None:
        plan = self.plan
        side = [] if plan.variant == "recurrent" else [self.cursor, *self.rows]
        side += [PARENTS] * (plan.variant == "tree") + [SLOTS] * plan.slots
        op = ops.step_op(plan)
        for x in self.inputs:
            found = op(self.state, *side, *x)
            self.outs += [found] if isinstance(found, Tensor) else found


PARENTS, SLOTS = torch.tensor([[-1, 0, 0]], dtype=torch.int32), torch.tensor([2, 0, 1])
VARIANTS = [("recurrent", False), ("buffered", False), ("verify", False), ("tree", False), ("recurrent", True),
            ("buffered", True)]  # fmt: skip


def ran(plan: Plan, double: bool = False) -> Steps:
    dtype = torch.float64 if double else torch.float32
    plan = replace(plan, state_dtype=dtype, row_dtypes=(dtype,) * len(plan.row_dtypes), compute=dtype)
    return Steps(plan)


@pytest.mark.parametrize(("variant", "pool"), VARIANTS)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("mode", MODES)
def test_steps(mode: str, target: str, variant: str, pool: bool) -> None:
    sizes = (16, 24)
    plan = replace(make_plan(NAMED["gdn"], variant, sizes, flush=4, capacity=8), target=target, slots=pool)
    if target == "cpp":
        build.load(plan)
    runs = [ran(plan), ran(plan), ran(replace(plan, target="aten"), double=True)]
    within(mode, runs[0].run)
    runs[1].run()
    runs[2].run()
    for i, (got, plain, exact) in enumerate(zip(*(r.outs for r in runs), strict=True)):
        same(mode, got, plain, exact, f"output {i}")
    same(mode, *(r.state for r in runs), "state")
    assert torch.equal(runs[0].cursor, runs[1].cursor)


# -------------------------------------------------------------------------------------- whoever reads a state


def owing() -> list[Pair]:
    """Twice the same state with the same rows owed; fewer than those at which the second one first flushes."""
    pairs: list[Pair] = []
    for _ in range(2):
        torch.manual_seed(0)
        pairs.append(Pair())
        pairs[-1].compiled = pairs[0].compiled
        pairs[-1].run(1)
        for account in by_hand.accounts_of(pairs[-1].state):
            account.hold()  # whatever other states there are
        pairs[-1].run(1)
    assert [p.owed for p in pairs] == [2, 2]
    return pairs


ACTS: dict[str, Callable[[Pair], Any]] = {
    "materialize": lambda pair: materialize(pair.state),
    "read": lambda pair: pair.state.clone(),
    "rollback": lambda pair: rollback(pair.state, 1),
    "rollback each": lambda pair: rollback(pair.state, [1, 0, 2]),
    "dense": lambda pair: dense(by_hand.accounts_of(pair.state)[0]),
}


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("where", [*MODES, *TRANSFORMS])
def test_reads_and_rollbacks(where: str, act: str) -> None:
    if act == "read" and where in ("fake tensors", "make_fx", "functionalize", "python dispatcher", "another device"):
        pytest.skip("what is read there is the tracer's affair")
    pairs = owing()
    run = TRANSFORMS.get(where, lambda f: within(where, f))
    run(lambda: ACTS[act](pairs[0]))
    ACTS[act](pairs[1])
    got, plain = (p.state.clone().as_subclass(Tensor) for p in pairs)
    assert torch.equal(got, plain) or where in ROUNDED
    if "rollback" not in act:
        check(got, pairs[0].eager, pairs[0].exact, "state")


@pytest.mark.parametrize("mode", [m for m in MODES if m not in ("grad", "anomaly", "function mode", "dispatch mode")])
def test_a_compiled_step(mode: str) -> None:
    """Compiled there as well: validation and measurement happen under the same settings."""
    pair = Pair()
    inputs = [draw_one() for _ in range(6)]
    with torch.no_grad(), MODES[mode]():
        for x in inputs:
            pair.compiled(pair.state, *x)
    assert by_hand.accounts_of(pair.state), "the step was rewritten"
    for state in (pair.eager, pair.exact):
        for x in inputs:
            pair.fn(state, *(y.to(state.dtype) for y in x))
    pair.check(pair.state.clone())


@pytest.mark.parametrize("mode", ["autocast", "inference", "another device", "float64", "deterministic"])
def test_trees(mode: str) -> None:
    """Verified outside, accepted inside."""
    got = []
    for where in (MODES[mode], nullcontext):
        torch._dynamo.reset()
        g = torch.Generator().manual_seed(0)
        options = {"inner": "eager", "target": "aten", "flush": 4, "capacity": 12}
        compiled = torch.compile(grouped_delta_rule, backend="kvbuffer", fullgraph=True, options=options)
        state = torch.randn(2, H, K, V, generator=g)
        inputs = draw_tokens(4, g)
        with torch.no_grad(), draft_tree([-1, 0, 0, 2]):
            compiled(state, *inputs)
        with where():
            accept(state, [0, 2, 3])
            materialize(state)
        got.append(state.clone().as_subclass(Tensor))
    assert torch.equal(*got)


# ------------------------------------------------------------------------------------------------ the parts of it


@pytest.mark.parametrize("where", [*(m for m in MODES if "precision" not in m), *TRANSFORMS])
def test_neutral(where: str) -> None:
    """A product, something written, something made: inside of everything that can be set for one thread."""
    a, b, state = torch.randn(4, 40, 40), torch.randn(4, 40, 40), torch.zeros(3)
    expected, got = a @ b, []

    @neutral
    def ours() -> None:
        state.add_(1)
        got.append((product(a, b), torch.ones(3, dtype=torch.float32)))

    run = TRANSFORMS.get(where, lambda f: within(where, f))
    run(ours)
    ((found, made),) = got
    assert torch.equal(found, expected) and torch.equal(made, torch.ones(3)) and state.tolist() == [1, 1, 1]
    assert type(found) is Tensor and not found.requires_grad


def test_states_of_inference_mode_are_written_outside() -> None:
    with torch.inference_mode():
        state = torch.zeros(3)
    neutral(lambda: state.add_(torch.ones(3)))()
    assert state.tolist() == [1, 1, 1]


def test_neutral_ends_with_its_function() -> None:
    def fails() -> None:
        raise KeyError

    with torch.autocast("cpu", torch.bfloat16), pytest.raises(KeyError):
        neutral(fails)()
        raise AssertionError
    with torch.autocast("cpu", torch.bfloat16):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16


@pytest.mark.parametrize("setting", ["tf32", "bf16"])
def test_products_are_exact_whatever_precision_is_set(setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Told by the setting alone, as not every machine has products of less precision."""
    asked = []
    monkeypatch.setattr(surroundings, "_precision", lambda *key: asked.append(key) or setting)
    a, b = torch.randn(3, 40, 60), torch.randn(3, 60, 50)
    assert torch.equal(product(a, b), (a.double() @ b.double()).float())
    assert torch.equal(Dense(b).read_many(a, "key"), product(a, b))
    assert asked == [("mkldnn", "matmul")] * 3
    exact = torch.randint(-3, 4, (3, 4, 4))
    assert torch.equal(product(exact, exact), exact @ exact)


def test_what_is_asked_follows_the_setting() -> None:
    """The call that `product` asks is not a public one."""
    for name, expected in (("highest", "ieee"), ("high", "tf32"), ("medium", "bf16")):
        with precision(name):
            assert surroundings._precision("mkldnn", "matmul") == expected
            assert surroundings._precision("cuda", "matmul") == ("ieee" if name == "highest" else "tf32")


MEASURED_IN = ["autocast", "float64", "another device", "inference", "deterministic"]


def measured_in(mode: str, module: Any, monkeypatch: pytest.MonkeyPatch, run: Callable[[], Any]) -> set[Any]:
    """What a module that times calls by its `seconds` computes with in a mode: dtypes and devices."""
    seen: set[tuple[torch.dtype, str]] = set()

    def once(call: Callable[[], Tensor], *args: Any, **kwargs: Any) -> list[float]:
        out = call()
        seen.add((out.dtype, out.device.type))
        return [1.0]

    monkeypatch.setattr(module, "seconds", once)
    within(mode, run)
    return seen


@pytest.mark.parametrize("mode", MEASURED_IN)
def test_a_device_is_measured_in_float32(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "sizes", lambda *given: [1 << 16])
    seen = measured_in(mode, measure, monkeypatch, lambda: measure.measure(torch.device("cpu"), "here"))
    assert seen == {(torch.float32, "cpu")}


@pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler")
@pytest.mark.parametrize("mode", MEASURED_IN)
def test_kernels_are_timed_in_float32(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "keep", lambda machine: None)
    seen = measured_in(mode, timing, monkeypatch, lambda: timing.with_kernels(CPU))
    assert seen == {(torch.float32, "cpu")}
