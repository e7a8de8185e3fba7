"""Steps that read a shadow of their state: exactly on numbers that fit in it, by the oracle on all others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from kvbuffer_compile.codegen import build
from kvbuffer_compile.ir.plan import Layout
from kvbuffer_compile.ir.program import Read
from kvbuffer_compile.ir.shadow import scale_kind
from kvbuffer_compile.steps import ops
from tests.kernels.test_cpp import inners, lenient, shapes
from tests.kernels.test_cut import CUT
from tests.kernels.test_slots import with_tickets
from tests.support.daily import chosen, row
from tests.support.programs import NAMED, random_programs
from tests.support.sessions import LANES, Session, make_plan

SHADOWED = ("gdn", "gla", "kda", "mamba2", "rwkv7", "deltaproduct2")
TARGETS = ("aten", "cpp")


def played(plan, target, steps=11, **options):
    """A session that was played; how many of its steps could be compared."""
    plan = replace(plan, target=target)
    op = ops.step_op(plan)
    if target == "cpp":
        if build.compiler() is None:
            pytest.skip("needs a C++ compiler")
        ops.use_cpp(plan)
    session = Session(plan, op, **options)
    while session.steps < steps and session.step():
        pass
    return session


def read_something(session):
    """Whether some sequence has a shadow by now, which the last step could read."""
    return bool((session.shadow[1] > 0).any())


INNER = {"gdn": "value", "gla": "key"}  # in every run


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("name", "inner"), [row((n, i), INNER.get(n) == i) for n in SHADOWED for i in ("value", "key")]
)
def test_buffered(name, inner, target):
    plan = make_plan(NAMED[name], sizes=(20, 37), inner=inner, read=torch.float16)
    if not any("exp" in str(op) for op in plan.program.ops):
        assert played(plan, target, limits=(2, 3, 3)).steps > 3
        assert read_something(played(plan, target, limits=(4, 2, 3), padded=(1,), strided=True))
    assert read_something(played(plan, target, exact=False, limits=(4, 3, 1)))
    assert read_something(played(plan, target, exact=False, bare=True, strided=True))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", chosen(["gdn", "gla", "rwkv7"], {"gdn"}))
def test_verify(name, target):
    plan = make_plan(NAMED[name], "verify", sizes=(20, 37), capacity=7, read=torch.float16)
    if not any("exp" in str(op) for op in plan.program.ops):
        assert played(plan, target, limits=(2, 3, 3)).steps > 2
    assert read_something(played(plan, target, exact=False, limits=(4, 3, 1)))
    assert read_something(played(plan, target, exact=False, bare=True))


@pytest.mark.parametrize("target", TARGETS)
def test_bfloat16(target):
    plan = make_plan(NAMED["gdn"], sizes=(20, 37), read=torch.bfloat16)
    assert played(plan, target, limits=(2, 3, 3)).steps > 3
    assert read_something(played(plan, target, exact=False, limits=(4, 3, 1)))


def small(*shape: int) -> torch.Tensor:
    """Numbers whose sums of products stay exact in a float16."""
    return (torch.randint(-1, 2, shape) * torch.randint(0, 2, shape)).float()


def beside(
    plan, before: list[torch.Tensor], extra: Callable[[], list[torch.Tensor]], lanes: tuple[int, ...], steps: int
):
    """The generated kernel and the composite on equal memory: every bit of it, and all outputs. Steps that read a
    shadow of every sequence are counted."""
    tails = {"scalar": (), "key": plan.sizes[:1], "value": plan.sizes[1:]}
    tokens = (3,) if plan.several else ()
    composite = replace(plan, target="aten")
    kernel, definition = ops.step_op(plan), ops.step_op(composite)
    ops.use_cpp(plan) if plan.target == "cpp" else ops.use_triton(plan, interpret=True)
    mine, theirs = ([x.clone() for x in before] for _ in range(2))
    mine[1] = with_tickets(plan, mine[1])
    read = 0
    for _ in range(steps):
        given = [*extra(), *(small(*lanes, *tokens, *tails[v.kind]) for v in plan.program.inputs)]
        read += bool((mine[-1] > 0).all())
        assert torch.equal(kernel(*mine, *given), definition(*theirs, *given))
        for a, b in zip(mine, theirs, strict=True):
            assert torch.equal(a.nan_to_num(99), b.nan_to_num(99))
    assert read


def memory(plan, count: int) -> list[torch.Tensor]:
    """State, cursor, rows and shadow of so many sequences, which flush at different counts."""
    lanes = (count, LANES["h"])
    cursor = torch.zeros(4, count, dtype=torch.int32)
    cursor[1] = 1 + torch.arange(count) % plan.flush
    rows = [torch.full(plan.row_shape(v, lanes), torch.nan) for v in plan.program.logged]
    shadow = [torch.full((*lanes, *plan.sizes), torch.nan, dtype=plan.read_dtype), torch.zeros(plan.scale_shape(lanes))]
    return [small(*lanes, *plan.sizes), cursor, *rows, *shadow]


@pytest.mark.parametrize("target", [row("cpp", True), row("triton", False)])
def test_slots_of_a_pool(target):
    """Of equal slots the last is stored, shadow and all; slots that are not chosen are left alone."""
    if target == "cpp" and build.compiler() is None:
        pytest.skip("needs a C++ compiler")
    plan = replace(make_plan(NAMED["gdn"], sizes=(4, 19), flush=2, read=torch.float16), slots=True, target=target)
    chosen = iter([[0, 1, 2], [3, 0, 3], [1, 2, -1], [0, 1, 1], [2, 3, 0], [3, 2, 1], [0, 2, -2], [1, 3, 0]])
    beside(plan, memory(plan, 4), lambda: [torch.tensor(next(chosen))], (3, LANES["h"]), 8)


@pytest.mark.skipif(build.compiler() is None, reason="needs a C++ compiler")
def test_trees_of_drafts():
    plan = make_plan(NAMED["gdn"], "tree", sizes=(4, 19), capacity=7, read=torch.float16)
    parents = iter([[[-1, 0, 0]], [[-1, -1, 1]], [[-1, 0, 1]]])
    beside(plan, memory(plan, 3), lambda: [torch.tensor(next(parents), dtype=torch.int32)], (3, LANES["h"]), 3)


@pytest.mark.parametrize("target", TARGETS)
def test_what_is_not_finite_is_read_from_the_state(target):
    """Inf in one column of one head: that head has no shadow before the next flush, outputs are those of the state."""
    plan = replace(make_plan(NAMED["gla"], sizes=(4, 19), flush=3, read=torch.float16), target=target)
    op, plain = (ops.step_op(p) for p in (plan, replace(plan, read_dtype=None, target="aten")))
    if target == "cpp":
        ops.use_cpp(plan)
    mine = memory(plan, 2)
    mine[0][1, 0, 2, 5], mine[0][0, 0, 0, 3] = torch.inf, 1e30
    theirs = [x.clone() for x in mine[:-2]]
    tails = {"scalar": (), "key": plan.sizes[:1], "value": plan.sizes[1:]}
    for _ in range(3):
        given = [torch.ones(2, LANES["h"], *tails[v.kind]) for v in plan.program.inputs]
        got, want = op(*mine, *given), plain(*theirs, *given)
        assert torch.equal(mine[-1].isnan().any(-1), torch.tensor([[False, False], [True, False]]))
        assert got[1, 0].isinf().sum() == 1
        torch.testing.assert_close(got[1], want[1], rtol=0, atol=0)
        torch.testing.assert_close(got, want, rtol=2**-9, atol=0)


def test_every_recurrence_here_has_reads():
    assert all(any(isinstance(op, Read) for op in NAMED[name].ops) for name in SHADOWED)


@pytest.mark.skipif(build.compiler() is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("variant", ["buffered", "verify"])
def test_steps_that_are_cut(variant):
    plan = make_plan(CUT["error"], variant, sizes=(5, 18), capacity=7, read=torch.float16)
    session = played(plan, "cpp", limits=(2, 3, 3))
    assert session.steps > 1 and read_something(session)


@pytest.mark.skipif(build.compiler() is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("inner", chosen(["value", "key"], {"key"}))
def test_tiles_have_scales_of_their_own(inner):
    """More threads than lanes: each tile of a lane makes and reads its part of the shadow."""
    plan = make_plan(NAMED["gdn"], sizes=(128, 132), inner=inner, read=torch.float16)
    lanes, order = (1, 1), plan.layout.order
    plan = replace(plan, layout=Layout(((None,),) * 4, order))
    state, cursor, *sides = memory(plan, 1)
    sides[-2:] = [sides[-2][:, :1].permute(order).contiguous(), sides[-1][:, :1].contiguous()]
    rows = [torch.full(plan.row_shape(v, lanes), torch.nan) for v in plan.program.logged]
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        beside(plan, [state[:, :1].permute(order).contiguous(), cursor, *rows, *sides[-2:]], list, lanes, 7)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.nightly
@pytest.mark.skipif(build.compiler() is None, reason="needs a C++ compiler")
@settings(max_examples=100, **lenient)
@given(random_programs(), st.sampled_from(["buffered", "verify"]), inners, shapes, st.sampled_from(TARGETS))
def test_many_random_programs(program, variant, inner, sizes, target):
    assume(scale_kind(program) is not None)
    plan = make_plan(program, variant, sizes=sizes, inner=inner, capacity=6, read=torch.float16)
    played(plan, target, limits=(4, 1, 3))
    played(plan, target, limits=(2, 3, 1), padded=(1,), strided=True)
