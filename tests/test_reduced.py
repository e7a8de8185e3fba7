"""Large states are validated on a batch of two, whatever dims the batch is merged with."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import pytest
import torch

from kvbuffer_compile.ir import Decay
from kvbuffer_compile.passes import validate as validation
from kvbuffer_compile.passes.lift import lift
from kvbuffer_compile.passes.lifted import Lifted, LiftedGraph
from kvbuffer_compile.passes.reduced import BATCH, Sizes
from tests import graph_forms
from tests.forms import Form
from tests.lifting import capture
from tests.steps import Sizes as Shape

FORMS = {form.name: form for form in graph_forms.GRAPH_FORMS}
LARGE = [
    pytest.param("multiplied_mask", Shape(64, 16, 48, 64), False, id="apart"),
    pytest.param("multiplied_mask", Shape(64, 16, 48, 64), True, id="symbolic"),
    pytest.param("merged_lanes", Shape(64, 16, 48, 64), False, id="merged"),
    pytest.param("merged_lanes", Shape(32, 32, 48, 64), False, id="merged, equal sizes"),
    pytest.param("flat_lanes", Shape(64, 16, 48, 64), False, id="stored flat"),
]


def large(form: Form, sizes: Shape, dynamic: bool) -> tuple[LiftedGraph, Lifted]:
    g = torch.Generator().manual_seed(0)
    (gm,) = capture(form.step, *form.start(g, sizes), *form.inputs(sizes, g), dynamic=dynamic)
    graph = lift(gm)
    (found,) = graph.found
    return graph, found


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[Sizes]:
    """The sizes at which a program was compared."""
    seen: list[Sizes] = []
    compare = validation._differs

    def watched(lifted: Lifted, below: set, sizes: Sizes) -> str | None:
        seen.append(sizes)
        return compare(lifted, below, sizes)

    monkeypatch.setattr(validation, "_differs", watched)
    monkeypatch.setattr(validation, "_proved", set())
    return seen


@pytest.mark.parametrize(("name", "sizes", "dynamic"), LARGE)
def test_a_batch_of_two_is_enough(name: str, sizes: Shape, dynamic: bool, tried: list[Sizes]) -> None:
    graph, found = large(FORMS[name], sizes, dynamic)
    assert validation.validate(graph, found) is None
    used = tried[-1]
    tried_with = [used.of(n) for n in found.state.meta["val"].shape]
    assert prod(tried_with) <= BATCH / sizes.B * prod((sizes.B, sizes.H, sizes.K, sizes.V))


def test_a_width_that_equals_batch_times_heads(tried: list[Sizes]) -> None:
    """64 sequences of 16 heads are 1,024, and so is the width of something else."""

    def step(S: torch.Tensor, q: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q = q[:, :768].view(64, 16, 48)
        S.copy_(S * 0.5 + q[..., None] * v[..., None, :])
        return (S * q[..., None]).sum(-2)

    g = torch.Generator().manual_seed(0)
    shapes = ((64, 16, 48, 80), (64, 1024), (64, 16, 80))
    (gm,) = capture(step, *(torch.randn(shape, generator=g) for shape in shapes))
    graph = lift(gm)
    assert validation.validate(graph, graph.found[0]) is None
    assert tried[-1].of(1024) == 1024 and tried[-1].of(64) != 64


def test_a_wrong_program_is_seen_on_it(tried: list[Sizes]) -> None:
    graph, found = large(FORMS["merged_lanes"], Shape(64, 16, 48, 64), False)
    ops = tuple(op for op in found.program.ops if not isinstance(op, Decay))
    why = validation.validate(graph, replace(found, program=replace(found.program, ops=ops)))
    assert why is not None and why.rule == "validation"


def test_what_is_too_large_to_check_is_declined(tried: list[Sizes], monkeypatch: pytest.MonkeyPatch) -> None:
    graph, found = large(FORMS["merged_lanes"], Shape(64, 16, 48, 64), False)
    monkeypatch.setattr(validation, "small_batches", lambda *_: [])
    monkeypatch.setattr(validation, "TOO_LARGE", 1e6)
    why = validation.validate(graph, found)
    assert why is not None and "too much to check" in why.reason and not tried
