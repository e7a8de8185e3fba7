"""Shadows of compiled states: never stale, whoever writes; made where they pay, gone with the state."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from kvbuffer_compile import Options, explain, materialize, rollback, stats
from kvbuffer_compile.accounts.account import Account
from kvbuffer_compile.accounts.ledger import LEDGER
from kvbuffer_compile.codegen import build
from kvbuffer_compile.errors import OptionError
from kvbuffer_compile.ir.plan import Plan
from kvbuffer_compile.ir.shadow import Shadow
from kvbuffer_compile.passes.choice import choose
from kvbuffer_compile.runtime import by_hand
from kvbuffer_compile.steps import composite, shadows
from tests.program.test_choose import FAR, KERNELS, NEAR, TIMED, lifted
from tests.runtime.test_runtime import LAZY, B, H, K, L, Pair, V, step

targets = ["aten", pytest.param("cpp", marks=pytest.mark.skipif(build.compiler() is None, reason="no compiler"))]
HALF = {"read_dtype": torch.float16}
# Bound by memory where that is far, and by conversions where it is near.
FAST = replace(
    TIMED, threads=8, speeds=(replace(NEAR, kernel_read=400e9), FAR), kernels=replace(KERNELS, narrow_read=4e-10)
)


def draw(batch: int = B) -> tuple[torch.Tensor, ...]:
    """Keys that replace one row of the state by a value: numbers stay small integers, exact in float16."""
    k = torch.nn.functional.one_hot(torch.randint(K, (batch, H)), K).float()
    v = torch.randint(-4, 5, (batch, H, V)).float()
    return torch.randint(-2, 3, (batch, H, K)).float(), k, v, torch.zeros(batch, H), torch.ones(batch, H)


def linear(S, q, k, v, g, beta):
    """Linear attention: what is written does not depend on what is read."""
    S.add_(k[..., None] * v[..., None, :])
    return (S * q[..., None]).sum(-2)


class Exact:
    """A compiled step on integers beside the eager one."""

    def __init__(self, target: str = "aten", start: float = 4.0, fn=step, **options) -> None:
        torch._dynamo.reset()
        self.fn = fn
        options = {"flush": L, "inner": "eager", "target": target, **HALF, **options}
        self.compiled = torch.compile(fn, backend="kvbuffer", options=options)
        self.state = (torch.randint(-1, 2, (B, H, K, V)) * start).float()
        self.eager = self.state.clone()

    def run(self, steps: int = 1) -> bool:
        """Whether all outputs are equal."""
        same = True
        for _ in range(steps):
            inputs = draw()
            with torch.no_grad():
                same &= torch.equal(self.compiled(self.state, *inputs), self.fn(self.eager, *inputs))
        return same

    def write(self, change: Callable[[torch.Tensor], object]) -> None:
        """From outside."""
        change(self.state)
        change(self.eager)

    @property
    def account(self) -> Account:
        (account,) = by_hand.accounts_of(self.state)
        return account

    @property
    def shadowed(self) -> bool:
        """Whether the next step can read the shadow, of all sequences."""
        return bool((self.account.shadow[1] > 0).all())


WRITES: dict[str, Callable[[torch.Tensor], object]] = {
    "in place": lambda s: s.mul_(2),
    "a part": lambda s: s[1].fill_(3),
    "overwritten": lambda s: s.copy_(torch.ones_like(s)),
    "zeroed": lambda s: s.zero_(),
    "through data": lambda s: s.data.add_(1),
}


@pytest.mark.parametrize("target", targets)
def test_outputs_are_exact_whoever_writes(target: str) -> None:
    run = Exact(target)
    assert run.run(L + 2) and run.shadowed
    for change in WRITES.values():
        run.write(change)
        assert run.run(L + 2) and run.shadowed
    assert torch.equal(run.state, run.eager)
    assert not run.shadowed, "whoever has looked may write"
    rollback_and_go_on(run)


def rollback_and_go_on(run: Exact) -> None:
    assert run.run(L + 1)
    before = run.eager.clone()
    run.run(1)
    rollback(run.state, 1)
    run.eager.copy_(before)
    assert run.shadowed, "rolling back leaves the base as it is, and its shadow"
    assert run.run(2)
    materialize(run.state)
    assert torch.equal(run.state, run.eager)


def unscaled(state, kind, dtype, right=shadows.shadow_of):
    found = right(state, kind, dtype)
    return Shadow(found.values, torch.ones_like(found.scale), kind)


def test_a_stale_shadow_would_be_noticed(monkeypatch) -> None:
    run = Exact()
    assert run.run(L + 2)
    monkeypatch.setattr(Account, "forget_shadow", lambda self: None)
    run.write(WRITES["in place"])
    assert not run.run(2)


def test_a_forgotten_scale_would_be_noticed(monkeypatch) -> None:
    monkeypatch.setattr(shadows, "shadow_of", unscaled)
    assert not Exact().run(L + 2)


def test_the_state_is_folded_into_itself(monkeypatch) -> None:
    """Numbers that a float16 does not hold: what is read of them is rounded, the state is not."""
    run = Exact(start=4097.0, fn=linear)
    assert not run.run(3 * L) and run.shadowed
    assert torch.equal(run.state, run.eager)
    right = composite.flush

    def from_shadow(plan, state, cursor, rows, which):
        there = shadows.shadow_in(plan, plan.parted(rows)[1])
        if there is not None and bool(which.any()):
            state.copy_(torch.where(there.scale[..., None, :] > 0, there.state(torch.float32), state))
        right(plan, state, cursor, rows, which)

    monkeypatch.setattr(composite, "flush", from_shadow)
    run = Exact(start=4097.0, fn=linear)
    run.run(2 * L)
    assert not torch.equal(run.state, run.eager)


def test_a_step_that_fails_leaves_a_right_shadow_or_none(monkeypatch) -> None:
    run = Exact()
    assert run.run(L + 2)
    right, left = composite.run_tokens, 2 * L

    def failing(*args):
        raise KeyboardInterrupt

    for _ in range(left):
        monkeypatch.setattr(composite, "run_tokens", failing)
        with pytest.raises(KeyboardInterrupt), torch.no_grad():
            run.compiled(run.state, *draw())
        monkeypatch.setattr(composite, "run_tokens", right)
        assert run.run(1) and run.shadowed
    assert torch.equal(run.state, run.eager)


def test_memory_that_others_can_write_has_no_shadow() -> None:
    run = Exact()
    held = run.state.view(-1)[:]  # made before the state is guarded
    assert run.run(3)
    assert run.account.shadow[1].isnan().all()
    held.add_(1)
    run.eager.add_(1)
    assert run.run(3)


def test_memory_of_a_shadow() -> None:
    """Counted beside the rows, none for a state without memory, gone with the state."""
    run = Exact()
    run.run(2)
    shadow, scale = run.account.shadow
    rows = sum(r.untyped_storage().nbytes() for r in (run.account.cursor, *run.account.rows))
    assert run.account.row_bytes == rows and run.account.shadow_bytes == 2 * B * H * K * V + 4 * B * H * V
    found = stats(run.state)
    assert found.total("shadow_bytes") == run.account.shadow_bytes
    assert "copies that steps read in the states' place" in str(found)
    fresh = Exact(capacity=10)
    fresh.state = by_hand.zero_state((B, H, K, V), torch.float32, torch.device("cpu"))
    fresh.eager.zero_()
    assert fresh.run(2)
    assert [x.untyped_storage().nbytes() for x in (fresh.account.state, fresh.account.shadow[0])] == [0, 0]
    assert fresh.run(3 * L) and fresh.shadowed
    assert torch.equal(fresh.state, fresh.eager)
    accounts = len(LEDGER.accounts)
    del run, shadow, scale
    gc.collect()
    assert len(LEDGER.accounts) == accounts - 1


def test_a_step_is_as_near_as_half_precision_allows(records) -> None:
    """A float32 model reads in float16 only when that is asked for."""
    pair = Pair(read_dtype="auto")
    pair.run(L)
    assert by_hand.accounts_of(pair.state)[0].shadow == ()
    torch._dynamo.reset()
    pair = Pair(**HALF)
    for _ in range(3 * L):
        inputs = draw()
        with torch.no_grad():
            out, want = pair.compiled(pair.state, *inputs), step(pair.exact, *(x.double() for x in inputs))
        assert (out - want).abs().max() <= 2**-10 * want.abs().max()
    assert len(records) == 2 and all(len(r.rewritten) == 1 for r in records)


def test_what_is_asked_for_is_checked_and_told() -> None:
    with pytest.raises(OptionError, match="read_dtype"):
        Options(read_dtype=torch.float32)
    with torch.no_grad():
        report = explain(step, torch.zeros(B, H, K, V), *draw(), options={"flush": L, "target": "aten", **HALF})
    (state,) = report.states
    assert (state.reads, state.shadow_bytes) == ("float16", 2 * B * H * K * V + 4 * B * H * V)
    assert "float16" in str(report)


# ------------------------------------------------------------------------------------- what "auto" takes


def in_bfloat16(S, q, k, v, g, beta):
    """As models have it: computed in float32, from and to bfloat16."""
    k = torch.nn.functional.normalize(k.float(), dim=-1)
    return step(S, q.float() * K**-0.5, k, v.float(), -g.float().exp(), beta.float().sigmoid()).bfloat16()


def keeps_float32(S, *inputs):
    return step(S, *(x.float() for x in inputs))


@pytest.mark.parametrize(
    ("fn", "dtype", "taken"),
    [
        (in_bfloat16, torch.bfloat16, True),
        (in_bfloat16, torch.float32, False),
        (keeps_float32, torch.bfloat16, False),
    ],
    ids=["bfloat16", "float32 operands", "float32 outputs"],
)
def test_auto_is_for_16_bit_values(fn, dtype: torch.dtype, taken: bool, monkeypatch) -> None:
    monkeypatch.setattr(choose, "EQUAL", 0.0)  # a state as small gains nothing
    state = torch.zeros(B, H, K, V)
    compiled = torch.compile(fn, backend="kvbuffer", options={**LAZY, "read_dtype": "auto"})
    with torch.no_grad():
        compiled(state, *(x.to(dtype) for x in draw()))
    (account,) = by_hand.accounts_of(state)
    assert bool(account.shadow) == taken


def test_auto_is_for_what_gains(monkeypatch) -> None:
    """As predicted for a state that comes from memory, and for one that is near."""

    monkeypatch.setattr(choose, "possible_read", lambda found, options: torch.float16)

    def read_dtype(batch: int) -> torch.dtype | None:
        plan = choose.choose(lifted(lanes=(batch, 32)), Options(read_dtype="auto", flush=16), FAST, "cpp")
        assert isinstance(plan, Plan)
        return plan.read_dtype

    assert [read_dtype(n) for n in (1, 128)] == [None, torch.float16]
    asked = choose.choose(lifted(lanes=(1, 32)), Options(read_dtype=torch.float16, flush=16), FAST, "cpp")
    assert isinstance(asked, Plan) and asked.read_dtype == torch.float16


@pytest.mark.skipif(build.compiler() is None, reason="needs a C++ compiler")
def test_a_compiler_without_float16_makes_kernels_that_read_the_state(monkeypatch, records) -> None:
    monkeypatch.setenv("CXX", "g++ -U__FLT16_MAX__")
    run = Exact("cpp", capacity=11)  # a plan that no other test has built
    with pytest.warns(UserWarning, match="no float16|composite steps"):
        assert run.run(1)
    assert run.run(2 * L) and run.account.shadow == ()
    assert {plan.target for r in records for _, plan in r.rewritten} == {"cpp"}


def failing(S, q, k, v, table, index):
    S.mul_(0.9)
    S.add_(k[..., None] * v[..., None, :])
    out = (S * q[..., None]).sum(-2)
    return out + table[index + (out.abs().amax() > 1e30).long()]


@pytest.mark.parametrize("shared", ["numpy", "view"])
def test_memory_of_others_written_after_a_step_that_failed(shared: str) -> None:
    """The step has made a shadow, and nobody has folded anything in."""
    compiled = torch.compile(
        failing, backend="kvbuffer", options={"flush": 4, "inner": "eager", "target": "aten", **HALF}
    )
    memory = torch.randn(B, H, K, V).numpy()
    state = torch.from_numpy(memory) if shared == "numpy" else torch.tensor(memory)
    other = state.view(-1)
    q, k, v = torch.randn(B, H, K), torch.randn(B, H, K), torch.randn(B, H, V)
    with torch.no_grad():
        with pytest.raises(IndexError):
            compiled(state, q, k, v, torch.zeros(5, 1), torch.tensor([100]))
        if shared == "numpy":
            memory[:] = 7
        else:
            other.fill_(7)
        expected = torch.full((B, H, K, V), 7.0)
        given = q, k, v, torch.zeros(5, 1), torch.tensor([0])
        torch.testing.assert_close(compiled(state, *given), failing(expected, *given), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(state + 0, expected)


def test_check_allows_for_the_rounding_of_shadows() -> None:
    run = torch.compile(
        linear, backend="kvbuffer", options={"flush": 4, "inner": "eager", "target": "aten", "check": True, **HALF}
    )
    state = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        for _ in range(6):
            q, k, v = torch.randn(3, 2, 3, 64)
            run(state, q, k, v, torch.zeros(2, 3), torch.ones(2, 3))
    assert by_hand.accounts_of(state)[0].shadow
