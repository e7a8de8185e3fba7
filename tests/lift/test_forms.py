"""The forms of the linear-attention family: each lifts to the ops its equation says and runs buffered as in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvbuffer_compile.backend import GraphRecord
from tests.spelled.forms import SIZES, Form, forms
from tests.spelled.lifting import capture, capture_plain, lifted_and_right
from tests.support.daily import chosen, diagonal
from tests.support.oracle import check, check_steps
from tests.support.steps import Sizes

FORMS = list(forms())
FAST = {"inner": "eager", "target": "aten", "flush": 4}
TOKENS = 40  # nine flushes


def sizes_of(form: Form) -> Sizes:
    """The sizes a form is run at: keys and values of one width where it subtracts one from the other."""
    return Sizes(2, 3, 4, 4) if form.name == "ttt" else SIZES


def signatures(record: GraphRecord) -> list[str]:
    """The ops of each rewritten state."""
    return [plan.program.signature for _, plan in record.rewritten]


def assert_served(form: Form, records: list[GraphRecord], variant: str) -> None:
    """Every graph has the programs that a form must lift to, each served by that variant."""
    assert records
    for record in records:
        assert signatures(record) == list(form.kept), [str(r.why) for r in record.refused if not r.kept]
        assert {plan.variant for _, plan in record.rewritten} == {variant}


def run_beside(form: Form, sizes: Sizes, seed: int = 0) -> None:
    """TOKENS steps of the compiled, the eager and the float64 form: outputs and final states by the oracle."""
    g = torch.Generator().manual_seed(seed)
    start = form.start(g, sizes)
    dtypes = (torch.float32, torch.float32, torch.float64)
    states = [[s.to(d).clone() for s in start] for d in dtypes]
    steps = (torch.compile(form.step, backend="kvbuffer", fullgraph=True, options=FAST), form.step, form.step)
    kept: list[list[Tensor]] = [[], [], []]
    with torch.no_grad():
        for _ in range(TOKENS):
            token = form.inputs(sizes, g)
            for step, mine, dtype, out in zip(steps, states, dtypes, kept, strict=True):
                out.append(step(*mine, *(x.to(dtype) if x.is_floating_point() else x for x in token)))
    check_steps(*kept, f"outputs of {form.name}")
    for i, (got, eager, exact) in enumerate(zip(*states, strict=True)):
        check(got + 0, eager, exact, f"state {i} of {form.name}")


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_forms_run_buffered(form: Form, records: list[GraphRecord]) -> None:
    run_beside(form, sizes_of(form))
    assert records
    for record in records:
        rows = [(r.why.rule, r.kept) for r in record.refused]
        assert signatures(record) == [ops for ops in form.kept if ops], rows
        assert {plan.variant for _, plan in record.rewritten} == {"buffered"}
        assert rows == [("vector", True)] * form.kept.count("") and not record.declined


OTHER_SIZES = (Sizes(3, 3, 3, 3), Sizes(1, 1, 4, 4))  # equal, and of one lane: in every run each form at one of them


@pytest.mark.parametrize(("form", "sizes"), diagonal(FORMS, OTHER_SIZES), ids=lambda x: getattr(x, "name", str(x)))
def test_forms_lift_at_other_sizes(form: Form, sizes: Sizes) -> None:
    g = torch.Generator().manual_seed(0)
    (gm,) = capture(form.step, *form.start(g, sizes), *form.inputs(sizes, g))
    found = lifted_and_right(gm).found
    assert [x.program.signature for x in found] == [ops for ops in form.kept if ops]


# One with each kind of decay, correction and number of states; sizes are read alike in the others.
SIZED = {
    "retention",
    "kda",
    "gated_delta_product3",
    "rwkv7",
    "gated_oja_rule",
    "gsa",
    "ttt",
    "lightning",
    "precond_kda",
}


@pytest.mark.parametrize("form", chosen(FORMS, SIZED, lambda form: form.name))
def test_forms_lift_with_dynamic_shapes(form: Form) -> None:
    g = torch.Generator().manual_seed(0)
    sizes = Sizes(4, 3, 6, 6) if form.name == "ttt" else Sizes(3, 4, 6, 5)
    (gm,) = capture(form.step, *form.start(g, sizes), *form.inputs(sizes, g), dynamic=True)
    assert [x.program.signature for x in lifted_and_right(gm).found] == [ops for ops in form.kept if ops]


@pytest.mark.parametrize("form", [f for f in FORMS if "layer_norm" not in f.name], ids=lambda form: form.name)
def test_forms_lift_without_decompositions(form: Form) -> None:
    g = torch.Generator().manual_seed(0)
    sizes = sizes_of(form)
    graph = lifted_and_right(capture_plain(form.step, *form.start(g, sizes), *form.inputs(sizes, g)))
    assert [x.program.signature for x in graph.found] == [ops for ops in form.kept if ops]
