"""Hold one step against a plain reference. The text of this module is part of every file that `emit` writes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

FACTOR, ULPS = 1.5, 8  # a step may err this often as much as the reference in its dtype, and by so much of a dtype


@dataclass(frozen=True)
class Subject:
    """What is checked. run: (state, cursor, rows, operands) -> outputs. reference: (S, *inputs) -> S, outputs.

    inputs: kind and draw() by name. rows: kind and dtype by name. state_order: (0, 1, 2, 3) for states
    [batch, heads, K, V], (0, 1, 3, 2) for [batch, heads, V, K]. tokens: in one step. read_dtype: of the shadow that
    is read, with so many numbers of scale for each head.
    """

    run: Callable[..., Sequence[Tensor]]
    reference: Callable[..., Any]
    variant: str
    sizes: tuple[int, int]
    flush: int
    capacity: int
    tokens: int
    state_dtype: torch.dtype
    state_order: tuple[int, ...]
    inputs: dict[str, tuple[str, str]]
    rows: dict[str, tuple[str, torch.dtype]]
    read_dtype: torch.dtype | None = None
    scale: int = 0

    @property
    def ulp(self) -> float:
        """Of the coarsest dtype in which anything of it is kept."""
        dtypes = [self.state_dtype, *(dtype for _, dtype in self.rows.values())]
        return max(torch.finfo(dtype).eps for dtype in [*dtypes, self.read_dtype or self.state_dtype])

    @property
    def allowed(self) -> str:
        """What is kept in which dtype, and how large an error may be, for people."""
        kept = {"state": self.state_dtype, **{name: dtype for name, (_, dtype) in self.rows.items()}}
        kept |= {"shadow": self.read_dtype} if self.read_dtype else {}
        dtypes = ", ".join(f"{name} {str(dtype).removeprefix('torch.')}" for name, dtype in kept.items())
        return f"{dtypes}; allowed {FACTOR:g} times that of plain torch in this dtype and {ULPS * self.ulp:.3g}"

    def tail(self, kind: str) -> tuple[int, ...]:
        return {"scalar": (), "key": self.sizes[:1], "value": self.sizes[1:]}[kind]


def draw(how: str, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Random float32 numbers: `unit` vectors, `normal` ones, a `gate` in 0.7..0.999, a `rate` in 0..1."""
    if how == "gate":
        return 0.7 + 0.299 * torch.rand(shape, device=device)
    if how == "rate":
        return torch.rand(shape, device=device)
    x = torch.randn(shape, device=device)
    return torch.nn.functional.normalize(x, dim=-1) if how == "unit" else x


def check(subject: Subject, device: torch.device, batch: int = 3, heads: int = 1, steps: int = 0) -> float:
    """Run steps and compare outputs and states with float64; returns the largest relative error.

    The first sequence begins with a state that holds nothing, the last one is padding, and all flush at different
    steps. Drafts are accepted in part. AssertionError where a step errs more than the reference in the state's dtype.
    """
    session = _Session(subject, device, batch, heads)
    for _ in range(steps or 2 * subject.flush // subject.tokens + 3):
        session.step()
    if subject.variant != "recurrent":
        session.cursor[1] = 0  # the next step begins with a flush
    session.settle()
    return session.worst


class _Session:
    """A state that is stepped through `run`, and the same by the reference, in float64 and in its own dtype."""

    def __init__(self, subject: Subject, device: torch.device, batch: int, heads: int) -> None:
        self.subject, self.device, self.lanes = subject, device, (batch, heads)
        self.worst = 0.0
        start = 0.1 * torch.randn(*self.lanes, *subject.sizes, device=device)
        self.logged = subject.variant != "recurrent"
        if self.logged:
            start[0] = 0.0
        self.dense = [start.to(subject.state_dtype).to(real) for real in (torch.float64, torch.float32)]
        self.state = (
            start.to(subject.state_dtype).permute(subject.state_order).clone(memory_format=torch.contiguous_format)
        )
        self.view = self.state.permute(subject.state_order)
        self.live = torch.ones(batch, dtype=torch.bool, device=device)
        self.cursor = torch.zeros(4, batch, dtype=torch.int32, device=device)
        self.rows: list[Tensor] = []
        if self.logged:
            self._logs()

    def _logs(self) -> None:
        """Empty rows, the cursors of all cases, and NaN wherever nothing may be read."""
        subject, batch = self.subject, self.lanes[0]
        for kind, dtype in subject.rows.values():
            shape = (*self.lanes, subject.capacity, *subject.tail(kind))
            self.rows.append(torch.full(shape, torch.nan, dtype=dtype, device=self.device))
        if subject.read_dtype is not None:
            shadow = torch.full_like(self.state, torch.nan, dtype=subject.read_dtype)
            self.rows += [shadow, torch.zeros(*self.lanes, subject.scale, device=self.device)]
        self.cursor[1] = 1 + torch.arange(batch, dtype=torch.int32, device=self.device) % subject.flush
        self.cursor[3, 0] = 1
        self.view[0] = torch.nan
        if batch > 2:
            self.live[-1], self.cursor[0, -1] = False, -1

    def step(self) -> None:
        """One call, whose outputs are compared; of a draft a different part of each sequence is kept."""
        subject, tokens = self.subject, self.subject.tokens
        many = (tokens,) if subject.variant == "verify" else ()
        operands = [
            draw(how, (*self.lanes, *many, *subject.tail(kind)), self.device) for kind, how in subject.inputs.values()
        ]
        outputs = subject.run(self.state, self.cursor, self.rows, operands)
        kept = torch.full(self.lanes[:1], tokens, device=self.device)
        if many:
            kept = torch.randint(0, tokens + 1, self.lanes[:1], device=self.device)
            self.cursor[0] -= torch.where(self.live, tokens - kept, 0).int()
        exact, eager = (self._reference(n, operands, kept) for n in (0, 1))
        for got, want, near in zip(outputs, exact, eager, strict=True):
            assert not got[~self.live].any(), "a padding sequence gives zero"
            self._compare(got[self.live], want[self.live], near[self.live], "output")

    def _reference(self, n: int, operands: list[Tensor], kept: Tensor) -> list[Tensor]:
        subject, S = self.subject, self.dense[n]
        per_token = []
        for t in range(subject.tokens):
            given = [x[:, :, t] if subject.variant == "verify" else x for x in operands]
            new, outputs = subject.reference(S, *(x.to(S.dtype) for x in given))
            S = torch.where((t < kept)[:, None, None, None] & self.live[:, None, None, None], new, self.dense[n])
            self.dense[n] = S if n == 0 else S.to(subject.state_dtype).to(S.dtype)
            S = new
            per_token.append(outputs)
        if subject.variant != "verify":
            return list(per_token[0])
        return [torch.stack(same, dim=2) for same in zip(*per_token, strict=True)]

    def settle(self) -> None:
        """Compare the states. Those of logs are whole, but for the last token, after a step that flushes."""
        exact, eager = self.dense
        if self.logged:
            self.step()
        self._compare(self.view[self.live], exact[self.live], eager[self.live], "state")

    def _compare(self, got: Tensor, exact: Tensor, eager: Tensor, what: str) -> None:
        scale = exact.abs().max()
        error = float((got.double() - exact).abs().max() / scale)
        allowed = FACTOR * float((eager.double() - exact).abs().max() / scale) + ULPS * self.subject.ulp
        assert error <= allowed, f"{what}: relative error {error:.3g}, allowed {allowed:.3g}"
        self.worst = max(self.worst, error)
