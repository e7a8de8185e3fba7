"""The one place with tolerances: a run is right when it is as near to float64 as the eager model is.

Errors are differences from the same computation in float64, each relative to the largest value of its step, so that
every step counts alike however the numbers grow or fade. Two figures are judged for every name:

- The root mean square of each step, and the mean of these over the run, finds what is a little wrong all the time: a
  gate that is rounded, an offset, a sum in too low a precision. Rounding averages out in a run: logits of three models
  and 24 texts had 0.89 to 1.12 times eager's, as one root over all tokens, where single tokens had up to 2 times.
  It is not one root because at some tokens a model is many times as sensitive as at others: the luck of such a token
  made 1.42 times eager's of 20 tokens of Granite 4. The mean of the roots is 1.21.
- The largest error of the run finds what is wrong once: a row that is lost, a read of a stale state. It is a matter of
  luck, and of the kernels that this CPU gets: 0.5 to 1.6 times eager's in such runs, up to 2.5 times at one token.
  WIDE is beyond that and far below a fault: one lost row is 100,000 times what is allowed in float32, and even in
  bfloat16 twice (tests/program/test_oracle.py).

What is not finite is a failure, eager's numbers included: they would allow anything.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

FACTOR = 1.5  # of the root mean square of the errors of eager in its working dtype
WIDE = 4.0  # of the largest of them
ULPS = 2  # of the values, for results where eager happens to be exact; 0.6 were needed in 200 random recurrences
JUDGE_ULPS = 8  # in float64, where the judge rounds as much as eager does and nothing tells how much
# Of fewer numbers eager's errors are luck as well: a sum of five reads, three times a step, erred by 1.5 ulps in eager
# and by 8 in a kernel, of 200 random recurrences the worst. The largest of them is allowed as many as in float64.
FEW = 256


@dataclass
class Tally:
    """Numbers of one side of a run, relative to the largest exact value of their step."""

    roots: float = 0.0  # sum over the steps of their root mean squares
    largest: float = 0.0
    at: int = 0  # step of the largest

    def add(self, numbers: Tensor, step: int) -> None:
        self.roots += float(numbers.square().mean().sqrt())
        largest = float(numbers.abs().max())
        if largest > self.largest:
            self.largest, self.at = largest, step


@dataclass
class Series:
    """One result of a run, step after step."""

    steps: int = 0
    numbers: int = 0
    ulp: float = 0.0
    got: Tally = field(default_factory=Tally)
    eager: Tally = field(default_factory=Tally)
    exact: Tally = field(default_factory=Tally)

    def add(self, got: Tensor, eager: Tensor, exact: Tensor) -> None:
        if eager.is_floating_point():
            self.ulp = max(self.ulp, torch.finfo(eager.dtype).eps)
        exact = exact.double()
        scale = exact.abs().max().clamp_min(1e-30)
        self.got.add((got.double() - exact) / scale, self.steps)
        self.eager.add((eager.double() - exact) / scale, self.steps)
        self.exact.add(exact / scale, self.steps)
        self.steps += 1
        self.numbers += exact.numel()

    def mean(self, tally: Tally) -> float:
        return tally.roots / self.steps

    def faults(self) -> list[str]:
        ulps = ULPS if self.ulp > torch.finfo(torch.float64).eps else JUDGE_ULPS
        mean, allowed = self.mean(self.got), FACTOR * self.mean(self.eager) + ulps * self.ulp * self.mean(self.exact)
        once = ulps if self.numbers >= FEW else JUDGE_ULPS
        largest, at_most = self.got.largest, WIDE * self.eager.largest + once * self.ulp * self.exact.largest
        found = []
        if not mean <= allowed:
            found.append(f"root mean square error of {self.steps} steps {mean:.3g}, allowed {allowed:.3g}")
        if not largest <= at_most:
            found.append(f"error {largest:.3g} at step {self.got.at}, allowed {at_most:.3g}")
        return found


class Oracle:
    """Collects the results of a run by name and judges each over all steps.

    As a context manager it judges at the end.
    """

    def __init__(self) -> None:
        self.series: dict[str, Series] = {}

    def add(self, got: Tensor, eager: Tensor, exact: Tensor, what: str = "result") -> None:
        """One step. exact: the same computation in float64. eager: in the working dtype, whose rounding is the measure.
        Integers and truth values must be equal, at once."""
        series = self.series.setdefault(what, Series())
        where = f"{what} at step {series.steps}"
        assert got.shape == eager.shape == exact.shape, f"{where}: {got.shape}, {eager.shape}, {exact.shape}"
        for side, numbers in (("exact", exact), ("eager", eager), ("got", got)):
            assert numbers.isfinite().all(), f"{where}: {side} is not finite"
        if not eager.is_floating_point():
            assert not ((got != exact) & (eager == exact)).any(), f"{where}: {got} is not {exact}"
        if exact.numel():
            series.add(got, eager, exact)

    def check(self, got: Tensor, eager: Tensor, exact: Tensor, what: str = "result") -> None:
        """One more step, and whether all is well so far."""
        self.add(got, eager, exact, what)
        self.judge()

    def judge(self) -> None:
        """AssertionError when a result is worse than allowed, or when there was nothing to judge."""
        assert self.series, "nothing was compared"
        judged = [(what, series) for what, series in self.series.items() if series.steps]
        found = [f"{what}: {fault}" for what, series in judged for fault in series.faults()]
        assert not found, "\n".join(found)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        if kind is None:
            self.judge()


def check(got: Tensor, eager: Tensor, exact: Tensor, what: str = "result") -> None:
    """A single comparison. Steps of one run belong in an Oracle: a few numbers say little about rounding."""
    Oracle().check(got, eager, exact, what)


def check_steps(got: Iterable[Tensor], eager: Iterable[Tensor], exact: Iterable[Tensor], what: str = "result") -> None:
    """One result of a run, at every step."""
    with Oracle() as oracle:
        for step in zip(got, eager, exact, strict=True):
            oracle.add(*step, what)
