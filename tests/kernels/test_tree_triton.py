"""Generated Triton kernels for trees of drafts, against the composite step: through the interpreter and, on integers,
exactly; in a compiled graph; and compiled ahead of time."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import triton as triton_itself
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvbuffer_compile import accept
from kvbuffer_compile.codegen.schedule import schedule
from kvbuffer_compile.codegen.standalone import aot
from kvbuffer_compile.codegen.triton import triton
from kvbuffer_compile.codegen.triton.launch import configure
from kvbuffer_compile.codegen.triton.load import load
from kvbuffer_compile.errors import EmitError
from kvbuffer_compile.ir.plan import Layout
from kvbuffer_compile.ir.program import Program
from kvbuffer_compile.ir.text import parse
from kvbuffer_compile.runtime import drafts
from kvbuffer_compile.steps import ops, tree
from tests.kernels.test_tree import Drafts, Parents, trees
from tests.kernels.test_triton import CALM, EXACT, LANES, Session, draw, make_plan
from tests.kernels.test_triton import elsewhere as elsewhere
from tests.support.daily import chosen, diagonal, row
from tests.support.oracle import Oracle
from tests.support.programs import NAMED, random_programs
from tests.support.sessions import EXACT_LIMIT

CHAIN, STAR, BOTH, BRANCHED = (-1, 0, 1, 2), (-1,) * 4, (-1, 0, -1, 2), (-1, 0, 0, 1)
FORESTS = ([CHAIN, STAR], [BOTH], [BRANCHED, BOTH], [(-1, 0, 0), (-1, -1, 0)])


class Grove(Session):
    """A tree kernel and the definition, in turns by matrix products, where they apply, and by vectors.

    Afterwards the rows of the first nodes count as owed, so that buffers fill and are flushed.
    """

    parents = torch.empty(1, 0, dtype=torch.int32)

    def step(self, inputs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        self.options["matrix"] = self.steps % 2 == 0
        self.steps += 1
        memory = (self.state, self.cursor, self.tickets, self.rows)
        got = self.module.launch(*memory, inputs, self.parents, **self.options)
        state, cursor, rows = self.expected
        return got, list(tree.tree_step(self.plan, state, cursor, rows, self.parents, inputs))

    def plant(self, parents: list[Parents]) -> list[Tensor]:
        """The trees of the next step, with gaps between their numbers; its operands."""
        self.parents = torch.tensor(parents, dtype=torch.int32).repeat_interleave(2, 1)[:, ::2]
        return draw(self.plan.program, len(parents[0]))

    def grow(self, forests: list[list[Parents]], kept: int = 1) -> None:
        for parents in forests:
            self.check(self.plant(parents))
            self.drop(torch.where(self.cursor[0] < 0, 0, -kept))


# Matrix products and vectors; gates along the axis that is read; reads along both; rows that heads share and rows that
# need a read. Of the other programs each has a part.
@pytest.mark.parametrize("name", chosen(EXACT, {"gdn", "kda", "oja", "everything"}))
def test_trees_are_exact(name: str) -> None:
    """A tree for each sequence, and one for both. They flush at different fill levels."""
    session = Grove(make_plan(EXACT[name], "tree", flush=3, capacity=5), [3, 2])
    session.grow(FORESTS, 2)
    assert session.cursor[1].tolist() == [3, 3] and session.cursor[2].tolist() == [4, 4]


MANY = [row((n, t), (n, t) == ("gdn", 33)) for n in ("gdn", "kda") for t in (33, 64)]


@pytest.mark.parametrize(("name", "count"), MANY)
def test_trees_of_many_nodes(name: str, count: int) -> None:
    """Of more than 32, which take 64 bits."""
    g = torch.Generator().manual_seed(count)
    back = [int(torch.randint(max(-1, j - 9), j, (), generator=g)) for j in range(count)]
    back[-1] = count - 2
    session = Grove(make_plan(NAMED[name], "tree", flush=3, capacity=count), [3, 3], block=8)
    session.grow([[tuple(back)]])


@pytest.mark.nightly
@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("fill", range(5))
def test_flush_at_every_fill_level(name: str, fill: int) -> None:
    session = Grove(make_plan(EXACT[name], "tree", flush=4, capacity=8), [4, 4], block=8)
    session.grow([[CHAIN]] * (fill > 0), fill)
    session.cursor[1] = session.expected[1][1] = 0
    session.grow([[BRANCHED, STAR], [BOTH, CHAIN]], 2)


def check_random_trees(program: Program, forests: list[list[Parents]]) -> None:
    session = Grove(make_plan(program, "tree", flush=2, capacity=5), [2, 1], block=8)
    for parents in forests:
        inputs = session.plant(parents)
        state, cursor, rows = session.expected
        first = (state.clone(), cursor.clone(), [r.clone() for r in rows])
        outputs = tree.tree_step(session.plan, *first, session.parents, inputs)
        if max(x.nan_to_num().abs().max() for x in (first[0], *first[2], *outputs)) > EXACT_LIMIT:
            return
        session.check(inputs)
        session.drop(torch.tensor([-1, -1]))


def forests(most: int) -> st.SearchStrategy[list[list[Parents]]]:
    forest = st.integers(1, 5).flatmap(lambda count: st.lists(trees(count), min_size=2, max_size=2))
    return st.lists(forest, min_size=2, max_size=most)


@settings(max_examples=2, derandomize=True, **CALM)
@given(random_programs(events=5), forests(2))
def test_random_programs_are_exact(program: Program, grown: list[list[Parents]]) -> None:
    check_random_trees(program, grown)


@pytest.mark.nightly
@settings(max_examples=100, **CALM)
@given(random_programs(events=8), forests(4))
def test_many_random_programs_are_exact(program: Program, grown: list[list[Parents]]) -> None:
    check_random_trees(program, grown)


@pytest.mark.parametrize("name", chosen(["gdn", "gla", "kda", "mamba2", "mlstm", "rwkv7"], {"mamba2"}))
def test_real_numbers(name: str) -> None:
    """Decays between 0 and 1, against the same steps in float64."""
    plan = make_plan(NAMED[name], "tree", flush=3, capacity=6)
    session, oracle = Grove(plan, [3, 2]), Oracle()
    fine = make_plan(plan.program, "tree", 3, 6, compute=torch.float64, state_dtype=torch.float64)
    state, cursor, rows = session.state.double(), session.cursor.clone(), [r.double() for r in session.rows]
    decays = {e.factor for e in plan.program.events if not hasattr(e, "left")}
    for parents in FORESTS[:3]:
        shapes = zip(plan.program.inputs, session.plant(parents), strict=True)
        inputs = [torch.rand_like(x) if v in decays else torch.randn_like(x) for v, x in shapes]
        if name == "mamba2":
            inputs[4] = -inputs[4].abs()
        exact = tree.tree_step(fine, state, cursor, rows, session.parents, [x.double() for x in inputs])
        for got, eager, want in zip(*session.step(inputs), exact, strict=True):
            oracle.check(got, eager, want, "output")
        session.drop(torch.tensor([-1, -1]))
        cursor[0] += 1


@pytest.mark.parametrize("name", chosen(["gdn", "kda", "oja"], {"kda"}))
def test_what_is_not_finite_stays_on_its_branch(name: str) -> None:
    session = Grove(make_plan(NAMED[name], "tree", capacity=6), [3, 3], block=8)
    for bad in (torch.inf, torch.nan):
        inputs = session.plant([(-1, -1, 0, 1)])
        for x in inputs:
            x[..., 1] = bad if x.dim() == 3 else x[..., 1]
            x[:, :, 1] = bad
        for got, expected in zip(*session.step(inputs), strict=True):
            assert torch.equal(got[:, :, ::2], expected[:, :, ::2]) and got[:, :, ::2].isfinite().all()
            assert not got[:, :, 1::2].isfinite().any()


def test_padding_sequences_and_states_that_hold_nothing() -> None:
    session = Grove(make_plan(NAMED["kda"], "tree", capacity=4), [3, 3], block=8)
    session.state[0] = session.expected[0][0] = torch.nan
    for cursor in (session.cursor, session.expected[1]):
        cursor[0, 1], cursor[3, 0] = -1, 1
    (out,) = session.check(session.plant([(-1, 0, 0)]))
    assert out[0].any() and not out[1].any()
    session.drop(torch.tensor([-2, 0]))
    session.check(session.plant([(-1, 0, 0)]))
    assert session.cursor.tolist() == [[0, -1], [3, 3], [2, 2], [0, 0]] and session.state[0].isfinite().all()


@pytest.mark.parametrize("name", chosen(["gdn", "kda"], {"gdn"}))
def test_shadows(name: str) -> None:
    plan = make_plan(NAMED[name], "tree", capacity=5, read_dtype=torch.float16)
    session = Grove(plan, [3, 2], block=8)
    session.cursor[3, 1] = session.expected[1][3, 1] = 1
    session.grow([[BOTH], [CHAIN, STAR], [BRANCHED]])


def test_a_state_without_sequences_has_one_tree() -> None:
    program = parse(str(NAMED["gdn"]).replace("over b h", "over h").replace("(b h)", "(h)"))
    layout = Layout(((4,), (2,), (5,)), (1, 0, 2))  # [K, H, V]: dim 0 is no batch
    plan = make_plan(program, "tree", capacity=6, layout=layout)
    Grove(plan, [2], state=torch.randint(-1, 2, (4, 2, 5)).float(), block=8).grow([[BOTH], [CHAIN]], 2)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("(path >> token) & 1", "(path >> token) | 1"),
        ("(path >> token) & 2", "(path >> token) & 1"),
        ("(path >> token) == 1", "token == t - 1"),
        ("tl.gather(over, tl.maximum(over, 0), 0)", "over"),
        ("tl.store(cursor, kept)", "tl.store(cursor, kept + T)"),
    ],
)
def test_a_mutant_is_caught(right: str, wrong: str) -> None:
    session = Grove(make_plan(NAMED["gdn"], "tree", capacity=9), [3, 3], block=8)
    source = triton.emit(session.plan)
    assert right in source
    session.module = load(source.replace(right, wrong), interpret=True)
    with pytest.raises(AssertionError):
        for _ in range(2):
            inputs = session.plant([tuple(range(-1, 7)), (*BRANCHED, 2, 3, 4, 5)])
            inputs[3] = torch.full_like(inputs[3], -1.0)
            session.check(inputs)


def test_what_has_no_kernel() -> None:
    """Pools, which take no trees; and more nodes than a number has bits run in the composite step."""
    layout = Layout(((None,), (2,), (1,), (1,)), (0, 1, 2, 3))
    plan = make_plan(NAMED["gdn"], "tree", capacity=70, target="triton", sizes=(1, 1), layout=layout)
    with pytest.raises(EmitError, match="pool"):
        triton.emit(replace(plan, slots=True))
    session = Grove(make_plan(NAMED["gdn"], "tree", capacity=70), [3, 3])
    with pytest.raises(ValueError, match="65 drafts, 65 parents"):
        session.step(session.plant([(-1,) * 65]))
    ops.use_triton(plan, interpret=True)
    lanes = tuple(LANES[x] for x in plan.program.lanes)
    rows = [torch.zeros(plan.row_shape(v, lanes)) for v in plan.program.logged]
    memory = (torch.zeros(*lanes, 1, 1), ops.new_cursor(plan, lanes, torch.device("cpu")), *rows)
    inputs = [torch.ones(*lanes, 65, *([1] * (v.kind != "scalar"))) for v in plan.program.inputs]
    out = ops.step_op(plan)(*memory, torch.full((1, 65), -1, dtype=torch.int32), *inputs)
    assert out.shape == (*lanes, 65, 1) and (out == out[0, 0, 0]).all()


def test_trees_on_a_compiled_graph() -> None:
    """What a GPU runs, interpreted."""
    with triton_itself.knobs.runtime.scope():  # what is set of them inside would stay set
        triton_itself.knobs.runtime.interpret = True  # and with it the environment
        run = Drafts("triton")
        for parents, path in (([-1, 0, 0, 1], [0, 2]), ([-1, -1, 0], [1])):
            inputs = run.draft([parents] * 2)
            accept(run.states[0], path)
            run.keep(inputs, [path] * 2)
        op = drafts._tree_plan(run.account.plan).op_name
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"kvbuffer::{op}", "CPU")


# ----------------------------------------------------------------------------------------- ahead of time

SHAPES = {"gdn": (128, 128), "kda": (128, 128), "mamba2": (128, 64)}


@pytest.mark.parametrize(("name", "target"), diagonal(SHAPES, ["sm_90", "gfx942"]))
def test_nothing_spills_of_16_nodes(name: str, target: str, elsewhere) -> None:
    layout = Layout(((None,), (32,), *((n,) for n in SHAPES[name])), (0, 1, 2, 3))
    plan = make_plan(NAMED[name], "tree", 16, 32, sizes=SHAPES[name], layout=layout)
    assert configure(plan, schedule(plan.program, in_place=True)).matrix == (name != "kda")
    found = elsewhere.submit(aot.usage, plan, target, (8, 32), 16).result()
    assert found.spills == 0 and found.shared <= 65536, found


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["gdn", "gla", "kda", "mamba2", "mlstm", "rwkv7", "oja", "deltaproduct2"])
def test_every_number_of_nodes_compiles(name: str, elsewhere) -> None:
    layout = Layout(((None,), (32,), (64,), (64,)), (0, 1, 2, 3))
    plan = make_plan(NAMED[name], "tree", 16, 64, sizes=(64, 64), layout=layout)
    for nodes in (1, 2, 7, 32, 33, 64):
        assert elsewhere.submit(aot.usage, plan, "sm_90", (8, 32), nodes).result().registers
