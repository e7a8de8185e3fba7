"""Never stale, never lost: whoever reads or writes a state between steps sees what the eager model would."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from kvbuffer_compile import materialize, rollback
from kvbuffer_compile.accounts.ledger import LEDGER
from kvbuffer_compile.errors import StateError
from kvbuffer_compile.guard.guarded import GuardedState
from kvbuffer_compile.runtime import by_hand
from kvbuffer_compile.steps import composite
from tests.support.fuse import blown, fuse
from tests.support.oracle import Oracle, check

B, H, K, V = 3, 2, 8, 16
L = 4
LAZY = {"flush": L, "inner": "eager", "target": "aten"}


def step(S, q, k, v, g, beta):
    """Gated DeltaNet, one token, in place."""
    new = S * g.exp()[..., None, None]
    delta = (v - (new * k[..., None]).sum(-2)) * beta[..., None]
    new = new + k[..., None] * delta[..., None, :]
    S.copy_(new)
    return (new * q[..., None]).sum(-2)


def draw(batch=B):
    k = torch.nn.functional.normalize(torch.randn(batch, H, K), dim=-1)
    return torch.randn(batch, H, K), k, torch.randn(batch, H, V), -0.3 * torch.rand(batch, H), torch.rand(batch, H)


class Pair:
    """The same steps on a buffered state, an eager one and an exact one."""

    def __init__(self, fn=step, state=None, **options):
        self.fn = fn
        options = {"flush": L, "inner": "eager", "target": "aten", **options}
        self.compiled = torch.compile(fn, backend="kvbuffer", options=options)
        self.state = torch.randn(B, H, K, V) if state is None else state
        self.eager = self.state.clone()
        self.exact = self.state.double()
        self.oracle = Oracle()

    def run(self, steps=1):
        for _ in range(steps):
            inputs = draw(self.state.shape[0])
            with torch.no_grad():
                out = self.compiled(self.state, *inputs)
                eager = self.fn(self.eager, *inputs)
                exact = self.fn(self.exact, *(x.double() for x in inputs))
            self.oracle.check(out, eager, exact, "output")

    def check(self, got):
        self.oracle.check(got, self.eager, self.exact, "state")

    @property
    def owed(self):
        return max(int(a.cursor[0].max()) for a in by_hand.accounts_of(self.state))


@pytest.fixture
def pair(records):
    p = Pair()
    p.run(L + 2)  # past one flush, with rows owed again
    assert records and all(len(r.rewritten) == 1 for r in records)
    assert p.owed > 0 and type(p.state) is GuardedState
    return p


def _saved(s):
    buffer = io.BytesIO()
    torch.save(s, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def _copied_out(s):
    out = torch.empty(s.shape)
    out.copy_(s)
    return out


READERS = {
    "add": lambda s: s + 0,
    "clone": lambda s: s.clone(),
    "torch op": lambda s: torch.ops.aten.mul.Tensor(s, 1),
    "stack": lambda s: torch.stack([s])[0],
    "out=": lambda s: torch.add(s, 0, out=torch.empty(s.shape)),
    "foreach": lambda s: torch._foreach_add([s], 0)[0],
    "copy_ source": _copied_out,
    "index_select": lambda s: s.index_select(0, torch.arange(s.shape[0])),
    "view": lambda s: s.view(-1)[:].view(s.shape) + 0,
    "detach": lambda s: s.detach() + 0,
    "data": lambda s: s.data + 0,
    "deepcopy": copy.deepcopy,
    "pickle": lambda s: pickle.loads(pickle.dumps(s)),
    "torch.save": _saved,
    "numpy": lambda s: torch.from_numpy(s.numpy().copy()),
    "asarray": lambda s: torch.from_numpy(np.asarray(s).copy()),
    "dlpack": lambda s: torch.from_dlpack(s).clone(),
    "tolist": lambda s: torch.tensor(s.tolist()),
    "storage": lambda s: torch.tensor(list(s.untyped_storage()), dtype=torch.uint8).view(torch.float32).view(s.shape),
    "to": lambda s: s.to(torch.float64).float(),
    "data_ptr": lambda s: (s.data_ptr(), torch.empty(0).set_(by_hand.accounts_of(s)[0].state))[1].clone(),
}


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
def test_a_read_sees_the_materialised_value(pair, reader):
    for _ in range(L + 1):  # at every fill level
        got = reader(pair.state)
        pair.check(got)
        pair.run()


def test_printing_sees_the_materialised_value(pair):
    text = repr(pair.state)
    assert pair.owed == 0 and f"{pair.state.flatten()[0].item():.4f}"[:4] in text


def test_metadata_does_not_flush(pair):
    owed = pair.owed
    assert pair.state.shape == (B, H, K, V) and pair.state.dtype is torch.float32 and pair.state.is_contiguous()
    assert pair.owed == owed


def test_a_view_held_across_steps_stays_true(pair):
    view = pair.state[1]
    pair.run(2)
    check(view + 0, pair.eager[1], pair.exact[1])


def test_a_view_made_before_the_first_step_is_never_stale():
    state = torch.randn(B, H, K, V)
    view = state.view(-1)
    p = Pair(state=state)
    for _ in range(2 * L):
        p.run()
        p.check(view.view(state.shape).clone())


WRITERS = {
    "zero_": lambda s: s.zero_(),
    "fill_": lambda s: s.fill_(0.5),
    "copy_": lambda s: s.copy_(torch.ones(s.shape, dtype=s.dtype) * 0.25),
    "copy_ itself": lambda s: s.copy_(s[:]),
    "mul_": lambda s: s.mul_(0.5),
    "one sequence": lambda s: s[1].zero_(),
    "setitem": lambda s: s.__setitem__((slice(None), 0), 0.125),
    "index_copy_": lambda s: s.index_copy_(0, torch.tensor([2]), torch.ones(1, *s.shape[1:], dtype=s.dtype)),
    "masked_fill_": lambda s: s.masked_fill_(s > 0.5, 0),
    "out=": lambda s: torch.mul(s, 2, out=s),
    "numpy": lambda s: s.numpy().__setitem__(0, 0),
}


@pytest.mark.parametrize("writer", WRITERS.values(), ids=WRITERS)
def test_a_write_from_outside_is_honoured(pair, writer):
    for _ in range(3):
        for state in (pair.state, pair.eager, pair.exact):
            writer(state)
        pair.run(L + 1)
        pair.check(pair.state + 0)


def test_a_full_overwrite_drops_the_rows(pair):
    account = by_hand.accounts_of(pair.state)[0]
    account.rows[0].fill_(float("nan"))  # folding them in would show
    pair.state.zero_()
    assert bool((pair.state == 0).all())


def test_eager_and_compiled_steps_alternate(pair):
    for _ in range(5):
        inputs = draw()
        for state in (pair.state, pair.eager, pair.exact):
            step(state, *(x.to(state.dtype) for x in inputs))
        pair.run(3)
    pair.check(pair.state + 0)


@pytest.mark.parametrize("backend", ["aot_eager", "kvbuffer"])
def test_another_compiled_graph_reads_the_true_value(pair, backend):
    def norm(s):
        return s.square().sum((-1, -2))

    other = torch.compile(norm, backend=backend)
    for _ in range(L + 1):
        with torch.no_grad():
            pair.oracle.check(other(pair.state), norm(pair.eager), norm(pair.exact), "norm")
        pair.run()


def test_two_states_interleave(records):
    first = Pair()
    second_state = torch.randn(B, H, K, V)
    second_eager, second_exact = second_state.clone(), second_state.double()
    for t in range(3 * L):
        first.run()
        if t % 2:
            inputs = draw()
            with torch.no_grad():
                first.compiled(second_state, *inputs)
            step(second_eager, *inputs)
            step(second_exact, *(x.double() for x in inputs))
    first.check(first.state + 0)
    check(second_state + 0, second_eager, second_exact)
    assert len(records) <= 2, "a second state must not cause another compilation"


@pytest.mark.parametrize("check_too", [False, True])
@pytest.mark.parametrize("flush", [1, L])
def test_a_donated_state_is_returned_as_itself(flush, check_too, records):
    def functional(S, q, k, v, g, beta):
        new = S * g.exp()[..., None, None]
        new = new + k[..., None] * ((v - (new * k[..., None]).sum(-2)) * beta[..., None])[..., None, :]
        return (new * q[..., None]).sum(-2), new

    options = {"flush": flush, "inner": "eager", "target": "aten", "donate": True, "check": check_too}
    compiled = torch.compile(functional, backend="kvbuffer", options=options)
    state = torch.randn(B, H, K, V)
    eager, exact, first = state.clone(), state.double(), state
    with torch.no_grad(), Oracle() as oracle:
        for _ in range(3 * L):
            inputs = draw()
            out, state = compiled(state, *inputs)
            want, eager = functional(eager, *inputs)
            true, exact = functional(exact, *(x.double() for x in inputs))
            oracle.add(out, want, true, "output")
        oracle.add(state + 0, eager, exact, "state")
    assert state is first and all(len(r.rewritten) == 1 for r in records)


def test_a_returned_state_that_is_not_donated_is_left_alone(records):
    compiled = torch.compile(lambda S, k, v: S + k[..., None] * v[..., None, :], backend="kvbuffer", options=LAZY)
    state, inputs = torch.randn(B, H, K, V), (torch.randn(B, H, K), torch.randn(B, H, V))
    before = state.clone()
    with torch.no_grad():
        compiled(state, *inputs)
    assert torch.equal(state, before) and not any(r.rewritten for r in records)


def test_states_that_share_a_storage(records):
    stack = torch.randn(2, B, H, K, V)
    pairs = [Pair(state=stack[i]) for i in range(2)]
    for _ in range(2 * L + 1):
        for p in pairs:
            p.run()
    for i, p in enumerate(pairs):
        p.check(stack[i] + 0)


def test_rows_are_freed_with_the_state():
    p = Pair()
    p.run(2)
    before = len(LEDGER.accounts)
    del p
    gc.collect()
    assert len(LEDGER.accounts) < before


def test_rows_of_a_dead_state_are_folded_in_only_if_its_memory_lives_on(monkeypatch):
    flushed = []
    right = composite.flush
    monkeypatch.setattr(composite, "flush", lambda *args: (flushed.append(1), right(*args)))
    p = Pair()
    p.run(2)
    flushed.clear()
    del p.state
    gc.collect()
    assert not flushed
    p = Pair()
    p.run(2)
    view = p.state[:]
    p.check(view + 0)
    p.run(2)
    del p.state
    gc.collect()
    p.check(view + 0)


def test_a_process_may_end_with_rows_owed():
    """At exit states go in any order, and torch may be half gone."""
    code = "import tests.runtime.test_runtime as t; p = t.Pair(); p.me = p; p.run(3); t.B"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_new_state_at_the_same_address_owes_nothing():
    compiled = torch.compile(step, backend="kvbuffer", options={"flush": L, "inner": "eager", "target": "aten"})
    seen, oracle = set(), Oracle()
    for _ in range(20):
        state = torch.randn(B, H, K, V)
        eager, exact = state.clone(), state.double()
        seen.add(state.data_ptr())
        for _ in range(2):
            inputs = draw()
            with torch.no_grad():
                compiled(state, *inputs)
            step(eager, *inputs)
            step(exact, *(x.double() for x in inputs))
        oracle.check(state + 0, eager, exact, "state")
        del state
    assert len(seen) < 20, "no address was used twice: the test shows nothing"


def test_a_change_of_batch_size_loses_nothing(pair):
    half = pair.state[:1]
    with torch.no_grad():
        inputs = draw(1)
        pair.compiled(half, *inputs)
    step(pair.eager[:1], *inputs)
    step(pair.exact[:1], *(x.double() for x in inputs))
    pair.run(3)
    pair.check(pair.state + 0)


def test_inference_mode():
    with torch.inference_mode():
        p = Pair(state=torch.randn(B, H, K, V))
        p.run(L + 2)
        p.check(p.state + 0)
        p.run(2)
    with torch.inference_mode():
        p.check(p.state.clone())


def test_a_step_that_fails_is_taken_back(records):
    """Two states; the graph fails after the first one has stepped. Trying again must not apply that token twice."""

    def two(S1, S2, q, k, v, g, beta):
        out = fuse(step(S1, q, k, v, g, beta))
        return step(S2, q, k, out, g, beta)

    compiled = torch.compile(two, backend="kvbuffer", options={"flush": L, "inner": "eager", "target": "aten"})
    states = [torch.randn(B, H, K, V) for _ in range(2)]
    eager = [s.clone() for s in states]
    for t in range(3 * L):
        inputs = draw()
        with torch.no_grad():
            if t > 1 and t % 3 == 0:
                with blown():
                    compiled(*states, *inputs)
            compiled(*states, *inputs)
            two(*eager, *inputs)
    assert all(len(r.rewritten) == 2 for r in records)
    for got, want in zip(states, eager, strict=True):
        torch.testing.assert_close(got + 0, want, rtol=1e-4, atol=1e-4)


def test_materialize_by_hand(pair):
    alias = by_hand.accounts_of(pair.state)[0].state
    materialize({"cache": [pair.state]})
    assert pair.owed == 0
    pair.check(alias)


def test_rollback_takes_tokens_back():
    p = Pair(flush=8)
    p.run(2)
    kept = [p.eager.clone(), p.exact.clone()]
    p.run(3)
    rollback(p.state, 3)
    p.eager, p.exact = kept
    p.run(1)
    p.check(p.state + 0)


def test_rollback_says_how_many_tokens_can_be_taken_back(pair):
    with pytest.raises(ValueError, match="can be taken back"):
        rollback(pair.state, L + 5)
    with pytest.raises(ValueError, match="sequences"):
        rollback(pair.state, [1] * (B + 1))
    for n in (1.5, True, [0.5] * B):
        with pytest.raises(ValueError, match="must be an integer"):
            rollback(pair.state, n)
    with pytest.raises(ValueError, match="no state"):
        rollback(torch.zeros(3), 1)
    pair.check(pair.state + 0)


def test_the_check_option_runs_both_ways(records):
    p = Pair(check=True)
    p.run(2 * L + 1)
    p.check(p.state + 0)
    assert records and all(len(r.rewritten) == 1 for r in records)


def test_the_check_option_notices_a_wrong_step(monkeypatch):
    p = Pair(check=True)
    p.run(2)
    right = composite.buffered_step
    monkeypatch.setattr(composite, "buffered_step", lambda *args: [x + 0.125 for x in right(*args)])
    with pytest.raises(StateError, match="output 0 differs"), torch.no_grad():
        p.compiled(p.state, *draw())


@pytest.mark.parametrize("count", [2, 6, L * 4])
def test_states_of_one_graph_after_another_flush_in_turn(count):
    """A compiled step that serves layer after layer: as many flush at one token as at another, not all at once."""
    layers = [torch.randn(B, H, K, V) for _ in range(count)]
    compiled = torch.compile(step, backend="kvbuffer", options={**LAZY, "flush": 8})
    flushes = []
    with torch.no_grad():
        for _ in range(24):
            for layer in layers:
                compiled(layer, *draw())
            flushes.append(sum(int(a.cursor[0, 0]) == 1 for x in layers for a in by_hand.accounts_of(x)))
    assert flushes[0] == count and sum(flushes[8:16]) == count
    assert max(flushes[8:]) - min(flushes[8:]) <= 1
