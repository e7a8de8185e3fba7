"""Large states are validated with few lanes: whatever dims they are merged with, whatever else is as large."""

from __future__ import annotations

import time
from dataclasses import replace
from math import prod

import pytest
import torch
from torch.fx import GraphModule

from kvbuffer_compile.ir.program import Decay
from kvbuffer_compile.passes.lift.lift import lift
from kvbuffer_compile.passes.lifted import Lifted
from kvbuffer_compile.passes.proof import inputs
from kvbuffer_compile.passes.proof import validate as validation
from kvbuffer_compile.passes.proof.evaluate import Limit
from kvbuffer_compile.passes.proof.sizes import FEW, Extents
from tests import zoo
from tests.lift import test_pools, test_stacked
from tests.spelled import forms, graph_forms
from tests.spelled.forms import Form
from tests.spelled.lifting import capture, traced
from tests.support.daily import chosen
from tests.support.steps import Sizes
from tests.zoo import configs
from tests.zoo.build import bare_model

FORMS = {form.name: form for form in (*forms.forms(), *graph_forms.GRAPH_FORMS)}
EQUAL, APART = Sizes(4, 4, 4, 4), Sizes(8, 4, 5, 6)
COUNTED = {"retention"}  # the decay of a head is computed from its number: all heads are kept


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[Extents]:
    """The sizes at which programs were compared. Everything counts as large, and what is as large as it was captured
    as too large."""
    seen: list[Extents] = []
    compare = validation._differs

    def watched(obligation: validation.Obligation, region: validation.Region, extents: Extents) -> str | None:
        seen.append(extents)
        return compare(obligation, region, extents)

    monkeypatch.setattr(validation, "_differs", watched)
    monkeypatch.setattr(validation, "_proved", set())
    monkeypatch.setattr(validation, "LARGE", 0)
    monkeypatch.setattr(inputs, "LARGE", 0)
    return seen


def graph_of(form: Form, sizes: Sizes) -> GraphModule:
    g = torch.Generator().manual_seed(0)
    return traced(form.step, (*form.start(g, sizes), *form.inputs(sizes, g)))


def lanes(found: Lifted, extents: Extents) -> tuple[int, ...]:
    """How large the lanes of a state are."""
    layout = extents.layout(found.state, found.layout)
    parts = [n for dim in layout.dims for n in dim]
    return tuple(n for i in layout.order[:-2] if (n := parts[i]) is not None)


WHOLE = ("lists_of_tensors",)  # ops on lists take tensors of any sizes: nothing tells which of them are lanes


@pytest.mark.parametrize("sizes", [EQUAL, APART], ids=["equal", "apart"])
@pytest.mark.parametrize("name", FORMS)
def test_few_lanes_are_enough(name: str, sizes: Sizes, tried: list[Extents]) -> None:
    """Also where batch, heads, keys and values are of one size, so that no number tells which is which."""
    if name == "ttt" and sizes is APART:
        pytest.skip("subtracts keys from values")
    graph = lift(graph_of(FORMS[name], sizes))
    for found in graph.found:
        tried.clear()
        assert validation.validate(graph, found) is None
        if name in WHOLE:
            assert prod(lanes(found, tried[-1])) == sizes.B * sizes.H
            continue
        assert len(tried) == 1 and prod(lanes(found, tried[0])) <= (8 if name in COUNTED else prod(FEW))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_a_captured_step(dynamic: bool, tried: list[Extents]) -> None:
    g = torch.Generator().manual_seed(0)
    form = FORMS["merged_lanes"]
    (gm,) = capture(form.step, *form.start(g, APART), *form.inputs(APART, g), dynamic=dynamic)
    graph = lift(gm)
    assert validation.validate(graph, graph.found[0]) is None
    assert lanes(graph.found[0], tried[-1]) == FEW


@pytest.mark.parametrize("name", chosen(["qwen3_5", "kimi_linear", "mamba2", "xlstm"], {"qwen3_5", "xlstm"}))
def test_models_whose_batch_is_as_large_as_their_heads(name: str, tried: list[Extents]) -> None:
    """Four sequences of four heads, the keys of two of them shared: all states are served by what few lanes take."""
    step, _ = zoo.decode_step(zoo.make_model(name), 4)
    (gm,) = capture(step, torch.zeros(4, 1, dtype=torch.long))
    graph = lift(gm)
    assert len(graph.found) == zoo.ARCHS[name].states
    for found in graph.found:
        assert validation.validate(graph, found) is None
    assert len(tried) == 1, "layers are alike"
    assert max(lanes(graph.found[0], tried[0])) <= max(FEW)


def test_a_width_that_equals_batch_times_heads(tried: list[Extents]) -> None:
    """4 sequences of 16 heads are 64, and so is the width of something else."""

    def step(S: torch.Tensor, q: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q = q[:, :48].view(4, 16, 3)
        S.copy_(S * 0.5 + q[..., None] * v[..., None, :])
        return (S * q[..., None]).sum(-2)

    g = torch.Generator().manual_seed(0)
    shapes = ((4, 16, 3, 5), (4, 64), (4, 16, 5))
    graph = lift(traced(step, tuple(torch.randn(shape, generator=g) for shape in shapes)))
    assert validation.validate(graph, graph.found[0]) is None
    assert lanes(graph.found[0], tried[-1]) == FEW


def test_a_wrong_program_is_seen_on_it(tried: list[Extents], monkeypatch: pytest.MonkeyPatch) -> None:
    graph = lift(graph_of(FORMS["merged_lanes"], APART))
    (found,) = graph.found
    ops = tuple(op for op in found.program.ops if not isinstance(op, Decay))
    wrong = replace(found, program=replace(found.program, ops=ops))
    for held in (Limit.held, 10_000):  # with and without a last look at all lanes
        monkeypatch.setattr(Limit, "held", held)
        why = validation.validate(graph, wrong)
        assert why is not None and why.rule in ("validation", "too-large")
    assert tried


def test_what_is_too_large_to_check_is_declined(tried: list[Extents], monkeypatch: pytest.MonkeyPatch) -> None:
    graph = lift(graph_of(FORMS["merged_lanes"], APART))
    monkeypatch.setattr(Extents, "shrink", lambda *_: False)
    monkeypatch.setattr(Limit, "held", 10_000)
    why = validation.validate(graph, graph.found[0])
    assert why is not None and why.rule == "too-large" and "a smaller batch" in why.reason and not tried


@pytest.mark.parametrize(
    "step", [test_stacked.layers_first, test_stacked.unbound, test_pools.gdn], ids=lambda f: f.__name__
)
def test_stacks_and_pools_are_looked_at_in_small(
    step: object, tried: list[Extents], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[tuple[int, ...]] = []
    difference = inputs._Inputs._difference

    def watched(self: inputs._Inputs, values: dict) -> str | None:
        sizes.extend(tuple(values[holder].shape) for holder in self.holders)
        return difference(self, values)

    monkeypatch.setattr(inputs._Inputs, "_difference", watched)
    g = torch.Generator().manual_seed(0)
    token = [torch.randn(8, 4, n, generator=g) for n in (6, 6, 7)] + [-torch.rand(8, 4, generator=g)] * 2
    if step is test_pools.gdn:
        args = (torch.randn(20, 4, 6, 7, generator=g), torch.arange(8), *token)
        expected = [(3, 3, 3, 3)]
    else:
        at = 0 if step is test_stacked.layers_first else 1
        shape = [8, 4, 6, 7]
        shape.insert(at, 3)
        args = (torch.randn(shape, generator=g), *token)
        expected = [(3,) * 5]
    graph = lift(traced(step, args))  # type: ignore[arg-type]
    assert graph.found
    for found in graph.found:
        assert validation.validate(graph, found) is None
    assert sizes == expected


@pytest.mark.nightly
@pytest.mark.parametrize("batch", [16, 32, 64])
def test_a_model_of_real_heads(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Qwen3.5: 16 key heads, 32 value heads of 128 x 128, in less than two seconds a state."""
    sizes = dict(linear_num_key_heads=16, linear_num_value_heads=32, linear_key_head_dim=128, linear_value_head_dim=128)
    monkeypatch.setitem(configs.BUFFERED, "qwen3_5", {**configs.BUFFERED["qwen3_5"], **sizes})
    monkeypatch.setattr(validation, "_proved", set())
    step, _ = zoo.decode_step(bare_model("qwen3_5", torch.float32), batch)
    (gm,) = capture(step, torch.zeros(batch, 1, dtype=torch.long))
    graph = lift(gm)
    assert len(graph.found) == 2
    for found in graph.found:
        started = time.thread_time()
        assert validation.validate(graph, found) is None
        assert time.thread_time() - started < 2
