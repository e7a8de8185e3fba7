"""Taking tokens back: as if they had never been, or a clear error; never a wrong state."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from torch import Tensor

from kvbuffer_compile import materialize, rollback
from kvbuffer_compile.codegen import build
from kvbuffer_compile.ir.program import Program
from kvbuffer_compile.runtime import by_hand
from kvbuffer_compile.runtime.check import dense
from tests.kernels.test_cpp import is_exact, lenient
from tests.lift import test_sequence as sequences
from tests.runtime.test_runtime import LAZY, B, H, K, L, Pair, V, draw, step
from tests.support.exact import Exact, Token
from tests.support.oracle import Oracle
from tests.support.programs import NAMED, random_programs

MOST = 8  # drafts of one round

# (draft tokens, how many of them each of three sequences keeps)
Round = tuple[int, tuple[int, ...]]
rounds = st.lists(
    st.integers(1, MOST).flatmap(lambda t: st.tuples(st.just(t), st.tuples(*[st.integers(0, t)] * B))),
    min_size=1,
    max_size=8,
)
programs = st.one_of(st.sampled_from([p for p in NAMED.values() if is_exact(p)]), random_programs())


def speculate(program: Program, flush: int, played: list[Round]) -> None:
    """Rounds of drafts, of which each sequence keeps some; after each the state is that of the kept tokens."""
    run = Exact(program, flush, MOST, seed=len(played))
    for tokens, kept in played:
        drafts: list[Token] = [run.draw() for _ in range(tokens)]
        outs = run.step("verify", drafts)
        states = [run.dense]
        for t, token in enumerate(drafts):
            after, expected = run.advance(states[-1], token)
            states.append(after)
            assert all(torch.equal(a.select(len(run.lanes), t), b) for a, b in zip(outs, expected, strict=True))
        run.cursor[0] -= tokens - torch.tensor(kept, dtype=torch.int32)
        run.dense = torch.stack([states[n][b] for b, n in enumerate(kept)])
        assert torch.equal(run.materialized(), run.dense)
    token = run.draw()
    (outs, (_, expected)) = run.step("buffered", [token]), run.advance(run.dense, token)
    assert all(torch.equal(a.squeeze(len(run.lanes)), b) for a, b in zip(outs, expected, strict=True))


@seed(1)
@settings(max_examples=40, **lenient)
@given(programs, st.integers(1, 6), rounds)
def test_rounds_of_drafts_are_exact(program: Program, flush: int, played: list[Round]) -> None:
    speculate(program, flush, played)


@pytest.mark.nightly
@settings(max_examples=2000, **lenient)
@given(programs, st.integers(1, 6), rounds)
def test_many_rounds_of_drafts_are_exact(program: Program, flush: int, played: list[Round]) -> None:
    speculate(program, flush, played)


# --------------------------------------------------------------------------------------- compiled graphs

DTYPES = (torch.float32, torch.float32, torch.float64)


class Drafts:
    """Rounds on a compiled graph of any number of tokens, beside an eager state and an exact one."""

    def __init__(self, target: str = "aten", flush: int = 6) -> None:
        options = {"inner": "eager", "target": target, "flush": flush, "capacity": flush + 16}
        self.compiled = torch.compile(sequences.grouped_delta_rule, backend="kvbuffer", fullgraph=True, options=options)
        self.g = torch.Generator().manual_seed(0)
        start = torch.randn(2, sequences.H, sequences.K, sequences.V, generator=self.g)
        self.states = [start.to(d).clone() for d in DTYPES]
        self.oracle = Oracle()

    @torch.no_grad()
    def play(self, tokens: int, kept: Sequence[int], n: object = None) -> None:
        """n: what is handed to rollback, when not one count per sequence."""
        inputs = sequences.draw(tokens, self.g)
        before = [s.clone() for s in self.states[1:]]
        outs = [self.compiled(self.states[0], *inputs)]
        for state, dtype in zip(self.states[1:], DTYPES[1:], strict=True):
            outs.append(sequences.grouped_delta_rule(state, *(x.to(dtype) for x in inputs)))
        self.oracle.check(*outs, "outputs")
        rollback(self.states[0], [tokens - k for k in kept] if n is None else n)
        for state, old, dtype in zip(self.states[1:], before, DTYPES[1:], strict=True):
            for b, k in enumerate(kept):
                state[b : b + 1] = old[b : b + 1]
                if k:
                    sequences.grouped_delta_rule(state[b : b + 1], *(x[b : b + 1, :k].to(dtype) for x in inputs))
        (account,) = by_hand.accounts_of(self.states[0])
        self.oracle.check(dense(account), *self.states[1:], "state")


targets = ["aten", pytest.param("cpp", marks=pytest.mark.skipif(build.compiler() is None, reason="no compiler"))]


@pytest.mark.parametrize("target", targets)
def test_rounds_on_a_compiled_graph(target: str) -> None:
    drafts, g = Drafts(target), torch.Generator().manual_seed(3)
    for turn in range(24):
        tokens = int(torch.randint(1, MOST + 1, (), generator=g))
        kept = torch.randint(0, tokens + 1, (2,), generator=g)
        given = (tokens - kept).to((torch.int64, torch.int32)[turn % 2])
        drafts.play(tokens, kept.tolist(), given if turn % 3 else given.tolist())
    for tokens, kept in ((4, 0), (4, 4), (1, 0), (3, 2)):
        drafts.play(tokens, [kept] * 2, tokens - kept)


def test_rolling_back_twice_and_to_the_beginning() -> None:
    drafts = Drafts()
    first = drafts.states[0].clone()
    with torch.no_grad():
        drafts.compiled(drafts.states[0], *sequences.draw(5, drafts.g))
    rollback(drafts.states[0], 2)
    rollback(drafts.states[0], [2, 3])
    with pytest.raises(ValueError, match=r"between 0 and \[1, 0\] \(one number a sequence\)"):
        rollback(drafts.states[0], 1)
    rollback(drafts.states[0], torch.tensor([1, 0]))
    assert torch.equal(drafts.states[0] + 0, first)
    drafts.play(3, [1, 2])


def test_a_flush_ends_what_can_be_taken_back() -> None:
    p = Pair()
    p.run(L + 1)  # the last of them flushed first
    with pytest.raises(ValueError, match=r"between 0 and 1 tokens"):
        rollback(p.state, 2)
    p.check(dense(*by_hand.accounts_of(p.state)))
    with pytest.raises(ValueError, match="can be taken back"):
        rollback(p.state, [0, 1, 2])
    assert p.owed == 1
    p.run(1)
    p.check(p.state + 0)


@pytest.mark.parametrize("settled_by", ["materialize", "eager", "another graph", "reset"])
def test_settled_tokens_cannot_be_taken_back(settled_by: str) -> None:
    p = Pair()
    p.run(3)
    match settled_by:
        case "materialize":
            materialize([p.state])
        case "eager":
            p.check(p.state.clone())
        case "another graph":
            other = torch.compile(lambda s: s.sum(), backend="kvbuffer", options=LAZY)
            with torch.no_grad():
                other(p.state)
        case "reset":
            for state in (p.state, p.eager, p.exact):
                state.zero_()
    with pytest.raises(ValueError, match="no token can be taken back: those before are folded"):
        rollback(p.state, 1)
    rollback(p.state, 0)  # crop(0)
    p.run(2)
    p.check(dense(*by_hand.accounts_of(p.state)))
    with pytest.raises(ValueError, match=r"between 0 and 2 tokens"):
        rollback(p.state, 3)


def test_one_state_that_cannot_holds_back_the_others() -> None:
    first, second = Pair(flush=8), Pair(flush=8)
    first.run(5)
    second.run(2)
    with pytest.raises(ValueError, match=r"between 0 and 2 tokens"):
        rollback({"layers": [first.state, second.state]}, 3)
    assert (first.owed, second.owed) == (5, 2)
    rollback([first.state, second.state], 2)
    assert (first.owed, second.owed) == (3, 0)


def test_what_holds_no_tokens() -> None:
    fresh, p = torch.randn(B, H, K, V), Pair()
    with pytest.raises(ValueError, match="no state"):
        rollback(fresh, 1)
    p.run(2)
    part = p.state[:1]
    p.run(2)
    with pytest.raises(ValueError, match="part of a state"):
        rollback(part, 1)
    whole = p.state.view(-1)
    p.run(2)
    rollback(whole, 0)
    plain = Pair(flush=1)
    plain.run(2)
    with pytest.raises(ValueError, match="without a buffer"):
        rollback([p.state, plain.state], 1)
    p.check(p.state + 0)


def test_what_is_wrong_with_a_count_is_said() -> None:
    p = Pair(capacity=8)
    p.run(2)
    for n, why in ((3, "between 0 and 2 tokens can be taken back: no more were stepped"), (-1, "must not be negative")):
        with pytest.raises(ValueError, match=why):
            rollback(p.state, n)
    with pytest.raises(ValueError, match="obj is 'x', which holds no states"):
        rollback("x", 1)
    p.check(p.state)


def test_a_state_that_is_seen_from_elsewhere_says_so() -> None:
    p = Pair()
    p.run(2)
    seen = p.state.numpy()
    p.run(2)
    with pytest.raises(ValueError, match="no token can be taken back: the memory"):
        rollback(p.state, 1)
    p.check(torch.from_numpy(seen))


@pytest.mark.parametrize("n", [-1, [0, -1, 0], 2**40, "1", None, [], [[1], [1, 2]], [[1, 1, 1]], 1j, float("nan")])
def test_what_is_no_count(n: object) -> None:
    p = Pair()
    p.run(3)
    with pytest.raises(ValueError, match=r"rollback\(obj, n\)"):
        rollback(p.state, n)  # type: ignore[arg-type]
    assert p.owed == 3


def two_tokens(S: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """The second token's value is what the first one read: one program for both."""
    first = step(S, q, k, v, g, beta)
    return torch.stack([first, step(S, k, q, first, g, beta)])


def test_a_slot_of_several_tokens_goes_as_a_whole() -> None:
    p = Pair(fn=two_tokens, flush=6)
    p.run(2)
    (account,) = by_hand.accounts_of(p.state)
    assert account.plan.program.tokens == 2 and p.owed == 2
    kept = p.eager.clone(), p.exact.clone()
    p.run(1)
    for n in (1, [2, 2, 3]):
        with pytest.raises(ValueError, match=r"between 0 and 6 tokens can be taken back, in steps of 2"):
            rollback(p.state, n)
    rollback(p.state, [2, 2, 2])
    p.eager, p.exact = kept
    p.run(1)
    p.check(p.state + 0)


def test_nothing_is_left_when_everything_was_taken_back() -> None:
    """A state that is dirty and owes nothing settles to itself."""
    state = torch.randn(B, H, K, V)
    first = state.clone()
    p = Pair(state=state)
    with torch.no_grad():
        for _ in range(3):
            p.compiled(state, *draw())
    rollback(state, 3)
    assert torch.equal(state + 0, first)
    p.run(L + 2)
    p.check(state + 0)
