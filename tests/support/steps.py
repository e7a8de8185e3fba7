"""One-token steps of the classic recurrences, each in many spellings: what people write in PyTorch.

Every `Case` is a function step(state, *inputs) -> output that updates `state` in place, with the ops it must lift to.
Nothing here knows about the compiler.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sizes:
    """B sequences, H heads, K rows, V columns of the state."""

    B: int = 2
    H: int = 3
    K: int = 4
    V: int = 5


DISTINCT, EQUAL = Sizes(), Sizes(3, 3, 3, 3)
Step = Callable[..., Tensor]
Inputs = Callable[[Sizes, torch.Generator], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Case:
    """name: family and spelling; signature: D decay, R read, U update; transposed: the state is [B, H, V, K]."""

    name: str
    signature: str
    step: Step
    inputs: Inputs
    transposed: bool = False

    def make(self, sizes: Sizes, seed: int = 0) -> tuple[Tensor, ...]:
        """A random state and inputs."""
        generator = torch.Generator().manual_seed(seed)
        s = sizes
        shape = (s.B, s.H, s.V, s.K) if self.transposed else (s.B, s.H, s.K, s.V)
        return (torch.randn(shape, generator=generator), *self.inputs(sizes, generator))


def gates(generator: torch.Generator, *shape: int) -> Tensor:
    """Decays spread over 0.35 to 0.999."""
    return 0.35 + 0.649 * torch.rand(shape, generator=generator)


def unit(generator: torch.Generator, *shape: int) -> Tensor:
    """Vectors of length 1 along the last dim: keys of delta rules."""
    return torch.nn.functional.normalize(torch.randn(shape, generator=generator), dim=-1)


# -------------------------------------------------------------------------------------------- spellings


@dataclass(frozen=True)
class Spelling:
    """How the three things that touch a state are written. Functions take and return [B, H, K, V] states.

    decay(S, a): a is [B|1, H] or [B, H, K]. write(S, l, r): S + l r^T. read(S, x): S^T x.
    """

    decay: Callable[[Tensor, Tensor], Tensor]
    write: Callable[[Tensor, Tensor, Tensor], Tensor]
    read: Callable[[Tensor, Tensor], Tensor]


def _along_rows(a: Tensor, S: Tensor) -> Tensor:
    return a[..., None] if a.dim() == 3 else a[..., None, None]


def _scale(S: Tensor, a: Tensor) -> Tensor:
    return S * _along_rows(a, S)


def _scale_(S: Tensor, a: Tensor) -> Tensor:
    return S.mul_(_along_rows(a, S))


def _scale_by_diagonal(S: Tensor, a: Tensor) -> Tensor:
    return torch.einsum("bhk,bhkv->bhkv", a.expand(S.shape[:3]), S) if a.dim() == 3 else _scale(S, a)


def _heads(x: Tensor) -> Tensor:
    """Batch and heads merged."""
    return x.reshape(-1, *x.shape[2:])


def _bmm_read(S: Tensor, x: Tensor) -> Tensor:
    return torch.bmm(_heads(x).unsqueeze(1), _heads(S)).view(S.shape[0], S.shape[1], -1)


def _bmm_write(S: Tensor, l: Tensor, r: Tensor) -> Tensor:
    return S + torch.bmm(_heads(l).unsqueeze(2), _heads(r).unsqueeze(1)).view_as(S)


def _baddbmm(S: Tensor, l: Tensor, r: Tensor) -> Tensor:
    return torch.baddbmm(_heads(S), _heads(l).unsqueeze(2), _heads(r).unsqueeze(1)).view_as(S)


def _outer(l: Tensor, r: Tensor) -> Tensor:
    return l.unsqueeze(-1) * r.unsqueeze(-2)


SPELLINGS: dict[str, Spelling] = {
    "mul_sum": Spelling(
        _scale, lambda S, l, r: S + _outer(l, r), lambda S, x: (S * x.unsqueeze(-1)).sum(dim=-2)
    ),
    "in_place": Spelling(
        _scale_, lambda S, l, r: S.add_(_outer(l, r)), lambda S, x: (x[..., None] * S).sum(-2, keepdim=True)[:, :, 0]
    ),
    "matmul": Spelling(
        _scale,
        lambda S, l, r: torch.matmul(l.unsqueeze(-1), r.unsqueeze(-2)) + S,
        lambda S, x: (S.transpose(-1, -2) @ x.unsqueeze(-1)).squeeze(-1),
    ),
    "bmm": Spelling(_scale, _bmm_write, _bmm_read),
    "einsum": Spelling(
        _scale_by_diagonal,
        lambda S, l, r: S + torch.einsum("bhk,bhv->bhkv", l, r),
        lambda S, x: torch.einsum("bhkv,bhk->bhv", S, x),
    ),
    "addcmul": Spelling(
        _scale_,
        lambda S, l, r: S.addcmul_(l.unsqueeze(-1), r.unsqueeze(-2)),
        lambda S, x: torch.matmul(x.unsqueeze(-2), S).squeeze(-2),
    ),
    "baddbmm": Spelling(_scale, _baddbmm, lambda S, x: (x.unsqueeze(2) @ S).flatten(2)),
}  # fmt: skip


# --------------------------------------------------------------------------------------------- families
# Each takes a spelling and returns step(state, *inputs). The new state is stored with copy_ unless it is the state.


def _stored(state: Tensor, new: Tensor) -> None:
    if new is not state:
        state.copy_(new)


def linear(w: Spelling) -> Step:
    def step(state: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        S = w.write(state, k, v)
        _stored(state, S)
        return w.read(S, q)

    return step


def retnet(w: Spelling) -> Step:
    def step(state: Tensor, q: Tensor, k: Tensor, v: Tensor, a: Tensor) -> Tensor:
        S = w.write(w.decay(state, a[None]), k, v)
        _stored(state, S)
        return w.read(S, q * q.shape[-1] ** -0.5)

    return step


def gla(w: Spelling) -> Step:
    def step(state: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
        S = w.write(w.decay(state, g.exp()), k, v)
        _stored(state, S)
        return w.read(S, q)

    return step


def delta(w: Spelling) -> Step:
    def step(state: Tensor, q: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> Tensor:
        S = w.write(state, k, (v - w.read(state, k)) * beta[..., None])
        _stored(state, S)
        return w.read(S, q)

    return step


def gated_delta(w: Spelling) -> Step:
    def step(state: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
        S = w.decay(state, g.exp())
        S = w.write(S, k, beta.unsqueeze(-1) * (v - w.read(S, k)))
        _stored(state, S)
        return w.read(S, q)

    return step


def ssd(w: Spelling) -> Step:
    def step(state: Tensor, C: Tensor, B: Tensor, x: Tensor, dt: Tensor, A: Tensor, D: Tensor) -> Tensor:
        S = w.write(w.decay(state, torch.exp(dt * A)), B, x * dt[..., None])
        _stored(state, S)
        return w.read(S, C) + x * D[:, None]

    return step


def transposed(make: Callable[[Spelling], Step], w: Spelling) -> Step:
    """The same step on a state stored as [B, H, V, K]."""

    def step(state: Tensor, *inputs: Tensor) -> Tensor:
        return make(w)(state.transpose(-1, -2), *inputs)

    return step


def _qkv(s: Sizes, g: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(s.B, s.H, s.K, generator=g), unit(g, s.B, s.H, s.K), torch.randn(s.B, s.H, s.V, generator=g)


FAMILIES: dict[str, tuple[str, Callable[[Spelling], Step], Inputs]] = {
    "linear": ("UR", linear, _qkv),
    "retnet": ("DUR", retnet, lambda s, g: (*_qkv(s, g), gates(g, s.H))),
    "gla": ("DUR", gla, lambda s, g: (*_qkv(s, g), gates(g, s.B, s.H, s.K).log())),
    "delta": ("RUR", delta, lambda s, g: (*_qkv(s, g), torch.rand(s.B, s.H, generator=g))),
    "gated_delta": (
        "DRUR",
        gated_delta,
        lambda s, g: (*_qkv(s, g), gates(g, s.B, s.H).log(), torch.rand(s.B, s.H, generator=g)),
    ),
    "ssd": (
        "DUR",
        ssd,
        lambda s, g: (*_qkv(s, g), gates(g, s.B, s.H), gates(g, s.H).log(), torch.randn(s.H, generator=g)),
    ),
}


# ------------------------------------------------------------------------------------- as models have it


def gated_delta_of_transformers(state: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """[B, T=1, heads, *] inputs, two value heads for each key head, a loop over tokens into a buffer."""
    q, k = (x.repeat_interleave(2, dim=2) for x in (q, k))
    q, k, v, g, beta = (x.transpose(1, 2).contiguous() for x in (q, k, v, g, beta))
    out = torch.zeros_like(v)
    S = state
    for i in range(v.shape[2]):
        S = S * g[:, :, i].exp().unsqueeze(-1).unsqueeze(-1)
        error = v[:, :, i] - (S * k[:, :, i].unsqueeze(-1)).sum(dim=-2)
        S = S + k[:, :, i].unsqueeze(-1) * (error * beta[:, :, i].unsqueeze(-1)).unsqueeze(-2)
        out[:, :, i] = (S * q[:, :, i].unsqueeze(-1)).sum(dim=-2)
    state.copy_(S)
    return out.transpose(1, 2)


def _grouped_inputs(s: Sizes, g: torch.Generator) -> tuple[Tensor, ...]:
    assert s.H % 2 == 0, "two value heads for each key head"
    heads = s.H // 2
    return (
        torch.randn(s.B, 1, heads, s.K, generator=g),
        unit(g, s.B, 1, heads, s.K),
        torch.randn(s.B, 1, s.H, s.V, generator=g),
        gates(g, s.B, 1, s.H).log(),
        torch.rand(s.B, 1, s.H, generator=g),
    )


def ssd_of_transformers(
    state: Tensor, C: Tensor, B: Tensor, x: Tensor, dt: Tensor, A: Tensor, bias: Tensor, D: Tensor
) -> Tensor:
    """State [B, H, P, N]; the decay is formed at full size, keys are shared by two heads, the read is a bmm."""
    batch, heads, width, n = state.shape
    A = A[:, None, None].expand(heads, width, n)
    dt = torch.nn.functional.softplus(dt[:, :, None].expand(batch, heads, width) + bias[:, None].expand(heads, width))
    decay = torch.exp(dt[..., None] * A)
    B, C = (y[:, :, None].expand(batch, heads // 2, 2, n).reshape(batch, heads, n) for y in (B, C))
    state.copy_(state * decay + dt[..., None] * B[:, :, None] * x[..., None])
    y = torch.bmm(state.view(batch * heads, width, n), C.view(batch * heads, n, 1)).view(batch, heads, width)
    return (y + x * D[:, None].expand(heads, width)).reshape(batch, -1)


def _ssd_inputs(s: Sizes, g: torch.Generator) -> tuple[Tensor, ...]:
    heads = s.H // 2
    return (
        torch.randn(s.B, heads, s.K, generator=g),
        torch.randn(s.B, heads, s.K, generator=g),
        torch.randn(s.B, s.H, s.V, generator=g),
        torch.rand(s.B, s.H, generator=g) - 2.0,
        gates(g, s.H).log() * 2,
        torch.randn(s.H, generator=g),
        torch.randn(s.H, generator=g),
    )


GROUPED, GROUPED_EQUAL = Sizes(3, 4, 6, 5), Sizes(4, 4, 4, 4)


def cases() -> list[Case]:
    """Every family in every spelling, plain and with a transposed state."""
    out = []
    for family, (signature, make, inputs) in FAMILIES.items():
        for name, spelling in SPELLINGS.items():
            out.append(Case(f"{family}-{name}", signature, make(spelling), inputs))
            if name in ("mul_sum", "matmul", "einsum"):
                step = transposed(make, spelling)
                out.append(Case(f"{family}-{name}-transposed", signature, step, inputs, transposed=True))
    return out


def grouped_cases() -> list[Case]:
    """Steps of models with heads in groups; they need an even number of heads."""
    return [
        Case("gated_delta-transformers", "DRUR", gated_delta_of_transformers, _grouped_inputs),
        Case("ssd-transformers", "DUR", ssd_of_transformers, _ssd_inputs, transposed=True),
    ]
