"""Found by a hostile reading: tokens lost, states read stale, reports that change what they look at."""

from __future__ import annotations

import copy
import gc
from collections import deque
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from kvbuffer_compile import explain, materialize
from kvbuffer_compile.accounts.ledger import LEDGER
from kvbuffer_compile.runtime import by_hand
from kvbuffer_compile.steps import composite
from tests.runtime.test_runtime import B, H, K, L, Pair, V, draw, pair, step  # noqa: F401  (pair is a fixture)
from tests.support.oracle import Oracle, check


def test_temporary_views_of_a_stack_lose_no_token(records):
    """step(stack[i], ...) makes a new tensor for every token; the rows owed to it outlive it in the stack."""
    compiled = torch.compile(step, backend="kvbuffer", options={"flush": L, "inner": "eager", "target": "aten"})
    stack = torch.randn(2, B, H, K, V)
    eager, exact = stack.clone(), stack.double()
    for t in range(2 * L):
        inputs = draw()
        with torch.no_grad():
            compiled(stack[t % 2], *inputs)
        step(eager[t % 2], *inputs)
        step(exact[t % 2], *(x.double() for x in inputs))
    assert records and all(len(r.rewritten) == 1 for r in records)
    check(stack + 0, eager, exact)


ALIASES = {
    "unbind": lambda s: s.unbind(0)[1],
    "chunk": lambda s: s.chunk(2, 1)[0],
    "iteration": lambda s: list(s)[1],
    "detach": lambda s: s.detach(),
    "data": lambda s: s.data[0],
    "other dtype": lambda s: s.view(torch.int32),
    "numpy": lambda s: torch.from_numpy(s.numpy()),
    "asarray": lambda s: torch.from_numpy(np.asarray(s)),
    "dlpack": torch.from_dlpack,
    "storage": lambda s: torch.empty(0).set_(s.untyped_storage(), 0, s.shape),
    "copy.copy": copy.copy,
    "parameter": lambda s: torch.nn.Parameter(s, requires_grad=False),
    "compiled": lambda s: torch.compile(lambda x: (x[0], x.sum()), backend="aot_eager")(s)[0],
}


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("alias", ALIASES.values(), ids=ALIASES)
def test_an_alias_held_across_steps_stays_true(alias, inference):
    with torch.inference_mode(inference):
        p = Pair()
        p.run(2)
        assert p.owed > 0
        held, eager, exact = alias(p.state), alias(p.eager), alias(p.exact.float())
        for _ in range(L):
            p.run()
            exact = alias(p.exact.float())
            if held.dtype == torch.int32:
                sides = [x.view(torch.float32) for x in (held, eager, exact)]
                p.oracle.check(sides[0] + 0, *sides[1:], "alias")
            else:
                p.oracle.check(held + 0, eager, exact, "alias")


def test_an_alias_let_go_costs_nothing_any_more(pair):  # noqa: F811
    held = pair.state.numpy()
    pair.run(2)
    assert pair.owed == 0
    del held
    pair.run(2)
    assert pair.owed > 0


def test_a_second_owner_hides_no_alias():
    state = torch.randn(B, H, K, V)
    view = state.view(-1)  # before the state is guarded
    p = Pair(state=state)
    p.run()
    half = state[:2]
    inputs = draw(2)
    with torch.no_grad():
        p.compiled(half, *inputs)
    step(p.eager[:2], *inputs)
    step(p.exact[:2], *(x.double() for x in inputs))
    for _ in range(3):
        p.check(view.view(state.shape).clone())
        p.run()


@pytest.mark.parametrize("write", [lambda s: s.copy_(torch.zeros(7, 7)), lambda s: s.fill_(torch.zeros(7, 7))])
def test_an_overwrite_that_fails_loses_nothing(pair, write):  # noqa: F811
    with pytest.raises(RuntimeError):
        write(pair.state)
    pair.check(pair.state + 0)


def test_a_flush_that_fails_is_still_owed(pair, monkeypatch):  # noqa: F811
    def full(*args):
        raise torch.OutOfMemoryError("full")

    with monkeypatch.context() as patched, pytest.raises(torch.OutOfMemoryError):
        patched.setattr(composite, "flush", full)
        pair.state + 0
    pair.check(pair.state + 0)


def test_a_state_that_cannot_be_guarded_is_never_stale(records):
    state = torch.nn.Parameter(torch.randn(B, H, K, V), requires_grad=False)
    p = Pair(state=state)
    p.eager, p.exact = state.detach().clone(), state.detach().double()
    for _ in range(L + 2):
        p.run()
        p.check(state + 0)
    assert records and all(len(r.rewritten) == 1 for r in records)


def test_one_number_of_a_state_can_be_formatted(pair):  # noqa: F811
    assert f"{pair.state[0, 0, 0, 0]:.3f}" == f"{pair.state[0, 0, 0, 0].item():.3f}"


def test_rows_of_dropped_views_are_freed():
    stack = torch.randn(2, B, H, K, V)
    before = len(LEDGER.accounts)
    p = Pair(state=stack[0])
    p.run(2)
    del p
    gc.collect()
    assert len(LEDGER.accounts) <= before


def two_reads(S, q, k, v, g, beta):
    new = S * g.exp()[..., None, None] + k[..., None] * v[..., None, :]
    S.copy_(new)
    return (new * q[..., None]).sum(-2), (new * k[..., None]).sum(-2)


def constant_decays(S, q, k, v, g, beta):
    new = S * torch.tensor([0.5, 0.9])[:, None, None] + k[..., None] * v[..., None, :]
    S.copy_(new)
    return ((new * q[..., None]).sum(-2),)


@pytest.mark.parametrize("fn", [two_reads, constant_decays])
def test_inductor_takes_the_rewritten_graph(fn, records):
    """With inner="eager" both ran; Inductor refused our way to take one of several results, and bare constants."""
    compiled = torch.compile(fn, backend="kvbuffer", options={"flush": 2, "target": "aten"})
    state = torch.randn(B, H, K, V)
    eager, exact = state.clone(), state.double()
    with torch.no_grad(), Oracle() as oracle:
        for _ in range(5):
            inputs = draw()
            outs = [compiled(state, *inputs), fn(eager, *inputs), fn(exact, *(x.double() for x in inputs))]
            for i, results in enumerate(zip(*outs, strict=True)):
                oracle.add(*results, f"output {i}")
        oracle.add(state + 0, eager, exact, "state")
    assert records and all(len(r.rewritten) == 1 for r in records)


class Holder:
    """A state that is no buffer of a module."""

    def __init__(self):
        self.state = torch.randn(B, H, K, V)

    def step(self, *inputs):
        return torch.nn.functional.dropout(step(self.state, *inputs), 0.5)


def test_explain_can_be_asked_often_and_changes_nothing(records):
    """Dynamo stops after 8 compilations of a function: reports were empty then, and the function ran uncompiled."""
    holder = Holder()
    before, inputs, dice = holder.state.clone(), draw(), torch.get_rng_state()
    for _ in range(10):
        (found,) = explain(holder.step, *inputs, options={"flush": L, "target": "aten"}).states
        assert found.status == "buffered"
    assert torch.equal(holder.state, before) and torch.equal(torch.get_rng_state(), dice)
    records.clear()
    with torch.no_grad():
        torch.compile(holder.step, backend="kvbuffer", options={"flush": L, "inner": "eager"})(*inputs)
    assert [len(r.rewritten) for r in records] == [1]


@dataclass(slots=True)
class Slotted:
    state: torch.Tensor


@pytest.mark.parametrize("holder", [Slotted, lambda s: deque([s])])
def test_materialize_looks_into_slots_and_deques(pair, holder):  # noqa: F811
    alias = by_hand.accounts_of(pair.state)[0].state
    materialize(holder(pair.state))
    pair.check(alias)


def test_a_plain_matrix_state_read_by_a_matrix_product(records):
    def toy(S, q, k, v, g):
        new = S * g + k[:, None] * v[None]
        S.copy_(new)
        return q @ new

    compiled = torch.compile(toy, backend="kvbuffer", options={"flush": 4, "inner": "eager", "target": "aten"})
    state = torch.randn(8, 16)
    eager = state.clone()
    with torch.no_grad():
        for _ in range(10):
            inputs = torch.randn(8), torch.randn(8), torch.randn(16), torch.rand(())
            torch.testing.assert_close(compiled(state, *inputs), toy(eager, *inputs), rtol=1e-4, atol=1e-4)
    assert [len(r.rewritten) for r in records] == [1]
    torch.testing.assert_close(state + 0, eager, rtol=1e-4, atol=1e-4)
