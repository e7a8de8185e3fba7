"""States that are known to be zero: rows alone until they no longer pay, and what is told of a state's zeros."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kvbuffer_compile import explain, materialize, rollback
from kvbuffer_compile.accounts import fresh
from kvbuffer_compile.accounts.account import Account
from kvbuffer_compile.codegen import build
from kvbuffer_compile.passes.choice import cost
from kvbuffer_compile.runtime import by_hand
from kvbuffer_compile.runtime.check import dense
from tests.runtime.test_runtime import LAZY, B, H, K, L, Pair, V, draw
from tests.runtime.test_runtime import step as gdn
from tests.support.exact import Exact
from tests.support.oracle import check
from tests.support.programs import NAMED

CAPACITY = 10
SWITCH = K * V * 4 // (4 * (K + V + 1))  # rows of k, u and g against one pass over the state: 5, beyond L
ZEROES: dict[str, Callable[[Tensor], object]] = {"zero_": lambda s: s.zero_(), "fill_": lambda s: s.fill_(0)}
targets = ["aten", pytest.param("cpp", marks=pytest.mark.skipif(build.compiler() is None, reason="no compiler"))]


def account_of(pair: Pair) -> Account:
    (account,) = by_hand.accounts_of(pair.state)
    return account


def fresh_pair(target: str = "aten", zeroed: Callable[[Tensor], object] = ZEROES["zero_"]) -> Pair:
    """A pair whose state has just been reset, and poisoned beneath the guard."""
    pair = Pair(target=target, capacity=CAPACITY)
    pair.run(2)
    reset(pair, zeroed)
    return pair


def reset(pair: Pair, zeroed: Callable[[Tensor], object] = ZEROES["zero_"]) -> None:
    for state in (pair.state, pair.eager, pair.exact):
        zeroed(state)
    account_of(pair).state.fill_(float("nan"))


@pytest.mark.parametrize("zeroed", ZEROES.values(), ids=ZEROES)
@pytest.mark.parametrize("target", targets)
def test_a_reset_state_is_not_touched_before_the_switch(target: str, zeroed: Callable[[Tensor], object]) -> None:
    pair = fresh_pair(target, zeroed)
    memory = account_of(pair).state
    untouched = 0
    for _ in range(3 * L):
        pair.run(1)
        untouched += bool(memory.isnan().all())
        pair.check(dense(account_of(pair)))
    assert untouched == SWITCH > L
    assert account_of(pair).cursor[3].tolist() == [0] * B and memory.isfinite().all()
    pair.check(pair.state + 0)


@pytest.mark.parametrize("target", targets)
def test_it_equals_the_stateful_path_at_every_length(target: str) -> None:
    pair, stateful = fresh_pair(target), Pair(target=target, capacity=CAPACITY)
    for length in range(1, 2 * SWITCH + 2):
        reset(pair)
        with torch.no_grad():
            stateful.compiled(stateful.state, *draw())
        stateful.state.copy_(torch.zeros_like(stateful.state))
        assert account_of(pair).cursor[3].all() and not account_of(stateful).cursor[3].any()
        outs = []
        with torch.no_grad():
            for _ in range(length):
                inputs = draw()
                outs.append((pair.compiled(pair.state, *inputs), stateful.compiled(stateful.state, *inputs)))
                gdn(pair.eager, *inputs)
                gdn(pair.exact, *(x.double() for x in inputs))
        for got, want in outs:
            torch.testing.assert_close(got, want)
        pair.check(pair.state + 0)
        check(stateful.state + 0, pair.eager, pair.exact)


def test_it_is_exact_on_integers_at_every_length() -> None:
    for name in ("gdn", "kda", "rwkv7", "oja", "deltaproduct2"):
        run = Exact(NAMED[name], 3, 8, seed=0)
        run.state.fill_(10**9)  # never read
        run.dense.zero_()
        run.cursor[3] = 1
        run.cursor[1] = torch.tensor([7, 5, 11])
        for t in range(14):
            token = run.draw()
            outs = run.step("buffered", [token])
            run.dense, expected = run.advance(run.dense, token)
            assert all(torch.equal(a.squeeze(len(run.lanes)), b) for a, b in zip(outs, expected, strict=True))
            untouched = [bool((s == 10**9).all()) for s in run.state]
            assert untouched == [t < first for first in (7, 5, 11)]


def test_layers_make_their_bases_at_different_steps() -> None:
    def two(S1: Tensor, S2: Tensor, *inputs: Tensor) -> Tensor:
        return gdn(S1, *inputs) + gdn(S2, *inputs)

    compiled = torch.compile(two, backend="kvbuffer", options={**LAZY, "capacity": CAPACITY})
    states = [torch.randn(B, H, K, V) for _ in range(2)]
    with torch.no_grad():
        compiled(*states, *draw())
        for state in states:
            state.zero_()
    assert [int(a.cursor[1, 0]) for a in by_hand.accounts_of(states)[::-1]] == [SWITCH, SWITCH - L // 2]


def test_the_switch_is_the_cost_models_break_even() -> None:
    plan = account_of(fresh_pair()).plan
    symbols = cost.numbers(plan.program, (B, H), plan.sizes, s=4, b=4, w=4)
    assert plan.fresh_rows((B, H)) == int(cost.break_even(plan.program).subs(symbols)) == SWITCH
    assert replace(plan, capacity=3).fresh_rows((B, H)) == 3
    assert replace(plan, state_dtype=torch.bfloat16).fresh_rows((B, H)) == SWITCH // 2


def test_the_report_says_what_is_not_read() -> None:
    report = explain(gdn, torch.randn(B, H, K, V), *draw(), options={**LAZY, "capacity": CAPACITY})
    (state,) = report.states
    assert (state.fresh_tokens, state.unread_bytes) == (SWITCH, SWITCH * B * H * K * V * 4)
    assert f"the first {SWITCH} tokens read no state" in " ".join(str(report).split())


# ------------------------------------------------------------------------------------------- what is not zero


def test_other_values_are_read() -> None:
    pair = fresh_pair()
    for write in (lambda s: s.fill_(0.5), lambda s: s.copy_(torch.ones(B, H, K, V, dtype=s.dtype))):
        for state in (pair.state, pair.eager, pair.exact):
            state.zero_()
            write(state)
        pair.run(L + 2)
        pair.check(pair.state + 0)


def test_zeros_that_another_graph_writes_over() -> None:
    def shift(s: Tensor) -> None:
        s.add_(1.5)

    others = [torch.compile(shift, backend=b) for b in ("kvbuffer", "aot_eager")]
    pair = Pair(capacity=CAPACITY)
    pair.run(2)
    for other in (*others, shift):
        for state, call in ((pair.state, other), (pair.eager, shift), (pair.exact, shift)):
            state.zero_()
            with torch.no_grad():
                call(state)
        pair.run(2)
        pair.check(pair.state + 0)


def test_zeros_that_are_seen_from_elsewhere_are_read() -> None:
    pair = Pair(capacity=CAPACITY)
    pair.run(2)
    seen = pair.state.numpy()
    for state in (pair.state, pair.eager, pair.exact):
        state.zero_()
    seen += 2  # unseen by anyone
    pair.eager += 2
    pair.exact += 2
    pair.run(2)
    pair.check(pair.state + 0)


def test_looking_at_zeros_changes_nothing() -> None:
    pair = Pair(capacity=CAPACITY)
    pair.run(2)
    for state in (pair.state, pair.eager, pair.exact):
        state.zero_()
    assert not bool((pair.state != 0).any())
    pair.run(L + 1)
    pair.check(pair.state + 0)


def test_rolling_back_to_nothing() -> None:
    pair = fresh_pair()
    with torch.no_grad():
        for _ in range(3):
            pair.compiled(pair.state, *draw())
    rollback(pair.state, 3)
    with pytest.raises(ValueError, match="no token can be taken back"):
        rollback(pair.state, 1)
    assert torch.equal(dense(account_of(pair)), torch.zeros(B, H, K, V))
    pair.run(2)
    rollback(pair.state, 0)
    pair.check(pair.state + 0)
    assert account_of(pair).state.isfinite().all()


# -------------------------------------------------------------------------------------------- fresh states


def fresh_state(pair: Pair) -> Tensor:
    """A new state for the pair: zero, as its owner says."""
    pair.state = torch.full((B, H, K, V), float("nan"))
    pair.eager, pair.exact = torch.zeros(B, H, K, V), torch.zeros(B, H, K, V).double()
    by_hand.declare_zero(pair.state)
    return pair.state


@pytest.mark.parametrize("target", targets)
def test_a_declared_state_needs_no_memory_before_it_has_a_base(target: str) -> None:
    pair = Pair(target=target, capacity=CAPACITY)
    pair.run(2)
    fresh_state(pair)
    pair.run(SWITCH)
    memory = account_of(pair).state
    assert memory.isnan().all()
    pair.check(dense(account_of(pair)))
    pair.run(1)
    assert memory.isfinite().all()
    pair.check(pair.state + 0)
    by_hand.declare_zero(pair.state)  # of a state that has an account
    memory.fill_(float("nan"))
    assert torch.equal(pair.state + 0, torch.zeros(B, H, K, V))


READERS: dict[str, Callable[[Tensor], Tensor]] = {
    "eager": lambda s: s + 0,
    "view": lambda s: s[:].clone(),
    "materialize": lambda s: (materialize([s]), s.clone())[1],
    "graph": lambda s: torch.compile(lambda x: x * 2, backend="aot_eager")(s),
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_a_declared_state_reads_as_zero(read: Callable[[Tensor], Tensor]) -> None:
    pair = Pair(capacity=CAPACITY)
    with torch.no_grad():
        assert torch.equal(read(fresh_state(pair)), torch.zeros(B, H, K, V))
        pair.run(2)
        pair.check(read(fresh_state(pair)) + pair.state + 0)


def test_a_declared_state_is_written_and_stepped_in_other_ways() -> None:
    pair = Pair(capacity=CAPACITY)
    for write in (lambda s: s[0].fill_(2), lambda s: s.copy_(torch.ones_like(s)), lambda s: s.zero_()):
        fresh_state(pair)
        for state in (pair.state, pair.eager, pair.exact):
            write(state)
        pair.run(3)
        pair.check(pair.state + 0)
    plain = Pair(flush=1)
    fresh_state(plain)
    plain.run(3)
    plain.check(plain.state + 0)


def test_memory_that_others_hold_is_made_zero() -> None:
    state = torch.full((B, H, K, V), float("nan"))
    held = state.view(-1)
    by_hand.declare_zero(state)
    assert not bool(held.any())
    assert not fresh._fresh
