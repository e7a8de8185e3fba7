"""256 tokens and more than eight flushes of everything that is buffered: nothing drifts, and greedy text is eager's.

Of dtype, cache and batch every pair of values is met with each architecture (four runs, not eight): float32 with a
StaticCache and batch 3 or a DynamicCache and batch 1, bfloat16 the other way round. Architectures with a cache of their
own run in both dtypes at both batches. In float32 the texts are equal; in bfloat16, where rounding may decide between
two tokens, logits are held to the oracle over all tokens, and states at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from kvbuffer_compile.backend import GraphRecord
from kvbuffer_compile.runtime import by_hand
from tests import zoo
from tests.lift import test_associative, test_forms, test_graph_forms, test_loops, test_pools, test_stacked, test_tokens
from tests.models.test_architectures import assert_buffered, options
from tests.models.test_models import in_float64
from tests.spelled import scan_forms
from tests.spelled.forms import Form
from tests.support.oracle import check, check_steps
from tests.support.steps import Sizes, gates, unit
from tests.zoo import ARCHS, Arch, DecodeStep

pytestmark = pytest.mark.nightly
TOKENS, FLUSH, AT_ONCE = 256, 16, 4
NAMED = {"ids": lambda x: getattr(x, "name", None) or getattr(x, "__name__", None)}


def runs(dtype: torch.dtype) -> Iterator[Any]:
    """Architecture, cache and batch."""
    first, second = ("static", "dynamic") if dtype == torch.float32 else ("dynamic", "static")
    for name, arch in ARCHS.items():
        if arch.states:
            kinds = (first, second) if arch.static_cache else ("dynamic", "dynamic")
            yield from (
                pytest.param(arch, kind, batch, id=f"{name}-{kind}-{batch}")
                for kind, batch in zip(kinds, (3, 1), strict=True)
            )


def compiled(arch: Arch, step: DecodeStep) -> Callable[[Tensor], Tensor]:
    given = {**options(arch), "flush": FLUSH}
    return torch.compile(step, backend="kvbuffer", fullgraph=arch.fullgraph, options=given)


def assert_flushed(step: DecodeStep) -> None:
    """Rows are owed still, and no state could have owed all of the tokens: it was flushed more than eight times."""
    accounts = by_hand.accounts_of(step.cache)
    assert len(accounts) == len(zoo.states_of(step))
    assert all(a.plan.capacity <= TOKENS // 9 for a in accounts)
    assert any(int(a.cursor[0].max()) > 1 for a in accounts)


@pytest.mark.parametrize(("arch", "kind", "batch"), runs(torch.float32))
def test_greedy_text(arch: Arch, kind: str, batch: int, records: list[GraphRecord]) -> None:
    model = zoo.make_model(arch.name)
    ids = zoo.prompt(3, 8)[:batch]
    expected = zoo.greedy_text(zoo.make_model(arch.name), ids, TOKENS, kind).tokens
    step = zoo.prefilled(model, ids[:, :-1], kind)
    run, token, text = compiled(arch, step), ids[:, -1:], []
    with torch.no_grad():
        for _ in range(TOKENS):
            token = run(token).float().argmax(-1, keepdim=True)
            text.append(token)
    assert torch.equal(torch.cat(text, 1), expected)
    assert_buffered(arch, records)
    assert_flushed(step)


@pytest.mark.parametrize(("arch", "kind", "batch"), runs(torch.bfloat16))
def test_logits_in_bfloat16(arch: Arch, kind: str, batch: int, records: list[GraphRecord]) -> None:
    models = [zoo.make_model(arch.name, torch.bfloat16) for _ in range(2)]
    steps = [zoo.prefilled(m, zoo.prompt(batch, 6), kind) for m in (*models, in_float64(models[1]))]
    calls = (compiled(arch, steps[0]), *steps[1:])
    logits: list[list[Tensor]] = [[], [], []]
    with torch.no_grad():
        for token in zoo.prompt(batch, TOKENS, seed=5).split(1, 1):
            for call, kept in zip(calls, logits, strict=True):
                kept.append(call(token))
    check_steps(*logits, "logits")
    assert_buffered(arch, records)
    assert_flushed(steps[0])
    for (name, got), (_, eager), (_, exact) in zip(*map(zoo.states_of, steps), strict=True):
        check(got + 0, eager, exact, name)


# ------------------------------------------------------------------------------------------------------ forms


@pytest.mark.parametrize("form", test_forms.FORMS, **NAMED)
def test_each_form(form: Form, records: list[GraphRecord], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_forms, "TOKENS", TOKENS)
    test_forms.test_forms_run_buffered(form, records)


@pytest.mark.parametrize("form", test_graph_forms.GRAPH_FORMS, **NAMED)
def test_each_graph_form(form: Form, records: list[GraphRecord], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_forms, "TOKENS", TOKENS)
    test_graph_forms.test_graph_forms_run_buffered(form, records)


@pytest.mark.parametrize("name", test_tokens.LOOPS)
@pytest.mark.parametrize("tokens", [2, AT_ONCE, 16])
def test_unrolled_tokens(name: str, tokens: int, records: list[GraphRecord], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_tokens, "CALLS", TOKENS // tokens)
    test_tokens.test_unrolled_tokens_are_one_program(name, tokens, records)


@pytest.mark.parametrize("step", [test_loops.scanned, test_loops.counted], **NAMED)
@pytest.mark.parametrize(("tokens", "variant"), [(1, "buffered"), (AT_ONCE, "verify")])
def test_loops_as_ops(
    step: test_loops.Loop, tokens: int, variant: str, records: list[GraphRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(test_loops, "CALLS", TOKENS // tokens)
    test_loops.test_short_loops_are_buffered(step, tokens, variant, records)


@pytest.mark.parametrize("step", scan_forms.STEPS, **NAMED)
def test_associative_scans(
    step: Callable[..., Tensor], records: list[GraphRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(test_forms, "TOKENS", TOKENS // AT_ONCE)
    test_associative.runs_buffered(step, AT_ONCE, records)


@pytest.mark.parametrize("name", test_stacked.STACKS)
def test_stacks(name: str, records: list[GraphRecord]) -> None:
    p = test_stacked.Beside(*test_stacked.STACKS[name], flush=FLUSH)
    p.run(TOKENS + 3)
    assert max(p.owed) > 0
    p.check()
    assert records and all(len(r.rewritten) == test_stacked.LAYERS for r in records)


@pytest.mark.parametrize("name", test_pools.STEPS)
def test_pools_of_slots(name: str, records: list[GraphRecord]) -> None:
    p = test_pools.Beside(name, target="aten")
    p.run(2 * TOKENS + 3)  # of seven slots three are in each step
    assert test_pools.rewritten(records) and max(p.owed) > 0
    p.check()


def returned(S: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """States are handed back."""
    S = S * g.exp()[..., None, None]
    S = S + k[..., None] * ((v - (S * k[..., None]).sum(-2)) * beta[..., None])[..., None, :]
    return (S * q[..., None]).sum(-2), S


def one_feeds_the_other(S: Tensor, R: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """What is read of one state is the key of the next."""
    out, new = returned(S, q, k, v, g, beta)
    S.copy_(new)
    out, new = returned(R, q, torch.nn.functional.normalize(out, dim=-1), v, g, beta)
    R.copy_(new)
    return out


@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
@pytest.mark.parametrize(("step", "count"), [(returned, 1), (one_feeds_the_other, 2)], **NAMED)
def test_states_handed_back_and_several(
    step: Callable[..., Any], count: int, dynamic: bool | None, records: list[GraphRecord]
) -> None:
    g, sizes = torch.Generator().manual_seed(0), Sizes(2, 3, 4, 4)
    first = [torch.randn(sizes.B, sizes.H, sizes.K, sizes.V, generator=g) for _ in range(count)]
    states = [[s.to(d).clone() for s in first] for d in (torch.float32, torch.float32, torch.float64)]
    given = {"inner": "eager", "target": "aten", "flush": FLUSH, "donate": True}
    calls = (torch.compile(step, backend="kvbuffer", fullgraph=True, dynamic=dynamic, options=given), step, step)
    outs: list[list[Tensor]] = [[], [], []]
    with torch.no_grad():
        for _ in range(TOKENS):
            lanes = (sizes.B, sizes.H)
            token = [torch.randn(*lanes, sizes.K, generator=g), unit(g, *lanes, sizes.K)]
            token += [torch.randn(*lanes, sizes.V, generator=g), gates(g, *lanes).log(), torch.rand(lanes, generator=g)]
            for call, mine, kept in zip(calls, states, outs, strict=True):
                out = call(*mine, *(x.to(mine[0].dtype) for x in token))
                if step is returned:
                    out, mine[0] = out
                kept.append(out)
    check_steps(*outs, "outputs")
    for one in zip(*states, strict=True):
        check(one[0] + 0, *one[1:], "state")
    assert records and all(len(r.rewritten) == count for r in records), [str(x.why) for r in records for x in r.refused]
    assert {plan.variant for r in records for _, plan in r.rewritten} == {"buffered"}
