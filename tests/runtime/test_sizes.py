"""Sizes that nobody has in mind: axes of 0, of 1, and wider than a stack; buffers beyond all memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kvbuffer_compile import explain
from kvbuffer_compile.accounts import buffers
from kvbuffer_compile.codegen import build
from kvbuffer_compile.codegen.cpp import cpp
from kvbuffer_compile.codegen.triton import triton
from kvbuffer_compile.errors import EmitError, StateError
from kvbuffer_compile.limits import LONGEST
from kvbuffer_compile.options import Options
from kvbuffer_compile.steps import targets
from tests.kernels.test_cpp import play
from tests.runtime.test_runtime import Pair
from tests.runtime.test_runtime import step as gated_delta
from tests.support.oracle import check
from tests.support.programs import NAMED
from tests.support.sessions import make_plan

TARGETS = ["aten", *(["cpp"] if build.compiler() else [])]
Sizes = tuple[int, int, int, int]


def ssd(S: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    new = S * g[..., None, None] + (k * beta[..., None]).unsqueeze(-1) * v.unsqueeze(-2)
    S.copy_(new)
    return (new * q.unsqueeze(-1)).sum(-2)


def three_tokens(S: Tensor, *inputs: Tensor) -> Tensor:
    return torch.stack([ssd(S, *(x[:, :, t] for x in inputs)) for t in range(3)], 2)


def draw(sizes: Sizes, tokens: tuple[int, ...]) -> list[Tensor]:
    b, h, k, v = sizes
    q, key = torch.randn(b, h, *tokens, k), torch.nn.functional.normalize(torch.randn(b, h, *tokens, k), dim=-1)
    return [q, key, torch.randn(b, h, *tokens, v), torch.rand(b, h, *tokens) / 2 + 0.5, torch.rand(b, h, *tokens)]


STEPS = {"ssd": (ssd, ()), "gated_delta": (gated_delta, ()), "three tokens": (three_tokens, (3,))}
EMPTY: list[Sizes] = [(0, 2, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0)]
SINGLE: list[Sizes] = [(1, 1, 1, 1), (2, 3, 1, 5), (2, 3, 4, 1), (1, 1, 4, 5)]


@torch.no_grad()
def compare(kind: str, sizes: Sizes, target: str) -> None:
    plain, tokens = STEPS[kind]
    torch._dynamo.reset()
    options = {"inner": "eager", "flush": 3, "capacity": 6, "target": target}
    compiled = torch.compile(plain, backend="kvbuffer", options=options, dynamic=False)
    state = torch.randn(sizes)
    eager, exact = state.clone(), state.double()
    for _ in range(5):
        inputs = draw(sizes, tokens)
        got = compiled(state, *inputs)
        results = plain(eager, *inputs), plain(exact, *(x.double() for x in inputs))
        assert got.shape == results[0].shape
        if got.numel():
            check(got, *results, "outputs")
    assert state.shape == eager.shape
    if state.numel():
        check(state + 0, eager, exact, "state")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", STEPS)
def test_an_axis_of_none(kind: str, target: str, records: list) -> None:
    """A kernel for such a state divided by zero, and the process was gone."""
    for sizes in EMPTY if kind == "ssd" else EMPTY[-1:]:
        compare(kind, sizes, target)
    rules = {why.rule for record in records for _, why in record.states}
    rules |= {one.why.rule for record in records for one in record.refused if not one.kept}
    assert rules == {"empty"}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", ["ssd", "three tokens"])
def test_an_axis_of_one(kind: str, target: str, records: list) -> None:
    for sizes in SINGLE if kind == "ssd" else SINGLE[-1:]:
        compare(kind, sizes, target)
    served = [plan for record in records for _, plan in record.rewritten]
    assert served and {plan.target for plan in served} == {target}
    assert all(one.why.reason for record in records for one in record.refused)


def test_why_an_empty_state_is_declined() -> None:
    sizes = (2, 3, 4, 0)
    (found,) = explain(ssd, torch.randn(sizes), *draw(sizes, ()), options={"flush": 4}).states
    assert (found.status, found.rule) == ("declined", "empty") and "axis of size 0" in found.reason


@pytest.mark.parametrize("sizes", [(0, 4), (4, 0)])
def test_no_kernel_without_elements(sizes: tuple[int, int]) -> None:
    for emit in (cpp.emit, triton.emit):
        with pytest.raises(EmitError, match="no .* kernel for a state"):
            emit(make_plan(NAMED["gdn"], sizes=sizes))


@pytest.mark.skipif(build.compiler() is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("sizes", [(16384, 2), (2, 16384)])
def test_a_wide_axis(sizes: tuple[int, int]) -> None:
    """As wide as the vectors on the stack may be, and then wider."""
    assert play(make_plan(NAMED["gdn"], sizes=sizes)) > 4
    too_wide = make_plan(NAMED["gdn"], sizes=tuple(16 * n for n in sizes))
    with pytest.raises(EmitError, match="on the stack"):
        cpp.emit(too_wide)


def test_a_buffer_too_long_for_a_kernel_runs_composite(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loader would make gigabytes zero, for each thread, and end the process where it cannot."""
    monkeypatch.setattr(targets, "_said", set())
    plan = replace(make_plan(NAMED["gdn"], sizes=(256, 256)), flush=LONGEST, capacity=LONGEST)
    with pytest.warns(UserWarning, match="65536 rows .* use a smaller flush or capacity"):
        assert targets.build(plan) == "aten"


@pytest.mark.parametrize("name", ["flush", "capacity"])
def test_lengths_have_an_end(name: str) -> None:
    assert getattr(Options(**{name: LONGEST}), name) == LONGEST
    with pytest.raises(ValueError, match=f"option {name}={LONGEST + 1} .* from 1 to {LONGEST}"):
        Options(**{name: LONGEST + 1})


@pytest.mark.parametrize("target", TARGETS)
def test_the_longest_buffer_works(target: str) -> None:
    pair = Pair(flush=LONGEST, capacity=LONGEST, target=target)
    pair.run(3)
    pair.check(pair.state + 0)


def test_a_buffer_that_finds_no_memory_leaves_the_state_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    pair = Pair(flush=3, target="aten")
    before = pair.state.clone()
    with monkeypatch.context() as patch:
        patch.setattr(buffers.ops, "new_cursor", refuse)
        with pytest.raises(StateError, match="no memory for 3 rows .* use a smaller flush .now 3. or capacity"):
            pair.run(1)
    assert torch.equal(pair.state, before)
    pair.eager, pair.exact = before.clone(), before.double()
    pair.run(4)
    pair.check(pair.state + 0)
