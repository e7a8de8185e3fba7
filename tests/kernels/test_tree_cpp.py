"""Generated C++ kernels for trees of drafts, against the composite step: on integers, exactly."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from torch import Tensor

from kvbuffer_compile.codegen import build
from kvbuffer_compile.errors import EmitError
from kvbuffer_compile.ir.plan import Plan
from kvbuffer_compile.ir.program import Program
from kvbuffer_compile.steps import ops
from tests.kernels.test_cpp import built, inners, lenient, shapes
from tests.kernels.test_cut import CUT
from tests.kernels.test_tree import Parents, trees
from tests.support.daily import chosen
from tests.support.programs import NAMED, random_programs
from tests.support.sessions import EXACT_LIMIT, Session, make_plan, same

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="needs a C++ compiler")

N = 3  # sequences of a session


class Grove:
    """A session of decode steps with trees between them. Both kernels are given copies of the same memory."""

    def __init__(self, plan: Plan, **options: object) -> None:
        tree = replace(plan, variant="tree")
        self.kernel, self.composite = built(tree), ops.step_op(replace(tree, target="aten"))
        self.session = Session(plan, built(plan), **options)

    def grow(self, parents: list[Parents]) -> bool:
        """One tree on copies; False when the numbers were too large to be exact."""
        s, count = self.session, len(parents[0])
        drafts = [s.draw() for _ in range(count)]
        inputs = [s.spread(torch.stack([d[n] for d in drafts], dim=len(s.lanes))) for n in drafts[0]]
        forest = s.spread(torch.tensor(parents, dtype=torch.int32))
        (got, *memory), (want, *expected) = (self.run(op, forest, inputs) for op in (self.kernel, self.composite))
        if max(x.nan_to_num().abs().max() for x in want) > EXACT_LIMIT:
            return False
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b), f"{parents}\n{s.plan.program}"
        for a, b in zip(memory, expected, strict=True):
            assert same(a, b), f"{parents}\n{s.plan.program}"
        return True

    def run(self, op: object, forest: Tensor, inputs: list[Tensor]) -> tuple[list[Tensor], ...]:
        s = self.session
        memory = [x.clone() for x in (s.state, s.cursor, *s.rows)]
        out = op(*memory, forest, *inputs)
        outs = [out] if isinstance(out, Tensor) else list(out or [])
        return outs, *memory


def play(plan: Plan, forests: list[list[Parents]], **options: object) -> int:
    """Trees at growing fill levels; how many were compared."""
    grove = Grove(plan, **options)
    done = 0
    for forest in forests:
        done += grove.grow(forest)
        if not grove.session.step():
            break
    return done


def forest(most: int, seed: int) -> list[Parents]:
    """A tree for each sequence, from a chain to a star."""
    g = torch.Generator().manual_seed(seed)
    count = int(torch.randint(1, most + 1, (), generator=g))
    back = [1, 2, most][seed % 3]
    return [
        tuple(int(torch.randint(max(-1, j - back), j, (), generator=g)) if j else -1 for j in range(count))
        for _ in range(N)
    ]


PROGRAMS = ("gdn", "kda", "oja", "rwkv7", "mlstm", "deltaproduct2", "gla")


@pytest.mark.parametrize("name", chosen(PROGRAMS, {"oja"}))
def test_trees(name: str) -> None:
    """A flush at every fill level, padding, NaN in unused slots, any strides, states that hold nothing."""
    plan = make_plan(NAMED[name], sizes=(20, 37), capacity=12, inner="key" if len(name) % 2 else "value")
    forests = [forest(8, seed) for seed in range(6)]
    assert play(plan, forests, limits=(1, 3, 2)) > 2
    play(plan, forests, limits=(4, 2, 3), padded=(1,), strided=True)
    play(plan, forests, bare=True)
    play(plan, [[trees[0]] for trees in forests])


def test_trees_of_64_nodes() -> None:
    plan = make_plan(NAMED["gdn"], sizes=(16, 32), capacity=80, flush=16)
    chain, star = tuple(range(-1, 63)), (-1,) * 64
    binary = (-1, *((j - 1) // 2 for j in range(1, 64)))
    assert play(plan, [[chain, star, binary]]) == 1


def test_threads_share_a_lane() -> None:
    plan = make_plan(NAMED["gdn"], sizes=(96, 150), capacity=12)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(8)
        assert play(plan, [forest(8, seed) for seed in range(4)], limits=(1, 2, 3)) > 1
    finally:
        torch.set_num_threads(threads)


@st.composite
def forests(draw: st.DrawFn) -> list[Parents]:
    count = draw(st.integers(1, 8))
    return [draw(trees(count)) for _ in range(N)]


def sweep(program: Program, inner: str, merged: bool, sizes: tuple[int, int], grown: list[list[Parents]]) -> None:
    plan = make_plan(program, sizes=sizes, inner=inner, merged=merged, capacity=10)
    play(plan, grown, limits=(4, 1, 3))
    play(plan, grown, limits=(2, 3, 1), padded=(1,), strided=True)


@seed(6)
@settings(max_examples=2, **lenient)
@given(random_programs(), inners, st.booleans(), shapes, st.lists(forests(), min_size=3, max_size=5))
def test_random_programs(program, inner, merged, sizes, grown) -> None:
    sweep(program, inner, merged, sizes, grown)


@pytest.mark.nightly
@settings(max_examples=30, **lenient)
@given(random_programs(), inners, st.booleans(), shapes, st.lists(forests(), min_size=3, max_size=5))
def test_many_random_programs(program, inner, merged, sizes, grown) -> None:
    sweep(program, inner, merged, sizes, grown)


def test_wrong_parents_are_refused() -> None:
    grove = Grove(make_plan(NAMED["gdn"], capacity=12))
    for parents in ([(-1, 1)] * N, [(-2, 0)] * N, [(-1, 0)] * 2):
        with pytest.raises(RuntimeError, match="parents must"):
            grove.run(grove.kernel, torch.tensor(parents, dtype=torch.int32), _stacked(grove.session, 2))
    with pytest.raises(RuntimeError, match="parents must be one for each token"):
        grove.run(grove.kernel, torch.tensor([(-1, 0, 1)], dtype=torch.int32), _stacked(grove.session, 2))


def _stacked(session: Session, count: int) -> list[Tensor]:
    return [torch.stack([x] * count, dim=len(session.lanes)) for x in session.draw().values()]


def test_cut_steps_have_no_tree_kernel() -> None:
    with pytest.raises(EmitError, match="tree"):
        ops.use_cpp(make_plan(CUT["error"], "tree"))
