"""States that are zero have no memory before a step that may flush, or before anyone looks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kvbuffer_compile import rollback
from kvbuffer_compile.runtime import by_hand
from kvbuffer_compile.runtime.check import dense
from kvbuffer_compile.runtime.drafts import accept, draft_tree
from tests.lift import test_sequence as sequences
from tests.runtime.test_buffer_only import CAPACITY, SWITCH, account_of, targets
from tests.runtime.test_runtime import READERS, B, H, K, L, Pair, V, draw
from tests.support.oracle import Oracle

CPU = torch.device("cpu")


def state_bytes(*states: Tensor) -> int:
    """Bytes of storage behind the states, told without touching them."""
    with torch._C.DisableTorchFunctionSubclass():
        return sum(s.untyped_storage().nbytes() for s in states)


def bare_pair(**options: Any) -> Pair:
    pair = Pair(**{"capacity": CAPACITY, **options}, state=torch.zeros(B, H, K, V))
    pair.state = by_hand.zero_state((B, H, K, V), torch.float32, CPU)
    return pair


@pytest.mark.parametrize("inner", ["eager", "inductor"])
@pytest.mark.parametrize("target", targets)
def test_memory_comes_with_the_base(target: str, inner: str) -> None:
    pair = bare_pair(target=target, inner=inner)
    for step in range(1, 3 * L):
        pair.run(1)
        assert state_bytes(pair.state) == (B * H * K * V * 4 if step > SWITCH else 0)
        pair.check(dense(account_of(pair)))
    pair.check(pair.state + 0)


def test_the_layers_of_a_model_get_theirs_one_by_one() -> None:
    pair = bare_pair()
    others = [by_hand.zero_state((B, H, K, V), torch.float32, CPU) for _ in range(3)]
    pair.run(2)
    with torch.no_grad():
        pair.compiled(others[0], *draw())
    assert state_bytes(pair.state, *others) == 0
    assert not bool((others[1] + 0).any()) and not bool(others[2][0].any())
    assert state_bytes(pair.state, others[0]) == 0 < state_bytes(others[1]) == state_bytes(others[2])
    pair.check(pair.state + 0)
    assert state_bytes(others[0]) == 0


@pytest.mark.parametrize("steps", [pytest.param(0, marks=pytest.mark.nightly), 2])
@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_whoever_looks_sees_the_state(read: Callable[[Tensor], Tensor], steps: int) -> None:
    pair = bare_pair()
    pair.run(steps)
    if steps or read is not READERS["data_ptr"]:  # which asks the account
        pair.check(read(pair.state))
    pair.run(2)
    pair.check(pair.state + 0)


WRITERS: dict[str, Callable[[Tensor], object]] = {
    "zero_": lambda s: s.zero_(),
    "copy_": lambda s: s.copy_(torch.ones_like(s)),
    "part": lambda s: s[0].fill_(2.0),
    "add_": lambda s: s.add_(1.5),
    "graph": lambda s: torch.compile(lambda x: x.add_(1.5), backend="aot_eager")(s),
}


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_whoever_writes_has_memory(write: Callable[[Tensor], object], steps: int) -> None:
    pair = bare_pair()
    pair.run(steps)
    for state in (pair.state, pair.eager, pair.exact):
        with torch.no_grad():
            write(state)
    pair.run(3)
    pair.check(pair.state + 0)


@pytest.mark.parametrize("options", [{"flush": 1}, {"check": True}, {"target": "aten", "flush": 2, "capacity": None}])
def test_other_plans(options: dict[str, Any]) -> None:
    pair = bare_pair(**options)
    pair.run(3)
    pair.check(pair.state + 0)


def test_a_donated_state() -> None:
    def decode(S: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        new = S * 0.9 + k[..., :, None] * v[..., None, :]
        return (new * k[..., :, None]).sum(-2), new

    options = {"flush": L, "capacity": CAPACITY, "inner": "eager", "target": "aten", "donate": True}
    compiled = torch.compile(decode, backend="kvbuffer", options=options)
    state, want = by_hand.zero_state((B, H, K, V), torch.float32, CPU), torch.zeros(B, H, K, V)
    with torch.no_grad():
        for step in range(2 * CAPACITY):
            _, k, v, _, _ = draw()
            got, state = compiled(state, k, v)
            out, want = decode(want, k, v)
            torch.testing.assert_close(got, out)
            assert step > 1 or state_bytes(state) == 0
    torch.testing.assert_close(state + 0, want)


# --------------------------------------------------------------------------------------------- several tokens


WIDTH, SLOTS = 24, 16


def draw_tokens(tokens: int, g: torch.Generator) -> tuple[Tensor, ...]:
    def rand(*sizes: int) -> Tensor:
        return torch.rand(sequences.B, tokens, *sizes, generator=g) - 0.5

    q, k, v = rand(sequences.G, WIDTH), rand(sequences.G, WIDTH), rand(sequences.H, WIDTH)
    gate, beta = (rand(sequences.H) + 0.5 for _ in range(2))
    return q, torch.nn.functional.normalize(k, dim=-1), v, -gate, beta


class Bare:
    """A sequence of tokens on a state without memory, beside an eager and an exact one."""

    def __init__(self, target: str = "aten") -> None:
        options = {**sequences.FAST, "target": target, "capacity": SLOTS}
        self.compiled = torch.compile(sequences.grouped_delta_rule, backend="kvbuffer", options=options)
        sizes = (sequences.B, sequences.H, WIDTH, WIDTH)
        self.state = by_hand.zero_state(sizes, torch.float32, CPU)
        self.eager, self.exact = torch.zeros(sizes), torch.zeros(sizes).double()
        self.g = torch.Generator().manual_seed(0)
        self.oracle = Oracle()

    @torch.no_grad()
    def play(self, tokens: int, kept: int | None = None) -> None:
        kept = tokens if kept is None else kept
        inputs = draw_tokens(tokens, self.g)
        got = self.compiled(self.state, *inputs)
        before = self.eager.clone(), self.exact.clone()
        wanted = [sequences.grouped_delta_rule(s, *(x.to(s.dtype) for x in inputs)) for s in (self.eager, self.exact)]
        self.oracle.check(got, *wanted, "outputs")
        if kept < tokens:
            rollback(self.state, tokens - kept)
            self.eager, self.exact = before
            for s in (self.eager, self.exact):
                if kept:
                    sequences.grouped_delta_rule(s, *(x[:, :kept].to(s.dtype) for x in inputs))

    @property
    def limit(self) -> int:
        (account,) = by_hand.accounts_of(self.state)
        return account.fresh_rows

    def check(self) -> None:
        self.oracle.check(self.state + 0, self.eager, self.exact, "state")


@pytest.mark.parametrize("target", targets)
def test_tokens_taken_back_need_no_memory(target: str) -> None:
    bare = Bare(target)
    bare.play(2)
    assert 8 < bare.limit < SLOTS
    for _ in range(4):
        bare.play(8, 0)
    bare.play(bare.limit - 2, bare.limit - 3)
    bare.play(1)
    assert state_bytes(bare.state) == 0, "what was taken back does not count"
    bare.play(1)
    assert state_bytes(bare.state) > 0
    bare.check()


def test_counts_that_the_host_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device a count is not looked at: memory comes sooner than needed, never later."""
    monkeypatch.setattr("kvbuffer_compile.accounts.rollback.on_device", lambda *_: True)
    bare = Bare()
    bare.play(2, 1)
    bare.play(bare.limit - 2, 0)
    assert state_bytes(bare.state) == 0
    bare.play(1)
    assert state_bytes(bare.state) > 0
    bare.play(3)
    bare.check()


@pytest.mark.parametrize("target", targets)
def test_a_step_that_overflows_and_one_that_fills(target: str) -> None:
    for first, then in ((SLOTS, 1), (SLOTS - 1, 2), (2, SLOTS - 1)):
        bare = Bare(target)
        bare.play(first)
        assert state_bytes(bare.state) == 0
        bare.play(then)
        assert state_bytes(bare.state) > 0
        bare.check()


def test_a_draft_tree() -> None:
    bare = Bare()
    inputs = draw_tokens(3, bare.g)
    with torch.no_grad(), draft_tree([-1, -1, 1]):
        bare.compiled(bare.state, *inputs)
    accept(bare.state, [1, 2])
    assert state_bytes(bare.state) == 0
    for s in (bare.eager, bare.exact):
        sequences.grouped_delta_rule(s, *(x[:, 1:].to(s.dtype) for x in inputs))
    bare.check()
