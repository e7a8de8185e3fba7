"""The forms that graphs give a token: masks, merged dims, several queries, transitions as matrices."""

from __future__ import annotations

import pytest
import torch

from kvbuffer_compile.backend import GraphRecord
from tests.lift.test_forms import FAST, assert_served, run_beside, signatures
from tests.spelled.forms import SIZES, Form
from tests.spelled.graph_forms import GRAPH_FORMS, NEAR
from tests.spelled.lifting import capture, capture_plain, lifted_and_right
from tests.support.daily import chosen, diagonal
from tests.support.oracle import Oracle, check
from tests.support.steps import Sizes

KEPT = ("vector", "overwritten", "cache")  # what no matrix state is refused as
NAMED = {"ids": lambda form: form.name}
BATCHED = ("merged_lanes", "flat_lanes", "flat_state", "one_feeds_the_next", "grouped_queries")
DAILY = {"merged_lanes", "one_feeds_the_next", "flat_state"}


@pytest.mark.parametrize("form", GRAPH_FORMS, **NAMED)
def test_graph_forms_run_buffered(form: Form, records: list[GraphRecord]) -> None:
    run_beside(form, SIZES)
    assert_served(form, records, "buffered")


OTHER_SIZES = (Sizes(3, 3, 3, 3), Sizes(1, 1, 4, 5))  # equal, and of one lane: in every run each form at one of them


@pytest.mark.parametrize(
    ("form", "sizes"), diagonal(GRAPH_FORMS, OTHER_SIZES), ids=lambda x: getattr(x, "name", str(x))
)
def test_graph_forms_at_other_sizes(form: Form, sizes: Sizes) -> None:
    g = torch.Generator().manual_seed(0)
    (gm,) = capture(form.step, *form.start(g, sizes), *form.inputs(sizes, g))
    assert [x.program.signature for x in lifted_and_right(gm).found] == list(form.kept)


@pytest.mark.parametrize("form", GRAPH_FORMS, **NAMED)
def test_graph_forms_without_decompositions(form: Form) -> None:
    g = torch.Generator().manual_seed(0)
    graph = lifted_and_right(capture_plain(form.step, *form.start(g), *form.inputs(SIZES, g)))
    kept = ["DUR"] if form.name == "mixed" else list(form.kept)  # lerp decomposes into two cases by its weight
    assert [x.program.signature for x in graph.found] == kept


# Where a size of the state is a product of two that are both symbolic, neither is known to be fixed.
FIXED = [form for form in GRAPH_FORMS if form.name != "flat_state"]
# Merged and joined dims, matrices and lists of several states: what reads sizes. In every run the batches below too.
SIZED = {"several_queries", "grouped_queries", "flat_lanes", "matrix", "diagonal_and_low_rank", "lists_of_tensors"}


@pytest.mark.parametrize("form", chosen(FIXED, SIZED, lambda form: form.name))
def test_graph_forms_with_dynamic_shapes(form: Form) -> None:
    g = torch.Generator().manual_seed(0)
    (gm,) = capture(form.step, *form.start(g), *form.inputs(SIZES, g), dynamic=True)
    assert [x.program.signature for x in lifted_and_right(gm).found] == list(form.kept)


@pytest.mark.parametrize("form", chosen([f for f in GRAPH_FORMS if f.name in BATCHED], DAILY, lambda form: form.name))
def test_batches_of_any_size_run_buffered(form: Form, records: list[GraphRecord]) -> None:
    """The second size makes the batch symbolic, merged with heads too; the third one needs no other graph."""
    g = torch.Generator().manual_seed(0)
    compiled = torch.compile(form.step, backend="kvbuffer", fullgraph=True, options=FAST)
    with torch.no_grad():
        for batch in (2, 5, 7):
            sizes = Sizes(batch, SIZES.H, SIZES.K, SIZES.V)
            states = form.start(g, sizes)
            eager, exact = [s.clone() for s in states], [s.double() for s in states]
            with Oracle() as oracle:
                for _ in range(34):
                    x = form.inputs(sizes, g)
                    wide = [y.double() if y.is_floating_point() else y for y in x]
                    oracle.add(compiled(*states, *x), form.step(*eager, *x), form.step(*exact, *wide))
            for got, want, true in zip(states, eager, exact, strict=True):
                check(got + 0, want, true)
    assert 2 <= len(records) <= 4, "plain and guarded, of one batch and of any"
    for record in records:
        assert signatures(record) == list(form.kept), [str(r.why) for r in record.refused if not r.kept]


@pytest.mark.parametrize(("form", "rules"), NEAR, ids=[form.name for form, _ in NEAR])
@pytest.mark.parametrize("sizes", [SIZES, Sizes(3, 3, 3, 3)], ids=["distinct", "equal"])
def test_near_misses_are_declined(form: Form, rules: str, sizes: Sizes) -> None:
    g = torch.Generator().manual_seed(0)
    (gm,) = capture(form.step, *form.start(g, sizes), *form.inputs(sizes, g))
    graph = lifted_and_right(gm)
    assert not graph.found
    assert sorted(r.why.rule for r in graph.refused) == sorted(rules.split()), "a row for each tensor that is written"
    assert all(r.kept == (r.why.rule in KEPT) and r.why.source for r in graph.refused)


@pytest.mark.parametrize("name", ["several_queries", "grouped_queries"])
def test_queries_taken_apart_compile_with_inductor(name: str, records: list[GraphRecord]) -> None:
    (form,) = (f for f in GRAPH_FORMS if f.name == name)
    g = torch.Generator().manual_seed(0)
    states, token = form.start(g), form.inputs(SIZES, g)
    expected = form.step(*[s.clone() for s in states], *token)
    with torch.no_grad():
        got = torch.compile(form.step, backend="kvbuffer", fullgraph=True, options={"flush": 4})(*states, *token)
    torch.testing.assert_close(got, expected)
    assert [signatures(record) for record in records] == [list(form.kept)]


def test_what_is_not_proved_stays_as_it_was_captured(records: list[GraphRecord]) -> None:
    """Only the fused call with a read inside is written out; the one behind it keeps its kernel."""
    g = torch.Generator().manual_seed(0)
    state = torch.randn(2, 4, 5, generator=g)
    token = [torch.randn(2, 3, 4, generator=g), torch.randn(2, 4, generator=g), torch.randn(2, 3, 5, generator=g)]
    calls = []

    def inner(gm: torch.fx.GraphModule, inputs: object) -> object:
        calls.append([str(n.target) for n in gm.graph.nodes])
        return gm.forward

    def step(S: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        S.copy_(0.5 * S + k.unsqueeze(-1) * v[:, :1])
        out = torch.baddbmm(v, q, S, beta=0.5)
        return torch.baddbmm(out, q @ q.mT, out, beta=0.5)

    expected = step(state.clone(), *token)
    options = {"inner": inner, "target": "aten", "flush": 4}
    with torch.no_grad():
        got = torch.compile(step, backend="kvbuffer", fullgraph=True, options=options)(state, *token)
    torch.testing.assert_close(got, expected)
    assert signatures(records[0]) == ["DURRR"]
    assert calls[0].count("aten.baddbmm.default") == 1
