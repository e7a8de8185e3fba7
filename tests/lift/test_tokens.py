"""Several tokens unrolled in one graph: one program of all of them, that knows how many it stands for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvbuffer_compile.backend import GraphRecord
from tests.spelled.lifting import capture, lifted_and_right
from tests.support.daily import diagonal
from tests.support.oracle import check, check_steps
from tests.support.steps import DISTINCT, EQUAL, Sizes, gates, unit

FAST = {"inner": "eager", "target": "aten", "flush": 4}
CALLS = 34  # eight flushes


def gdn(state: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """As transformers has it: heads first, outputs written into a buffer."""
    q, k, v, g, beta = (x.transpose(1, 2).contiguous() for x in (q, k, v, g, beta))
    out, S = torch.zeros_like(v), state
    for t in range(v.shape[2]):
        S = S * g[:, :, t].exp()[..., None, None]
        error = (v[:, :, t] - (S * k[:, :, t].unsqueeze(-1)).sum(-2)) * beta[:, :, t].unsqueeze(-1)
        S = S + k[:, :, t].unsqueeze(-1) * error.unsqueeze(-2)
        out[:, :, t] = (S * q[:, :, t].unsqueeze(-1)).sum(-2)
    state.copy_(S)
    return out.transpose(1, 2)


def gla(state: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """Decay of channels; all outer products are formed before the loop."""
    kv = torch.einsum("bthk,bthv->bthkv", k, v * beta[..., None])
    decay = (g[..., None] * torch.sigmoid(k)).exp().unbind(1)
    outs = []
    for t in range(q.shape[1]):
        state.copy_(state * decay[t][..., None] + kv[:, t])
        outs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state))
    return torch.stack(outs, 1)


def mamba2(state: Tensor, C: Tensor, B: Tensor, x: Tensor, a: Tensor, dt: Tensor) -> Tensor:
    """State [B, H, P, N]; the decay is formed at full size."""
    S, outs = state.transpose(-1, -2).clone(), []
    for t in range(x.shape[1]):
        decay = torch.exp(dt[:, t, :, None, None] * a[:, t, :, None, None].expand(S.shape))
        S = S * decay + (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None, :]
        outs.append((S @ C[:, t, :, :, None])[..., 0])
    state.copy_(S.transpose(-1, -2))
    return torch.stack(outs, 1)


LOOPS = {"gdn": (gdn, "DRUR"), "gla": (gla, "DUR"), "mamba2": (mamba2, "DUR")}


def inputs(sizes: Sizes, tokens: int, g: torch.Generator) -> tuple[Tensor, ...]:
    """q, k [B, T, H, K], v [B, T, H, V], a log-decay and a step size [B, T, H]."""
    shape = (sizes.B, tokens, sizes.H)
    vectors = (
        torch.randn(*shape, sizes.K, generator=g),
        unit(g, *shape, sizes.K),
        torch.randn(*shape, sizes.V, generator=g),
    )
    return (*vectors, gates(g, *shape).log(), torch.rand(shape, generator=g))


def start(sizes: Sizes, g: torch.Generator) -> Tensor:
    return torch.randn(sizes.B, sizes.H, sizes.K, sizes.V, generator=g)


@pytest.mark.parametrize(("name", "tokens"), diagonal(LOOPS, [2, 3, 5]))
def test_unrolled_tokens_are_one_program(name: str, tokens: int, records: list[GraphRecord]) -> None:
    step, ops = LOOPS[name]
    g = torch.Generator().manual_seed(0)
    dtypes = (torch.float32, torch.float32, torch.float64)
    first = start(DISTINCT, g)
    states = [first.to(d).clone() for d in dtypes]
    steps = (torch.compile(step, backend="kvbuffer", fullgraph=True, options=FAST), step, step)
    outs: list[list[Tensor]] = [[], [], []]
    with torch.no_grad():
        for _ in range(CALLS):
            token = inputs(DISTINCT, tokens, g)
            for run, state, dtype, kept in zip(steps, states, dtypes, outs, strict=True):
                kept.append(run(state, *(x.to(dtype) for x in token)))
    check_steps(*outs, "outputs")
    check(states[0] + 0, states[1], states[2], "state")
    assert records
    for record in records:
        ((_, plan),) = record.rewritten
        assert plan.program.signature == ops and plan.variant == "verify"


@pytest.mark.parametrize(("name", "tokens"), [("gla", 8), ("mamba2", 8), ("gdn", 16)])
def test_many_tokens(name: str, tokens: int, records: list[GraphRecord]) -> None:
    test_unrolled_tokens_are_one_program(name, tokens, records)


@pytest.mark.parametrize("name", LOOPS)
@pytest.mark.parametrize("sizes", [EQUAL, Sizes(1, 1, 4, 5)], ids=["equal", "single"])
def test_unrolled_tokens_at_other_sizes(name: str, sizes: Sizes) -> None:
    step, ops = LOOPS[name]
    g = torch.Generator().manual_seed(0)
    (gm,) = capture(step, start(sizes, g), *inputs(sizes, 3, g))
    (found,) = lifted_and_right(gm).found
    assert (found.program.signature, found.tokens) == (ops, 3)


def test_reads_of_one_token_are_no_tokens() -> None:
    """Two updates and one read are one token of rank two."""

    def two_updates(state: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
        for t in range(2):
            state.copy_(state * g[:, t].exp()[..., None, None] + k[:, t, :, :, None] * v[:, t, :, None, :])
        return (state * q[:, 0, :, :, None]).sum(-2)

    g = torch.Generator().manual_seed(0)
    (gm,) = capture(two_updates, start(DISTINCT, g), *inputs(DISTINCT, 2, g))
    (found,) = lifted_and_right(gm).found
    assert (found.program.signature, found.tokens) == ("DUDUR", 1)
