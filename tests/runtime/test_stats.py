"""What stats() says has happened is what has happened; nothing is counted for it while decoding."""

from __future__ import annotations

import copy
import gc
import json
import logging
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kvbuffer_compile import explain, materialize, rollback, stats
from kvbuffer_compile.accounts import history
from kvbuffer_compile.accounts.attempt import Attempt
from kvbuffer_compile.accounts.ledger import LEDGER
from kvbuffer_compile.process import callers
from kvbuffer_compile.runtime import by_hand
from tests.runtime.test_runtime import B, H, K, L, Pair, V, draw, step

STATE_BYTES = B * H * K * V * 4
HERE = str(Path(__file__))


def owed(state: Tensor) -> int:
    return max(int(a.cursor[0].max()) for a in by_hand.accounts_of(state))


def several(S: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """Three tokens at once."""
    out = []
    for t in range(3):
        new = S * g.exp()[..., None, None]
        new = new + k[..., None] * ((v + t - (new * k[..., None]).sum(-2)) * beta[..., None])[..., None, :]
        S.copy_(new)
        out.append((new * q[..., None]).sum(-2))
    return torch.stack(out)


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("seed", range(2))
def test_flushes_are_the_ones_that_happened(tokens: int, seed: int) -> None:
    """Among random steps, reads, overwrites: a step has flushed when the rows owed did not grow by its tokens."""
    pair = Pair(step if tokens == 1 else several, capacity=L + 3)
    dice, flushed, settled, steps = random.Random(seed), 0, 0, 0
    for _ in range(120):
        match dice.choice("ssssssssssssssrrzw"):
            case "s":
                before = owed(pair.state) if steps else 0
                pair.run()
                steps += 1
                flushed += owed(pair.state) != before + tokens
            case "r" if steps:
                settled += owed(pair.state) > 0
                pair.state.sum()
            case "w" if steps:
                settled += owed(pair.state) > 0
                pair.state.mul_(0.5)
                pair.eager.mul_(0.5)
                pair.exact.mul_(0.5)
            case "z" if steps:
                counted = owed(pair.state) > 0
                for t in (pair.state, pair.eager, pair.exact):
                    t.zero_()
                settled += counted
    (found,) = stats(pair.state).states
    assert flushed > 3 and settled > 3
    assert (found.steps, found.flushes, found.settles, found.exact) == (steps, flushed, settled, tokens == 1)
    assert found.bytes_not_written == (steps - flushed - settled) * STATE_BYTES
    assert found.owed == owed(pair.state) and found.signature == "DRUR" and found.flush == L


def test_a_wrong_rhythm_is_called_an_estimate() -> None:
    """Decode and verify steps mixed: what is said is near, and says that it is not exact."""
    options = {"flush": L, "inner": "eager", "target": "aten", "capacity": L + 3}
    decode, verify = (torch.compile(fn, backend="kvbuffer", options=options) for fn in (step, several))
    state = torch.randn(B, H, K, V)
    with torch.no_grad():
        for fn in (decode, decode, decode, verify) * 4:
            fn(state, *draw())
    (found,) = stats(state).states
    assert found.steps == 16 and not found.exact and abs(found.flushes - 24 // L) <= 2
    assert "~: an estimate" in str(stats(state))


def test_who_settled_is_told() -> None:
    pair = Pair()
    for _ in range(3):
        pair.run(2)
        pair.state.sum()
    materialize(pair.state)  # nothing is owed: nobody has cost anything
    (found,) = stats(pair.state).states
    ((line, times),) = found.settled_by.items()
    assert times == 3 and line.startswith(f"{HERE}:") and ".sum()" in Path(HERE).read_text().splitlines()[
        int(line.rpartition(":")[2]) - 1]  # fmt: skip
    assert f"settled 3 times: {line}" in str(stats(pair.state))


def test_only_the_last_lines_are_kept() -> None:
    tally = history.Tally()
    for n in range(20):
        tally.caused(f"line {n}")
    tally.caused("line 15")
    assert list(tally.causes) == [f"line {n}" for n in (12, 13, 14, 16, 17, 18, 19, 15)]


def test_a_loop_that_looks_at_every_step_is_told_once(recwarn: pytest.WarningsRecorder) -> None:
    pair = Pair()
    for _ in range(3 * history.IN_A_ROW):
        pair.run()
        pair.state.sum()
    (said,) = [w for w in recwarn if "after every step" in str(w.message)]
    assert said.filename == HERE and "pair.state.sum()" in Path(HERE).read_text().splitlines()[said.lineno - 1]


def test_memory_that_is_handed_out_is_told_once_with_the_line(recwarn: pytest.WarningsRecorder) -> None:
    pair = Pair()
    pair.run(2)
    array = pair.state.numpy()
    for _ in range(3 * history.IN_A_ROW):
        pair.run()
        np.testing.assert_allclose(array, pair.eager.numpy(), atol=1e-4)
    (said,) = [w for w in recwarn if "after every step" in str(w.message)]
    (line,) = stats(pair.state).settled_by
    assert f"a NumPy array, say, last looked at by {line}" in str(said.message) and line.startswith(HERE)


def test_a_pointer_that_is_handed_out_is_told_once_with_the_line(recwarn: pytest.WarningsRecorder) -> None:
    pair = Pair()
    pair.run(2)
    pair.state.data_ptr()
    pair.run(3 * history.IN_A_ROW)
    (said,) = [w for w in recwarn if "after every step" in str(w.message)]
    assert f"shared with whoever called data_ptr() on it ({HERE}:" in str(said.message)
    assert f"data_ptr() on it ({HERE}:" in str(stats(pair.state).states[0].shared)


def test_memory_that_is_handed_out_when_all_is_done_is_nothing_to_tell(recwarn: pytest.WarningsRecorder) -> None:
    pair = Pair()
    pair.run(2)
    pair.state.numpy()
    pair.run(history.IN_A_ROW)
    assert not [w for w in recwarn if "after every step" in str(w.message)]


def test_a_view_for_every_call_is_told_once(recwarn: pytest.WarningsRecorder) -> None:
    states = torch.zeros(2, B, H, K, V)
    expected = states.clone()
    fn = torch.compile(step, backend="kvbuffer", options={"flush": L, "inner": "eager", "target": "aten"})
    with torch.no_grad():
        for _ in range(3 * history.IN_A_ROW):
            given = draw()
            fn(states[1], *given)
            step(expected[1], *given)
    torch.testing.assert_close(states, expected, atol=1e-4, rtol=1e-4)
    (said,) = [w for w in recwarn if "a new view of the same state" in str(w.message)]
    assert said.filename == HERE and "fn(states[1]" in Path(HERE).read_text().splitlines()[said.lineno - 1]


def test_explaining_counts_nothing() -> None:
    pair = Pair()
    pair.run(3)
    before = stats(pair.state).total("steps"), stats().gone
    with torch.no_grad():
        report = explain(step, pair.state, *draw(), options={"flush": L, "inner": "eager", "target": "aten"})
    assert report.count("buffered") == 1
    assert (stats(pair.state).total("steps"), stats().gone) == before
    pair.check(pair.state)


def test_a_loop_that_looks_now_and_then_is_left_alone(recwarn: pytest.WarningsRecorder) -> None:
    pair = Pair()
    for _ in range(3 * history.IN_A_ROW):
        pair.run(2)
        pair.state.sum()
    assert not [w for w in recwarn if "after every step" in str(w.message)]


@pytest.mark.parametrize("look", [Tensor.sum, Tensor.numpy])
def test_a_warning_that_is_an_error_leaves_the_state_right(
    look: Callable[[Tensor], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(callers, "_once", set())
    pair = Pair()
    held = None  # while it is stepped again
    with warnings.catch_warnings(), pytest.raises(UserWarning, match="after every step"):
        warnings.simplefilter("error")
        for _ in range(2 * history.IN_A_ROW):
            pair.run()
            held = look(pair.state)
    pair.check(pair.state)
    pair.run(3)
    pair.check(pair.state)
    assert held is not None


def test_a_state_that_begins_at_zero_is_not_read() -> None:
    pair = Pair(state=torch.zeros(B, H, K, V))
    pair.run()
    pair.state.zero_()
    pair.eager.zero_()
    pair.exact.zero_()
    before = stats(pair.state).total("bytes_not_read")
    pair.run(2)
    assert stats(pair.state).total("bytes_not_read") - before == 2 * STATE_BYTES


def test_rollbacks_are_counted() -> None:
    decode = torch.compile(step, backend="kvbuffer", options={
        "flush": L, "inner": "eager", "target": "aten", "capacity": L + 8})  # fmt: skip
    state = torch.randn(B, H, K, V)
    with torch.no_grad():
        for n in range(3 + 6 * L):
            decode(state, *draw())
            if n > 2 and n % 2 and owed(state):
                rollback(state, 1)
    (found,) = stats(state).states
    assert found.rollbacks == 3 * L and not found.exact
    assert abs(found.flushes - (3 + 3 * L) // L) <= 2  # each round keeps one token


def test_memory_that_others_hold_is_folded_after_every_step() -> None:
    pair = Pair()
    pair.state.data_ptr()
    held = pair.state.numpy()
    pair.run(5)
    (found,) = stats(pair.state).states
    assert (found.steps, found.flushes, found.folded_after, found.bytes_not_written) == (5, 0, 5, 0)
    assert held.shape == (B, H, K, V) and found.shared and "memory is shared with" in str(stats(pair.state))


def pooled(pool: Tensor, slots: Tensor, *inputs: Tensor) -> Tensor:
    S = pool[slots]
    out = step(S, *inputs)
    pool[slots] = S
    return out


def test_a_pool_is_counted_slot_by_slot(records: list) -> None:
    pool = torch.randn(4, H, K, V)
    compiled = torch.compile(pooled, backend="kvbuffer", options={"flush": L, "inner": "eager", "target": "aten"})
    steps = {0: 0, 1: 0, 2: 0, 3: 0}
    for n in range(3 * L):
        taken = [0, 2] if n % 2 else [0, 1]
        for slot in taken:
            steps[slot] += 1
        with torch.no_grad():
            compiled(pool, torch.tensor(taken), *draw(2))
    assert [len(r.rewritten) for r in records] == [1]
    (account,) = by_hand.accounts_of(pool)
    (found,) = stats(pool).states
    limit = int(account.phase)
    expected = sum(max(0, (n - limit - 1) // L + 1) for n in steps.values())
    assert found.steps == sum(steps.values()) and found.flushes == expected > 0
    pool.sum()
    (found,) = stats(pool).states
    assert found.settles == 1 and found.bytes_not_written == (found.steps - expected - 3) * STATE_BYTES // B


def test_everything_and_what_is_gone() -> None:
    gc.collect()
    before = stats()
    pair, other = Pair(), Pair()
    pair.run(4)
    other.run(2)
    now = stats()
    assert len(now.states) == len(before.states) + 2
    assert now.total("steps") == before.total("steps") + 6
    assert [s.steps for s in stats({"a": [pair.state]}).states] == [4]
    pair.state = None
    gc.collect()
    after = stats()
    assert after.gone and before.gone and after.gone["steps"] == before.gone["steps"] + 4
    assert "states that are gone" in str(after)


def test_counts_go_on_under_another_plan() -> None:
    pair = Pair()
    pair.run(3)
    again = torch.compile(lambda *a: step(*a), backend="kvbuffer", options={
        "flush": L + 1, "inner": "eager", "target": "aten"})  # fmt: skip
    with torch.no_grad():
        again(pair.state, *draw())
    (found,) = stats(pair.state).states
    assert found.steps == 4 and found.settles == 1 and "another plan" in next(iter(found.settled_by))


def test_what_owes_nothing() -> None:
    assert stats(torch.ones(3)).states == () and str(stats([])).startswith("kvbuffer: 0 buffered states\n")
    assert "states are in what a step is called with" in str(stats([]))
    pair = Pair(flush=1)
    pair.run(2)
    found = stats(pair.state)
    assert (found.states, found.rowless) == ((), 1) and "without rows" in str(found)


def test_a_dict_is_json() -> None:
    pair = Pair()
    pair.run(2)
    told = json.loads(json.dumps(stats(pair.state).to_dict()))
    assert told["totals"]["steps"] == 2 and told["states"][0]["shape"] == [B, H, K, V]


def test_a_copy_has_no_history() -> None:
    pair = Pair()
    pair.run(2)
    assert stats(copy.deepcopy(pair.state)).states == ()


def test_an_interrupted_step_does_not_count() -> None:
    pair = Pair()
    pair.run(3)
    account = LEDGER.overlapping(pair.state)[0]
    account.attempt(Attempt(), 1)
    assert stats(pair.state).total("steps") == 3


def test_settles_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    pair = Pair()
    pair.run(2)
    with caplog.at_level(logging.DEBUG, logger="kvbuffer_compile"):
        pair.state.sum()
    assert any("settled a state after 2 steps" in r.message and HERE in r.message for r in caplog.records)


def test_profilers_show_steps_and_folds() -> None:
    pair = Pair()
    pair.run(2)
    with torch.profiler.profile() as profiled:
        pair.run(1)
        pair.state.sum()
    names = [event.key for event in profiled.key_averages()]
    assert any(name.startswith(f"kvbuffer::step_buffered_DRUR_L{L}_") for name in names), names
    assert any(name.startswith("kvbuffer::flush") for name in names)


def test_the_step_itself_notes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """No method of a state's history is called by steps."""
    pair = Pair()
    pair.run(1)
    with monkeypatch.context() as patch:
        for name in [n for n, f in vars(history.History).items() if callable(f)]:
            patch.setattr(history.History, name, None)
        pair.run(2 * L)


@pytest.mark.parametrize("call", [stats, materialize])
@pytest.mark.parametrize(
    "obj", ["state", 3, torch.compile(step, backend="kvbuffer")], ids=["text", "number", "function"]
)
def test_what_can_hold_no_state_is_refused(call: Callable[[Any], Any], obj: Any) -> None:
    """Nothing would be done or told, and a compiled function is an easy mistake."""
    with pytest.raises(
        ValueError, match=r"\(obj\): obj is .*, which holds no states: give a tensor, a cache, a module"
    ):
        call(obj)
