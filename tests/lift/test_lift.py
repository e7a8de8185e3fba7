"""Lift: every spelling of every family, real models, and what must be declined."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from kvbuffer_compile.ir.program import Program
from kvbuffer_compile.passes.lift.lift import lift
from kvbuffer_compile.passes.lifted import LiftedGraph, Refused
from kvbuffer_compile.passes.proof.validate import validate
from kvbuffer_compile.passes.reading.captured import written
from tests.spelled.lifting import TOLERANCE, capture, capture_plain, disagreement, evaluate, lifted_and_right
from tests.spelled.near_misses import near_misses
from tests.support.daily import chosen, diagonal, first_of_each, row
from tests.support.steps import DISTINCT, EQUAL, GROUPED, GROUPED_EQUAL, Case, Sizes, cases, grouped_cases
from tests.zoo import ARCHS, decode_step, make_model

CASES, GROUPED_CASES, NEAR = cases(), grouped_cases(), near_misses()
SINGLE = Sizes(1, 1, 4, 5)


def name(case: Case) -> str:
    return case.name


def names(given: list[Case]) -> list[str]:
    return [case.name for case in given]


def family(case: Case) -> str:
    """What it computes, in whatever spelling."""
    return case.name.split("-")[0]


def captured(case: Case, sizes: Sizes) -> GraphModule:
    (gm,) = capture(case.step, *case.make(sizes))
    return gm


def signatures(graph: LiftedGraph) -> list[str]:
    return [lifted.program.signature for lifted in graph.found]


SIZES = diagonal(CASES, (DISTINCT, EQUAL)) + [row((case, SINGLE), daily=True) for case in CASES[::3]]


@pytest.mark.parametrize(
    ("case", "sizes"), SIZES, ids=lambda x: x.name if isinstance(x, Case) else f"{x.B}{x.H}{x.K}{x.V}"
)
def test_every_spelling_lifts(case: Case, sizes: Sizes) -> None:
    graph = lifted_and_right(captured(case, sizes))
    assert signatures(graph) == [case.signature], [str(r.why) for r in graph.refused]
    assert not [r for r in graph.refused if not r.kept]


@pytest.mark.parametrize("case", GROUPED_CASES, ids=names(GROUPED_CASES))
@pytest.mark.parametrize("sizes", [GROUPED, GROUPED_EQUAL], ids=["distinct", "equal"])
def test_groups_of_heads_share_their_keys(case: Case, sizes: Sizes) -> None:
    graph = lifted_and_right(captured(case, sizes))
    assert signatures(graph) == [case.signature]
    program = graph.found[0].program
    assert len(program.lanes) == 3  # sequences, key heads, heads of a group
    assert {v.lanes for v in program.inputs if v.kind == "key"} == {program.lanes[:2]}


@pytest.mark.parametrize("case", CASES[::3] + GROUPED_CASES, ids=names(CASES[::3] + GROUPED_CASES))
def test_without_decompositions(case: Case) -> None:
    graph = lifted_and_right(capture_plain(case.step, *case.make(GROUPED)))
    assert signatures(graph) == [case.signature]


@pytest.mark.parametrize("case", first_of_each(CASES[1::3] + GROUPED_CASES, family, name))
def test_dynamic_shapes(case: Case) -> None:
    (gm,) = capture(case.step, *case.make(GROUPED), dynamic=True)
    graph = lifted_and_right(gm)
    assert signatures(graph) == [case.signature]
    assert None in [size for dim in graph.found[0].layout.dims for size in dim]


def families() -> dict[str, list[Case]]:
    found: dict[str, list[Case]] = {}
    for case in CASES:
        found.setdefault(family(case), []).append(case)
    return found


@pytest.mark.parametrize("of", chosen(families(), {"gated_delta", "ssd", "retnet"}))
def test_one_family_is_one_program(of: str) -> None:
    """Equal algebra compares equal, so that layers and models share kernels."""
    programs: set[Program] = {lift(captured(case, DISTINCT)).found[0].program for case in families()[of]}
    assert len(programs) == 1, "\n".join(map(str, programs))


@pytest.mark.parametrize("case", CASES[::5] + GROUPED_CASES, ids=names(CASES[::5] + GROUPED_CASES))
def test_the_comparison_notices_any_wrong_operand(case: Case) -> None:
    graph = lift(captured(case, GROUPED))
    values = evaluate(graph.gm)
    for v in graph.found[0].program.inputs:
        assert disagreement(graph, graph.found[0], values, scale=v.name) > 1e3 * TOLERANCE, v


# ------------------------------------------------------------------------------------------ near-misses


def refusals_of_the_state(gm: GraphModule, graph: LiftedGraph) -> list[Refused]:
    """Refusals of what the graph writes to."""
    stored = {n.name for n in written(gm)}
    return [r for r in graph.refused if r.state.name in stored]


@pytest.mark.parametrize(("case", "rules"), NEAR, ids=[case.name for case, _ in NEAR])
@pytest.mark.parametrize("sizes", [DISTINCT, EQUAL], ids=["distinct", "equal"])
def test_near_misses_are_declined(case: Case, rules: set[str], sizes: Sizes) -> None:
    gm = captured(case, sizes)
    graph = lifted_and_right(gm)
    assert not graph.found
    (refused,) = refusals_of_the_state(gm, graph)
    assert refused.why.rule in rules, str(refused.why)
    assert refused.why.source.rpartition(":")[0].endswith("near_misses.py"), str(refused.why)


def two_layers(a: Tensor, b: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One state's read feeds the next one's key."""
    a.add_(k[..., None] * v[..., None, :])
    key = torch.softmax((a * q[..., None]).sum(-2), -1)
    b.mul_(0.9).add_(key[..., None] * v[..., None, :])
    return (b * key[..., None]).sum(-2)


def entangled(a: Tensor, b: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Each state's update needs a read of the other: neither can be updated as a whole."""
    of_a = (a * q[..., None]).sum(-2)
    of_b = (b * q[..., None]).sum(-2)
    a.add_(k[..., None] * of_b[..., None, :])
    b.add_(k[..., None] * of_a[..., None, :])
    return (a * q[..., None]).sum(-2) + (b * q[..., None]).sum(-2)


def two_state_inputs() -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(0)
    shapes = ((2, 3, 4, 4), (2, 3, 4, 4), (2, 3, 4), (2, 3, 4), (2, 3, 4))
    return tuple(torch.randn(shape, generator=g) for shape in shapes)


def test_two_states_in_one_graph() -> None:
    (gm,) = capture(two_layers, *two_state_inputs())
    assert sorted(signatures(lifted_and_right(gm))) == ["DUR", "UR"]


def test_states_that_feed_each_other_are_not_both_rewritten() -> None:
    (gm,) = capture(entangled, *two_state_inputs())
    graph = lifted_and_right(gm)
    assert signatures(graph) == ["RUR"]
    assert [r.why.rule for r in graph.refused if not r.kept] == ["entangled"]


def test_source_lines_name_the_model() -> None:
    case = GROUPED_CASES[0]
    found = lift(captured(case, GROUPED)).found[0]
    assert found.source.rpartition(":")[0].endswith("steps.py")


# ----------------------------------------------------------------------------------------------- models


@cache
def model(name: str, dtype: torch.dtype) -> Any:
    return make_model(name, dtype)


CACHES = {  # and sequences, dtype
    "dynamic": (1, torch.float32),
    "static": (3, torch.bfloat16),
}
MODELS = {"qwen3_5": {"static"}, "qwen3_next": {"dynamic"}, "mamba2": {"dynamic", "static"}}  # in every run
MORE = (
    ("dynamic", 1, torch.bfloat16),
    ("static", 3, torch.float32),
    ("dynamic", 3, torch.float32),
    ("dynamic", 3, torch.bfloat16),
)


@pytest.mark.parametrize(
    ("name", "kind", "batch", "dtype"),
    [row((n, kind, *CACHES[kind]), kind in MODELS[n]) for n in MODELS for kind in CACHES]
    + [row((n, *more), daily=False) for n in MODELS for more in MORE],
)
def test_models_lift(name: str, kind: str, batch: int, dtype: torch.dtype) -> None:
    step, _ = decode_step(model(name, dtype), batch, kind)
    (gm,) = capture(step, torch.zeros(batch, 1, dtype=torch.long))
    graph = lift(gm)
    assert signatures(graph) == [ARCHS[name].signature] * ARCHS[name].states
    assert not [str(r.why) for r in graph.refused if not r.kept]
    for lifted in graph.found:
        assert validate(graph, lifted) is None
        assert {v.lanes for v in lifted.program.inputs if v.kind == "key"} == {keys_lanes(batch)}
        assert "transformers" in lifted.source
    assert len({lifted.program for lifted in graph.found}) == 1


def keys_lanes(batch: int) -> tuple[str, ...]:
    """Keys vary with the sequence (not when there is one) and with the key head, not inside of its group."""
    return ("n0", "n1") if batch > 1 else ("n1",)
