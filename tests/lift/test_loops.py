"""Loops as ops whose carry is the state: written out for few tokens, left alone where they may end early."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._higher_order_ops.associative_scan import associative_scan
from torch._higher_order_ops.scan import scan
from torch._higher_order_ops.while_loop import while_loop

from kvbuffer_compile.backend import GraphRecord
from tests.lift.test_tokens import inputs, start
from tests.support.daily import diagonal
from tests.support.oracle import check, check_steps
from tests.support.steps import Sizes

FAST = {"inner": "eager", "target": "aten", "flush": 4}
SIZES = Sizes(2, 3, 4, 5)
CALLS = 10
Loop = Callable[..., Tensor]


def _token(S: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    S = S * g.exp()[..., None, None]
    error = (v - (S * k[..., None]).sum(-2)) * beta[..., None]
    return S + k[..., None] * error[..., None, :]


def scanned(S: Tensor, *tokens: Tensor) -> Tensor:
    def body(S: Tensor, token: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        q, *rest = token
        S = _token(S, *rest)
        return S.clone(), (S * q[..., None]).sum(-2)

    new, out = scan(body, S, tuple(x.transpose(0, 1) for x in tokens))
    S.copy_(new)
    return out.transpose(0, 1)


def counted(S: Tensor, *tokens: Tensor) -> Tensor:
    """A counter of its own, which alone says when to stop."""
    return _while(S, tokens, lambda i, S: i < tokens[0].shape[1])


def ends_early(S: Tensor, *tokens: Tensor) -> Tensor:
    return _while(S, tokens, lambda i, S: (i < tokens[0].shape[1]) & (S.abs().sum() < 1e3))


def _while(S: Tensor, tokens: tuple[Tensor, ...], going: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    def body(i: Tensor, S: Tensor, out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, *rest = (x.index_select(1, i.reshape(1))[:, 0] for x in tokens)
        S = _token(S, *rest)
        return i + 1, S, out.index_copy(1, i.reshape(1), (S * q[..., None]).sum(-2)[:, None])

    start_at = torch.zeros((), dtype=torch.int64)
    carried = (start_at, S, torch.zeros_like(tokens[2]))
    _, new, out = while_loop(lambda i, S, out: going(i, S), body, carried)
    S.copy_(new)
    return out


def associative(S: Tensor, *tokens: Tensor) -> Tensor:
    q, k, v, g, _ = tokens
    decay = g.exp().transpose(0, 1)[..., None, None].expand(-1, *S.shape).contiguous()
    outer = (k[..., None] * v[..., None, :]).transpose(0, 1).contiguous()
    combine = lambda x, y: (x[0] * y[0], y[0] * x[1] + y[1])  # noqa: E731
    kept, added = associative_scan(combine, (decay, outer), 0, combine_mode="generic")
    states = kept * S + added
    S.copy_(states[-1])
    return (states * q.transpose(0, 1)[..., None]).sum(-2).transpose(0, 1)


def run(step: Loop, tokens: int, backend: str = "kvbuffer", **options: object) -> None:
    """CALLS calls by the oracle."""
    g = torch.Generator().manual_seed(0)
    dtypes = (torch.float32, torch.float32, torch.float64)
    first = start(SIZES, g)
    states = [first.to(d).clone() for d in dtypes]
    compiled = torch.compile(step, backend=backend, fullgraph=True, options={**FAST, **options})
    outs: list[list[Tensor]] = [[], [], []]
    with torch.no_grad():
        for _ in range(CALLS):
            given = inputs(SIZES, tokens, g)
            for call, state, dtype, kept in zip((compiled, step, step), states, dtypes, outs, strict=True):
                kept.append(call(state, *(x.to(dtype) for x in given)))
    check_steps(*outs, "outputs")
    check(states[0] + 0, states[1], states[2], "state")


@pytest.mark.parametrize(("step", "tokens"), diagonal([scanned, counted], [1, 3]))
def test_short_loops_are_buffered(step: Loop, tokens: int, records: list[GraphRecord]) -> None:
    run(step, tokens)
    variant = "buffered" if tokens == 1 else "verify"
    assert records
    for record in records:
        ((_, plan),) = record.rewritten
        assert (plan.program.signature, plan.variant) == ("DRUR", variant)


def test_an_associative_scan_over_one_token(records: list[GraphRecord]) -> None:
    run(associative, 1)
    assert records and all(r.rewritten[0][1].program.signature == "DUR" for r in records)


@pytest.mark.parametrize(("step", "tokens"), [(ends_early, 3), (scanned, 17)], ids=["early", "long"])
def test_other_loops_stay(step: Loop, tokens: int, records: list[GraphRecord]) -> None:
    """One that may end early, one that is too long."""
    run(step, tokens)
    assert records and not any(r.rewritten for r in records)


def test_what_is_not_rewritten_is_not_written_out() -> None:
    """A declined loop reaches the inner compiler as the loop it was."""
    graphs = []

    def inner(gm: torch.fx.GraphModule, inputs: object) -> object:
        graphs.append(gm)
        return gm.forward

    run(scanned, 3, inner=inner, flush="auto")
    loops = [any(n.target is torch.ops.higher_order.scan for n in gm.graph.nodes) for gm in graphs]
    assert loops == [False, True], "the last one compiled is the one that runs"


def test_a_guarded_state_in_loops_of_other_backends() -> None:
    g = torch.Generator().manual_seed(0)
    state, given = start(SIZES, g), inputs(SIZES, 2, g)
    expected = state.clone()
    with torch.no_grad():
        torch.compile(scanned, backend="kvbuffer", fullgraph=True, options=FAST)(state, *given)
        scanned(expected, *given)
        for step in (scanned, counted):
            out = torch.compile(step, backend="aot_eager", fullgraph=True)(state, *given)
            torch.testing.assert_close(out, step(expected, *given))
    torch.testing.assert_close(state + 0, expected)
