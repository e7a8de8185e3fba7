"""The judge itself: it passes what is right, and no fault that a buffered run can have gets by.

A run is a Gated DeltaNet of 60 tokens with up to seven rows owed. Its gates are spread so that a row is still seen some
tokens later, as in a real model. Only outputs are shown to the oracle: of a whole model, logits are all there is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from kvbuffer_compile.ir.memory import Buffered, Dense, Row
from kvbuffer_compile.ir.program import run
from tests.program.test_memory import FlushWithoutScale, ForgetsFreshRow, ReadsOverTheWrongDecay, RowsNotDecayed
from tests.support.oracle import Oracle, check, check_steps
from tests.support.programs import NAMED
from tests.support.steps import gates, unit

TOKENS, FLUSH = 60, 7
B, H, K, V = 2, 3, 8, 5
Inputs = dict[str, Tensor]


@functools.cache
def text(seed: int, dtype: torch.dtype) -> list[Inputs]:
    g = torch.Generator().manual_seed(seed)
    tokens = [
        {
            "q": torch.randn(B, H, K, generator=g),
            "k": unit(g, B, H, K),
            "v": torch.randn(B, H, V, generator=g),
            "g": gates(g, B, H),
            "beta": torch.rand(B, H, generator=g),
        }
        for _ in range(TOKENS)
    ]
    return converted(tokens, dtype)


@dataclass
class Decoder:
    """Decodes with rows owed. A fault is a subclass, and what happens once happens at token `at`."""

    at: int = -1
    flush: int = FLUSH
    memory: type[Buffered] = Buffered
    outs: list[Tensor] = field(default_factory=list)

    def decode(self, tokens: list[Inputs]) -> list[Tensor]:
        base = torch.zeros(B, H, K, V, dtype=tokens[0]["q"].dtype)
        self.owed = self.memory(Dense(base), (K, V))
        for t, token in enumerate(tokens):
            self.outs.append(self.out(t, self.step(t, self.given(t, dict(token)))))
            self.after(t)
            if t % self.flush == self.flush - 1:
                base = self.flushed(t, self.owed.flushed(base))
                self.owed = self.memory(Dense(base), (K, V))
        return self.outs

    def step(self, t: int, token: Inputs) -> Tensor:
        return run(NAMED["gdn"], self.owed, token)["o"]

    def given(self, t: int, token: Inputs) -> Inputs:
        return token

    def out(self, t: int, out: Tensor) -> Tensor:
        return out

    def after(self, t: int) -> None:
        """Change what is owed after a token."""

    def flushed(self, t: int, base: Tensor) -> Tensor:
        return base

    def replace_newest(self, change: Callable[[Row], Row]) -> None:
        newest = self.owed.log[-1]
        assert isinstance(newest, Row)
        self.owed.log[-1] = change(newest)


def of_first_sequence(x: Tensor, factor: float) -> Tensor:
    return torch.cat([x[:1] * factor, x[1:]])


class DroppedRow(Decoder):
    def after(self, t: int) -> None:
        if t == self.at:
            self.replace_newest(lambda row: Row(of_first_sequence(row.left, 0), row.right))


class RowFoldedTwice(Decoder):
    def after(self, t: int) -> None:
        if t == self.at:
            self.replace_newest(lambda row: Row(of_first_sequence(row.left, 2), row.right))


class StaleStep(Decoder):
    """The step is taken, but what it gives was read from the state before it."""

    def step(self, t: int, token: Inputs) -> Tensor:
        stale = self.owed.read(token["q"], "key")
        out = super().step(t, token)
        return stale if t == self.at else out


class LostStep(Decoder):
    def step(self, t: int, token: Inputs) -> Tensor:
        count = len(self.owed.log)
        out = super().step(t, token)
        if t == self.at:
            del self.owed.log[count:]
        return out


class OtherHead(Decoder):
    """One head of one sequence shows what another one read."""

    def out(self, t: int, out: Tensor) -> Tensor:
        if t == self.at:
            out[0, 0] = out[0, 1]
        return out


class RoundedGate(Decoder):
    def given(self, t: int, token: Inputs) -> Inputs:
        return {**token, "g": token["g"].bfloat16().float()}


class RoundedGateOnce(RoundedGate):
    def given(self, t: int, token: Inputs) -> Inputs:
        return super().given(t, token) if t == self.at else token


class RoundedRows(Decoder):
    def after(self, t: int) -> None:
        self.replace_newest(lambda row: Row(row.left, row.right.bfloat16().float()))


class RoundedBaseOnce(Decoder):
    def flushed(self, t: int, base: Tensor) -> Tensor:
        return base.bfloat16().float() if t // FLUSH == self.at // FLUSH else base


ONCE = (DroppedRow, RowFoldedTwice, StaleStep, LostStep, OtherHead)
MUTANTS = (RowsNotDecayed, FlushWithoutScale, ForgetsFreshRow, ReadsOverTheWrongDecay)


def converted(tokens: list[Inputs], dtype: torch.dtype) -> list[Inputs]:
    return [{name: x.to(dtype) for name, x in token.items()} for token in tokens]


@functools.cache
def plain(dtype: torch.dtype, seed: int, working: torch.dtype) -> list[Tensor]:
    """Outputs of the recurrence itself on inputs that are rounded to `dtype`."""
    dense = Dense(torch.zeros(B, H, K, V, dtype=working))
    return [run(NAMED["gdn"], dense, token)["o"] for token in converted(text(seed, dtype), working)]


def beside(decoder: Decoder, dtype: torch.dtype, seed: int = 0) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Outputs of a decoder, which computes in float32 whatever the dtype, of eager and of float64."""
    got = decoder.decode(converted(text(seed, dtype), torch.float32))
    return [out.to(dtype) for out in got], plain(dtype, seed, dtype), plain(dtype, seed, torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("flush", [1, FLUSH, 16])
def test_what_is_right_passes(flush: int, dtype: torch.dtype) -> None:
    for seed in range(5):
        check_steps(*beside(Decoder(flush=flush), dtype, seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("at", [2, 31, TOKENS - 2])
@pytest.mark.parametrize("fault", ONCE)
def test_a_fault_at_one_token_is_caught(fault: type[Decoder], at: int, dtype: torch.dtype) -> None:
    with pytest.raises(AssertionError, match="error .* allowed"):
        check_steps(*beside(fault(at), dtype))


@pytest.mark.parametrize("fault", [RoundedGate, RoundedGateOnce, RoundedRows, RoundedBaseOnce])
def test_rounding_through_sixteen_bits_is_caught(fault: type[Decoder]) -> None:
    with pytest.raises(AssertionError, match="error .* allowed"):
        check_steps(*beside(fault(31), torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("memory", MUTANTS)
def test_mutants_of_the_memory_are_caught(memory: type[Buffered], dtype: torch.dtype) -> None:
    with pytest.raises(AssertionError, match="error .* allowed"):
        check_steps(*beside(Decoder(memory=memory), dtype))


# ------------------------------------------------------------------------------------------------- its figures


def noise(seed: int, size: float = 1e-6) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [size * torch.randn(4, 16, generator=g, dtype=torch.float64) for _ in range(TOKENS)]


@pytest.fixture
def exact() -> list[Tensor]:
    return noise(2, size=1.0)


def judged(exact: list[Tensor], error: list[Tensor]) -> bool:
    """Whether these errors are allowed where eager's are noise."""
    try:
        check_steps(*([e + x for e, x in zip(some, exact, strict=True)] for some in (error, noise(1))), exact)
    except AssertionError:
        return False
    return True


def test_errors_like_those_of_eager_pass(exact: list[Tensor]) -> None:
    assert all(judged(exact, noise(seed, 1.3e-6)) for seed in range(3, 9))


def test_errors_larger_all_the_time_are_caught(exact: list[Tensor]) -> None:
    assert not any(judged(exact, noise(seed, 1.7e-6)) for seed in range(3, 9))


def test_an_offset_is_caught(exact: list[Tensor]) -> None:
    """Smaller than a third of the largest error, where the largest error alone would let it pass."""
    offset = [x + 1.3e-6 for x in noise(3)]
    assert max(float(x.abs().max()) for x in offset) < 1.5 * max(float(x.abs().max()) for x in noise(1))
    assert not judged(exact, offset)


def test_one_error_may_be_larger_than_the_largest_of_eager(exact: list[Tensor]) -> None:
    """As it is on another CPU; not by much, and in no other step."""
    largest = max(float(x.abs().max()) for x in noise(1))
    for factor, allowed in ((2, True), (10, False)):
        error = noise(3)
        error[17][0, 0] = factor * largest
        assert judged(exact, error) == allowed


def test_steps_count_alike_whatever_their_size() -> None:
    """A fault in a step of small numbers is not lost among the rounding of large ones."""
    exact = [x * 10.0 ** -(t // 10) for t, x in enumerate(noise(2, size=1.0))]
    eager, got = ([x * (1 + e) for x, e in zip(exact, noise(seed), strict=True)] for seed in (1, 3))
    check_steps(got, eager, exact)
    got[55] *= 1.001
    with pytest.raises(AssertionError, match="step 55"):
        check_steps(got, eager, exact)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("side", ["got", "eager", "exact"])
def test_what_is_not_finite_fails(exact: list[Tensor], side: str, bad: float) -> None:
    sides = {name: [x.clone() for x in exact] for name in ("got", "eager", "exact")}
    sides[side][30][1, 2] = bad
    with pytest.raises(AssertionError, match=f"step 30: {side} is not finite"):
        check_steps(*sides.values())


def test_where_eager_is_exact_a_few_ulps_are_allowed() -> None:
    value = torch.linspace(1, 2, 100)
    check(value * (1 + 1.5e-7), value, value)
    with pytest.raises(AssertionError, match="root mean square"):
        check(value * (1 + 4e-7), value, value)


def test_integers_and_truth_values_are_equal() -> None:
    numbers = torch.arange(5)
    check(numbers, numbers, numbers)
    for got in (numbers + 1, numbers > 2):
        with pytest.raises(AssertionError, match="is not"):
            check(got, numbers, numbers)


def test_shapes_are_equal() -> None:
    with pytest.raises(AssertionError, match=r"step 0: torch.Size\(\[1, 3\]\)"):
        check(torch.zeros(1, 3), torch.zeros(2, 3), torch.zeros(2, 3))


def test_every_result_of_a_run_is_judged() -> None:
    right, wrong = torch.ones(3), 2 * torch.ones(3)
    with pytest.raises(AssertionError, match=r"b: root.*\nb: error"), Oracle() as oracle:
        oracle.add(right, right, right, "a")
        oracle.add(wrong, right, right, "b")


def test_a_run_without_results_proves_nothing() -> None:
    with pytest.raises(AssertionError, match="nothing was compared"):
        check_steps([], [], [])
    with pytest.raises(ValueError, match="shorter"):
        check_steps([torch.ones(1)], [], [])


def test_the_error_of_a_run_is_not_hidden_by_its_judgement() -> None:
    with pytest.raises(KeyError), Oracle():
        raise KeyError("step")
