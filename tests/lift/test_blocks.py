"""Blocks: several tokens that read one state by one product and are added to it by one product."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

import kvbuffer_compile
from kvbuffer_compile.backend import GraphRecord, compile_graph, observers
from kvbuffer_compile.options import Options
from kvbuffer_compile.passes.lift.lift import lift
from kvbuffer_compile.passes.proof.validate import validate
from tests.spelled.lifting import traced
from tests.support.oracle import check, check_steps

B, H, K, V = 2, 3, 8, 12
Step = Callable[..., Tensor]


def linear(S: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """Every token reads all tokens of its block."""
    S.add_(k.mT @ v)
    return q @ S


def gated(S: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """One decay a block, and one of each row behind the update."""
    S.mul_(g[..., :1, None]).add_(torch.einsum("bhtk,bhtv->bhkv", k, v)).mul_(g[..., 1, None, None])
    return 0.5 * torch.einsum("bhtk,bhkv->bhtv", q, S)


def retention(S: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """Chunkwise, with a decay for each token (arXiv 2307.08621, section 2.3)."""
    c = g.log().cumsum(-1)
    inside = (c[..., :, None] - c[..., None, :]).tril().exp().tril() * (q @ k.mT)
    out = (q * c.exp()[..., None]) @ S + inside @ v
    S.mul_(c[..., -1, None, None].exp()).add_((k * (c[..., -1:] - c).exp()[..., None]).mT @ v)
    return out


def delta(S: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """The delta rule in chunks (arXiv 2406.06484, equations 8 to 11)."""
    scaled, eye = k * g[..., None], torch.eye(k.shape[-2], dtype=S.dtype)
    solved = torch.linalg.solve_triangular(
        (scaled @ k.mT).tril(-1) + eye, torch.cat([scaled, v * g[..., None]], -1), upper=False
    )
    w, u = solved.split([K, V], -1)
    new = u - w @ S
    out = q @ S + (q @ k.mT).tril() @ new
    S.add_(k.mT @ new)
    return out


def batched(S: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """All tokens take one gradient step from the same state, and read where it leads to."""
    error = (v - k @ S) * g[..., None]
    S.add_(torch.bmm(k.mT.reshape(-1, K, k.shape[2]), error.flatten(0, 1)).view_as(S))
    return torch.bmm(q.reshape(B * H, -1, K), S.reshape(B * H, K, V)).unflatten(0, (B, H))


def columns(S: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """Reads over the other axis, of a state whose columns forget."""
    S.mul_(g[..., :1, None] * v[..., 0, None, :].sigmoid()).add_(k.mT @ v)
    return v @ S.mT


STEPS = {f.__name__: f for f in (linear, gated, retention, delta, batched, columns)}
SIGNATURES = dict(linear="RU", gated="RDUD", retention="RDU", delta="RRU", batched="RRU", columns="RDU")


def operands(tokens: int, g: torch.Generator) -> list[Tensor]:
    q, k, v = (torch.randn(B, H, tokens, n, generator=g) for n in (K, K, V))
    return [q, normalize(k, dim=-1), v, 0.5 + 0.5 * torch.rand(B, H, tokens, generator=g)]


def run(step: Step, tokens: int, **options: object) -> GraphRecord:
    """Ten calls compiled, in eager mode and in float64: outputs and the state at the end, by the oracle."""
    g = torch.Generator().manual_seed(0)
    start, calls = torch.randn(B, H, K, V, generator=g), [operands(tokens, g) for _ in range(10)]
    states = [start.clone(), start.clone(), start.double()]
    records: list[GraphRecord] = []
    gm = traced(step, [states[0], *calls[0]])
    with observers.also(records.append), torch.no_grad():
        ours = Options(inner="eager", **options)
        compiled = compile_graph(gm, [states[0], *calls[0]], ours=ours, is_inference=True)
        outs = [
            [compiled([states[0], *given])[0] for given in calls],
            [step(states[1], *given) for given in calls],
            [step(states[2], *(x.double() for x in given)) for given in calls],
        ]
    check_steps(*outs)
    check(states[0] + 0, states[1], states[2], "state")
    return records[0]


@pytest.mark.parametrize("tokens", [2, 16, 32])
@pytest.mark.parametrize("name", STEPS)
def test_blocks_are_one_token_with_a_dim_of_tokens(name: str, tokens: int) -> None:
    """However many there are: the program is the same, and the operands are as few."""
    record = run(STEPS[name], tokens, flush=32, target="aten")
    ((lifted, plan),) = record.rewritten
    assert lifted.block and plan.variant == "block"
    assert plan.program.signature == SIGNATURES[name] and len(plan.program.inputs) <= 6
    assert plan.capacity == max(32, tokens)


def test_blocks_longer_than_a_flush() -> None:
    record = run(gated, 16, flush=4, target="aten")
    assert [plan.capacity for _, plan in record.rewritten] == [16]


@pytest.mark.parametrize("name", ["gated", "batched"])
def test_in_cpp(name: str) -> None:
    record = run(STEPS[name], 16, flush=32, target="cpp")
    assert [plan.variant for _, plan in record.rewritten] == ["block"]


def test_lifting_takes_no_longer_for_more_tokens() -> None:
    """Nothing is written out for each of them: counted in nodes."""
    g = torch.Generator().manual_seed(0)
    sizes = {len(lift(traced(delta, [torch.randn(B, H, K, V), *operands(n, g)])).gm.graph.nodes) for n in (4, 16, 64)}
    assert len(sizes) == 1


def once_beside(S: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """Something is added once beside what each token adds: four tokens are taken apart instead."""
    S.add_(k.mT @ v).add_(k[..., 0, :, None] * v[..., 1, None, :])
    return q @ S


def mixed_after_the_read(S: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """What one token stores depends on what others read."""
    S.add_(k.mT @ ((q @ k.mT).tril() @ (k @ S)))
    return q @ S


def twice(S: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """A second block that begins where the first one ends."""
    S.add_(k.mT @ v)
    out = q @ S
    S.add_(v.mT[..., :K, :] @ (v - k @ S))
    return out


def test_what_is_no_block() -> None:
    g = torch.Generator().manual_seed(0)
    state, few, many = torch.randn(B, H, K, V, generator=g), operands(4, g), operands(32, g)
    graph = lift(traced(once_beside, [state, *few]))
    ((found,), _) = graph.found, graph.refused
    assert not found.block and found.program.signature.count("U") == 5 and validate(graph, found) is None
    for step in (once_beside, mixed_after_the_read, twice):
        graph = lift(traced(step, [state, *many]))
        assert not graph.found and [r.why.rule for r in graph.refused] == ["prefill"], step.__name__


def test_prompts_are_left_alone() -> None:
    g = torch.Generator().manual_seed(0)
    graph = lift(traced(linear, [torch.randn(B, H, K, V), *operands(65, g)]))
    assert not graph.found and [r.why.rule for r in graph.refused] == ["prefill"]


@pytest.mark.parametrize("tokens", [16, 32])
def test_wide_blocks_are_declined_by_their_numbers(tokens: int) -> None:
    """The state's way is shared by all tokens already; what is left is predicted, not assumed."""
    g = torch.Generator().manual_seed(0)
    given = [torch.randn(8, 8, tokens, n, generator=g) for n in (64, 64, 64)] + [torch.rand(8, 8, tokens, generator=g)]
    with torch.no_grad():
        report = kvbuffer_compile.explain(linear, torch.zeros(8, 8, 64, 64), *given, options={"inner": "eager"})
    (state,) = report.states
    assert (state.status, state.rule) == ("declined", "no-gain")
    assert f"the {tokens} tokens of a call read the state by one product" in state.reason and "MB" in state.reason
