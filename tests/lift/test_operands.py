"""Operands as their callers make them: expanded beforehand, by one linear layer for all tokens, by a solver."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvbuffer_compile.backend import GraphRecord
from kvbuffer_compile.integrations.functions.adapters import GATED
from kvbuffer_compile.passes.tokens.lists import OVERLOADS
from tests.lift.test_forms import FAST, signatures
from tests.spelled.forms import outer, read

B, T, H, K, V, D = 2, 3, 2, 4, 6, 8


def decayed(S: Tensor, q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> Tensor:
    """decay [B, H, K, V]: only of heads if its caller expanded it."""
    S.copy_(S * decay + outer(k, v))
    return read(S, q)


def test_what_a_caller_expanded_is_constant(records: list[GraphRecord]) -> None:
    """A full decay of the same shape is another graph."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(B, H, n, generator=g) for n in (K, K, V))
    narrow = torch.rand(B, H, 1, 1, generator=g).expand(B, H, K, V)
    full = torch.rand(B, H, K, V, generator=g)
    state = torch.randn(B, H, K, V, generator=g)
    other, run = state.clone(), torch.compile(decayed, backend="kvbuffer", fullgraph=True, options=FAST)
    with torch.no_grad():
        for decay in (narrow, narrow, full, narrow, full):
            torch.testing.assert_close(run(state, q, k, v, decay), decayed(other, q, k, v, decay))
    torch.testing.assert_close(state + 0, other)
    served = [signatures(record) for record in records]
    assert ["DUR"] in served and [] in served
    assert {why.rule for record in records for why in record.declined} == {"full-decay"}


@pytest.mark.parametrize("made", ["of rows", "of features"])
def test_tokens_beside_other_indices_in_a_dim(made: str, records: list[GraphRecord]) -> None:
    """(x W).view(B, T, H, V) of a linear layer's [B * T, H * V], or of [B, T * H * V]: one token is several steps."""
    g = torch.Generator().manual_seed(0)
    width = H * V if made == "of rows" else T * H * V
    weight = torch.randn(D, width, generator=g) / 4

    def step(S: Tensor, x: Tensor, q: Tensor, k: Tensor, decay: Tensor) -> Tensor:
        v = torch.nn.functional.linear(x, weight.to(x.dtype).t()).view(B, T, H, V)
        operands = [decay, *(y.transpose(1, 2) for y in (k, v, q))]
        new, out = torch.ops.kvbuffer.sequence(S, operands, GATED["s"])
        S.copy_(new)
        return out

    x = torch.randn(B, T if made == "of rows" else 1, D, generator=g)
    q, k = (torch.randn(B, T, H, K, generator=g) for _ in range(2))
    decay, state = torch.rand(B, H, T, generator=g), torch.randn(B, H, K, V, generator=g)
    other, run = state.clone(), torch.compile(step, backend="kvbuffer", fullgraph=True, options=FAST)
    with torch.no_grad():
        for _ in range(4):
            torch.testing.assert_close(run(state, x, q, k, decay), step(other, x, q, k, decay))
    torch.testing.assert_close(state + 0, other)
    assert records and all(signatures(record) == ["DUR"] for record in records)


def test_a_solver_beside_the_state_does_not_hinder_its_proof(records: list[GraphRecord]) -> None:
    """Conjugate gradients (MesaNet) diverge on the random numbers of a proof."""

    def step(S: Tensor, A: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        S.mul_(0.9).add_(outer(k, v))
        x, r = torch.zeros_like(q), q
        p, size = r, (r * r).sum(-1, keepdim=True)
        for _ in range(6):
            moved = torch.einsum("bhij,bhj->bhi", A, p) + 0.5 * p
            a = size / (p * moved).sum(-1, keepdim=True).clamp_min(1e-12)
            x, r = x + a * p, r - a * moved
            now = (r * r).sum(-1, keepdim=True)
            p, size = r + now / size.clamp_min(1e-12) * p, now
        return read(S, x)

    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(B, H, n, generator=g) for n in (K, K, V))
    A = outer(k, k) + torch.eye(K)
    state = torch.randn(B, H, K, V, generator=g)
    other, run = state.clone(), torch.compile(step, backend="kvbuffer", fullgraph=True, options=FAST)
    with torch.no_grad():
        for _ in range(6):
            torch.testing.assert_close(run(state, A, q, k, v), step(other, A, q, k, v), rtol=1e-4, atol=1e-5)
    assert records and all(signatures(record) == ["DUR"] for record in records)


ARGUMENTS = {"Scalar": 0.5, "ScalarList": [0.5, 0.25]}


@pytest.mark.parametrize("name", [f"{fn}.{way}" for fn, ways in OVERLOADS.items() for way in ways])
def test_calls_on_lists_are_what_they_are_written_out_as(name: str, records: list[GraphRecord]) -> None:
    """One call on the states of two layers."""
    fn, way = name.split(".")
    call = getattr(getattr(torch.ops.aten, f"_foreach_{fn}"), way)
    three = fn in ("addcmul", "addcdiv")

    def step(S: Tensor, T: Tensor, q: Tensor, k: Tensor, v: Tensor, number: Tensor) -> Tensor:
        products = [outer(k, v), outer(q, v)]
        scales = [number.expand(B, H, K, V)] * 2
        given: tuple = ()
        if three:
            given = (products, scales, ARGUMENTS[way])
        elif fn == "lerp":
            given = (products, ARGUMENTS[way] if way == "Scalar" else scales)
        elif fn == "copy":
            given = ([S * 0.5, T * 0.5],)
        elif fn in ("mul", "div"):
            given = {"List": (scales,), "Tensor": (number,)}.get(way) or (ARGUMENTS[way],)
        elif fn in ("add", "sub") and way == "List":
            given = (products,)
        elif fn in ("add", "sub"):
            given = (number,) if way == "Tensor" else (ARGUMENTS[way],)
        new = call([S, T], *given)
        S.copy_(new[0] + products[0])
        T.copy_(new[1] + products[1])
        return read(S, q) + read(T, k)

    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(B, H, n, generator=g) for n in (K, K, V))
    number = torch.tensor(0.5)
    states = [torch.randn(B, H, K, V, generator=g) for _ in range(2)]
    others, run = [s.clone() for s in states], torch.compile(step, backend="kvbuffer", fullgraph=True, options=FAST)
    with torch.no_grad():
        for _ in range(5):
            got, want = run(*states, q, k, v, number), step(*others, q, k, v, number)
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert records and all(len(record.rewritten) == 2 for record in records), [w for r in records for w in r.declined]


def constant_gate(S: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The decay is a number of 16 bits: 0.8984375."""
    S.mul_(torch.full((B, H, 1, 1), 0.9, dtype=torch.bfloat16))
    S.add_(outer(k, v))
    return read(S, q)


def constant_step(S: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The step size is one."""
    beta = torch.full((B, H, 1), 0.3, dtype=torch.float16)
    S.add_(outer(k, (v - read(S, k)) * beta))
    return read(S, q)


@pytest.mark.parametrize("step", [constant_gate, constant_step])
def test_constants_are_rounded_to_their_own_dtype(step, records: list[GraphRecord]) -> None:
    """Compared with eager: in float64, where rewrites are proved, no number of 16 bits is rounded."""
    g = torch.Generator().manual_seed(0)
    state = torch.zeros(B, H, K, V)
    other, run = state.clone(), torch.compile(step, backend="kvbuffer", fullgraph=True, options=FAST)
    q, k = torch.nn.functional.normalize(torch.ones(2, B, H, K), dim=-1)
    v = torch.rand(B, H, V, generator=g)
    with torch.no_grad():
        for _ in range(30):
            torch.testing.assert_close(run(state, q, k, v), step(other, q, k, v))
    torch.testing.assert_close(state + 0, other)
    assert records[-1].rewritten
