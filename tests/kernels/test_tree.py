"""Drafts that branch, against each path run alone; what is accepted of them, and what happens in between."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from torch import Tensor

from kvbuffer_compile import accept, draft_tree, materialize, rollback
from kvbuffer_compile.accounts.account import Account
from kvbuffer_compile.codegen import build
from kvbuffer_compile.errors import StateError
from kvbuffer_compile.ir.program import Program
from kvbuffer_compile.runtime import by_hand, drafts
from kvbuffer_compile.runtime.check import dense
from kvbuffer_compile.steps import ops
from tests.kernels.test_cpp import is_exact, lenient
from tests.lift.test_sequence import H, K, V, grouped_delta_rule
from tests.lift.test_sequence import draw as draw_tokens
from tests.runtime.test_runtime import Pair
from tests.runtime.test_runtime import draw as draw_one
from tests.support.exact import Exact, Token
from tests.support.oracle import Oracle
from tests.support.programs import NAMED, random_programs

N = 3  # sequences of an exact run
Parents = tuple[int, ...]


@st.composite
def trees(draw: st.DrawFn, count: int) -> Parents:
    """Parents of a tree: a chain, a star, and all that lies between."""
    back = draw(st.sampled_from([1, 2, 4, count]))  # how far a node looks back
    return tuple(draw(st.integers(max(-1, j - back), j - 1)) for j in range(count))


@st.composite
def tree_rounds(draw: st.DrawFn, most: int) -> list[tuple[list[Parents], list[list[int]], int]]:
    """Rounds: a tree and an accepted path for each sequence, and how many tokens are decoded afterwards."""
    rounds = []
    for _ in range(draw(st.integers(1, 3))):
        count = draw(st.integers(1, most))
        parents = [draw(trees(count)) for _ in range(N)]
        ends = [draw(st.integers(-1, count - 1)) for _ in range(N)]
        paths = [path_to(p, end) for p, end in zip(parents, ends, strict=True)]
        rounds.append((parents, paths, draw(st.integers(0, 3))))
    return rounds


def path_to(parents: Sequence[int], node: int) -> list[int]:
    """The nodes from the root to a node, -1 for none."""
    return [] if node < 0 else [*path_to(parents, parents[node]), node]


programs = st.one_of(st.sampled_from([p for p in NAMED.values() if is_exact(p)]), random_programs())


def account_for(run: Exact, parents: list[Parents]) -> Any:
    """What of an account is needed to accept a path."""
    return SimpleNamespace(plan=run.plan, cursor=run.cursor, rows=run.rows, drafts=torch.tensor(parents))


def branch(run: Exact, parents: list[Parents], tokens: list[Token]) -> list[Tensor]:
    """The state after each node by the definition, having compared every node's outputs."""
    before = run.dense
    outs = run.step("tree", tokens, torch.tensor(parents, dtype=torch.int32))
    states: list[Tensor] = []
    for j, token in enumerate(tokens):
        above = [before[b] if p[j] < 0 else states[p[j]][b] for b, p in enumerate(parents)]
        after, expected = run.advance(torch.stack(above), token)
        states.append(after)
        for got, want in zip(outs, expected, strict=True):
            assert torch.equal(got.select(len(run.lanes), j), want), f"node {j} of {parents}"
    assert torch.equal(run.materialized(), before), "a tree commits nothing"
    return states


def play(program: Program, flush: int, most: int, rounds: list[tuple[list[Parents], list[list[int]], int]]) -> None:
    run = Exact(program, flush, most, seed=len(rounds))
    for parents, paths, decoded in rounds:
        tokens = [run.draw() for _ in parents[0]]
        states = branch(run, parents, tokens)
        account = account_for(run, parents)
        chosen = drafts._paths(paths)
        drafts._check(account, chosen)
        drafts._keep([account], chosen)
        run.dense = torch.stack([states[p[-1]][b] if p else run.dense[b] for b, p in enumerate(paths)])
        assert torch.equal(run.materialized(), run.dense)
        for _ in range(decoded):
            token = run.draw()
            outs = run.step("buffered", [token])
            run.dense, expected = run.advance(run.dense, token)
            assert all(torch.equal(a.squeeze(len(run.lanes)), b) for a, b in zip(outs, expected, strict=True))
        assert torch.equal(run.materialized(), run.dense)


@seed(2)
@settings(max_examples=25, **lenient)
@given(programs, st.integers(1, 5), tree_rounds(9))
def test_small_trees_are_exact(program: Program, flush: int, rounds: list) -> None:
    play(program, flush, 9, rounds)


@pytest.mark.parametrize("name", ["gdn", "oja"])
@pytest.mark.parametrize("back", [1, 3, 64])
def test_trees_of_64_nodes_are_exact(name: str, back: int) -> None:
    g = torch.Generator().manual_seed(back)
    parents = [tuple(int(torch.randint(max(-1, j - back), j, (), generator=g)) for j in range(64)) for _ in range(N)]
    paths = [path_to(p, 63 - b) for b, p in enumerate(parents)]
    play(NAMED[name], 4, 64, [(parents, paths, 2)])


@pytest.mark.nightly
@settings(max_examples=400, **lenient)
@given(programs, st.integers(1, 5), tree_rounds(64))
def test_many_trees_are_exact(program: Program, flush: int, rounds: list) -> None:
    play(program, flush, 64, rounds)


def test_padding_sequences_and_states_that_hold_nothing() -> None:
    run = Exact(NAMED["gdn"], 4, 5, seed=0)
    run.state.fill_(10**9)
    run.dense.zero_()
    run.cursor[3] = 1
    states = branch(run, [(-1, 0, 0, -1, 3)] * N, [run.draw() for _ in range(5)])
    assert (run.state == 10**9).all() and run.cursor[0].tolist() == [0] * N and run.cursor[2].tolist() == [1] * N
    run.cursor[0, 1] = -1
    drafts._keep([account_for(run, [(-1, 0, 0, -1, 3)])], torch.tensor([[3, 4]]))
    assert run.cursor[0].tolist() == [2, -1, 2]
    kept = run.materialized()
    assert all(torch.equal(kept[b], states[4][b]) for b in (0, 2))
    (out,) = run.step("tree", [run.draw() for _ in range(5)], torch.tensor([[-1, 0, 0, -1, 3]]).int())
    assert not out[1].any() and out[0].any()


def test_one_cursor_for_a_state_without_sequences() -> None:
    text = str(NAMED["gdn"]).replace("over b h", "over h").replace("(b h)", "(h)")
    from kvbuffer_compile.ir.plan import Layout
    from kvbuffer_compile.ir.text import parse

    run = Exact(NAMED["gdn"], 3, 4, seed=1)
    program = parse(text)
    plan = replace(run.plan, program=program, layout=Layout(((2,), (3,), (4,)), (0, 1, 2)))
    plan = replace(plan, layout=Layout(((3,), (2,), (4,)), (1, 0, 2)))  # [K, H, V]: dim 0 is no batch
    state = run.integers(3, 2, 4)
    cursor = torch.tensor([[0], [3], [0], [0]], dtype=torch.int32)
    rows = [torch.full(plan.row_shape(v, (2,)), 10**9) for v in program.logged]
    inputs = [run.integers(2, 4, *{"scalar": (), "key": (3,), "value": (4,)}[v.kind]) for v in program.inputs]
    got = ops.step_op(replace(plan, variant="tree"))(state, cursor, *rows, torch.tensor([[-1, 0, 0, 1]]).int(), *inputs)
    for path in ([0, 1, 3], [0, 2]):
        args = (state.clone(), cursor.clone(), *(r.clone() for r in rows))
        want = ops.step_op(replace(plan, variant="verify"))(*args, *(x[:, path] for x in inputs))
        assert torch.equal(got[:, path], want)


# --------------------------------------------------------------------------------------- compiled graphs

DTYPES = (torch.float32, torch.float32, torch.float64)
BATCH = 2


class Drafts:
    """Trees on a compiled graph of any number of tokens, beside an eager state and an exact one."""

    def __init__(self, target: str = "aten", inner: str = "eager", flush: int = 5) -> None:
        options = {"inner": inner, "target": target, "flush": flush, "capacity": flush + 16}
        self.compiled = torch.compile(grouped_delta_rule, backend="kvbuffer", fullgraph=True, options=options)
        self.g = torch.Generator().manual_seed(0)
        start = torch.randn(BATCH, H, K, V, generator=self.g)
        self.states = [start.to(d).clone() for d in DTYPES]
        self.oracle = Oracle()

    @torch.no_grad()
    def draft(self, parents: Sequence[Sequence[int]]) -> tuple[Tensor, ...]:
        """A tree for each sequence; every path of it is compared with itself run alone."""
        inputs = draw_tokens(len(parents[0]), self.g)
        with draft_tree(parents):
            out = self.compiled(self.states[0], *inputs)
        for b, tree in enumerate(parents):
            paths = [path_to(tree, j) for j in range(len(tree))]
            eager, exact = (
                torch.stack([self.alone(s[b : b + 1].clone(), inputs, b, path)[0, -1] for path in paths])
                for s in self.states[1:]
            )
            self.oracle.check(out[b], eager, exact, "nodes")
        return inputs

    def alone(self, state: Tensor, inputs: Sequence[Tensor], b: int, path: list[int]) -> Tensor:
        return grouped_delta_rule(state, *(x[b : b + 1, path].to(state.dtype) for x in inputs))

    @torch.no_grad()
    def keep(self, inputs: Sequence[Tensor], paths: Sequence[list[int]]) -> None:
        """What accepting these paths does to the other two states."""
        for state in self.states[1:]:
            for b, path in enumerate(paths):
                if path:
                    self.alone(state[b : b + 1], inputs, b, path)
        self.oracle.check(dense(self.account), *self.states[1:], "state")

    @torch.no_grad()
    def decode(self, tokens: int) -> None:
        inputs = draw_tokens(tokens, self.g)
        outs = [self.compiled(self.states[0], *inputs)]
        outs += [grouped_delta_rule(s, *(x.to(s.dtype) for x in inputs)) for s in self.states[1:]]
        self.oracle.check(*outs, "outputs")
        self.oracle.check(dense(self.account), *self.states[1:], "state")

    @property
    def account(self) -> Account:
        (account,) = by_hand.accounts_of(self.states[0])
        return account


needs_compiler = pytest.mark.skipif(build.compiler() is None, reason="no compiler")
ways = [
    ("aten", "eager"),
    pytest.param("cpp", "eager", marks=needs_compiler),
    pytest.param("cpp", "inductor", marks=[needs_compiler, pytest.mark.nightly]),
]
TREE = [(-1, 0, 0, 1, 2, -1), (-1, 0, 1, 2, 3, 4)]


@pytest.mark.parametrize(("target", "inner"), ways)
def test_trees_on_a_compiled_graph(target: str, inner: str) -> None:
    run = Drafts(target, inner)
    run.decode(3)
    for turn in range(9):
        count = int(torch.randint(2, 9, (), generator=run.g))
        parents = [
            [int(torch.randint(-1, j, (), generator=run.g)) if j else -1 for j in range(count)] for _ in range(2)
        ]
        inputs = run.draft(parents)
        paths = [path_to(p, int(torch.randint(-1, count, (), generator=run.g))) for p in parents]
        width = max(map(len, paths))
        padded = torch.tensor([p + [-1] * (width - len(p)) for p in paths])
        accept(run.states[0], paths if turn % 2 or not width else padded)
        run.keep(inputs, paths)
        if turn % 3 == 0:
            run.decode(1 + turn // 3)
    inputs = run.draft(TREE)
    accept({"cache": [run.states[0]]}, [0, 1])
    run.keep(inputs, [[0, 1]] * 2)
    rollback(run.states[0], 1)
    with pytest.raises(ValueError, match="no draft tree waits"):
        accept(run.states[0], [0])


INTERRUPTIONS = {
    "decode": lambda run: run.decode(1),
    "verify": lambda run: run.decode(3),
    "settle": lambda run: materialize(run.states[0]),
    "read": lambda run: run.states[0] + 0,
    "rollback": lambda run: rollback(run.states[0], 0),
}


@pytest.mark.parametrize("between", INTERRUPTIONS.values(), ids=INTERRUPTIONS)
def test_whatever_comes_between_rejects_the_tree(between) -> None:
    run = Drafts()
    run.decode(2)
    run.draft(TREE)
    between(run)
    with pytest.raises(ValueError, match="no draft tree waits"):
        accept(run.states[0], [0])
    run.oracle.check(run.states[0] + 0, *run.states[1:], "state")
    inputs = run.draft(TREE)
    with torch.no_grad():
        run.compiled(run.states[0], *draw_tokens(1, run.g))
    rollback(run.states[0], 1)
    run.oracle.check(run.states[0] + 0, *run.states[1:], "state")
    assert len(inputs) == 5


@pytest.mark.parametrize(
    "path", [[1], [0, 3], [0, -1, 1], [6], [-2], [[0]] * 3, [0, 1, 3, 4, 5, 5, 5], [0.5], [[0, 1], [2]]]
)
def test_what_is_no_path(path: list) -> None:
    run = Drafts()
    run.decode(2)
    inputs = run.draft(TREE)
    with pytest.raises(ValueError, match=r"accept\(obj, path\)"):
        accept(run.states[0], path)
    accept(run.states[0], [[5], []])
    run.keep(inputs, [[5], []])


@pytest.mark.parametrize("parents", [[0], [-1, 1], [-2], [], [[[-1]]], ["x"], [-1, 0.5]])
def test_what_is_no_tree(parents: list) -> None:
    with pytest.raises(ValueError, match=r"draft_tree\(parents\)"), draft_tree(parents):
        raise AssertionError


def test_graphs_that_take_no_tree() -> None:
    run = Drafts()
    run.decode(3)
    run.decode(1)
    inputs, one = draw_tokens(3, run.g), draw_tokens(1, run.g)
    with torch.no_grad():
        with pytest.raises(ValueError, match="2 parents for 3 tokens"), draft_tree([-1, 0]):
            run.compiled(run.states[0], *inputs)
        with pytest.raises(ValueError, match="of 3 sequences"), draft_tree([[-1, 0, 0]] * 3):
            run.compiled(run.states[0], *inputs)
        with pytest.raises(ValueError, match="one token"), draft_tree([-1]):
            run.compiled(run.states[0], *one)
        plain = Pair(flush=1)
        with pytest.raises(ValueError, match="without a buffer"), draft_tree([-1]):
            plain.compiled(plain.state, *draw_one())
    with pytest.raises(StateError, match="no compiled graph"), draft_tree([-1, 0]):
        pass
    with pytest.raises(ValueError, match="another draft tree"), draft_tree([-1]), draft_tree([-1]):
        pass
    run.decode(2)


def test_a_tree_that_fails_or_is_not_taken_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Drafts()
    run.decode(2)
    run.decode(3)
    inputs = draw_tokens(3, run.g)
    with monkeypatch.context() as patched, torch.no_grad():
        patched.setattr(drafts._Redirected, "__torch_dispatch__", lambda s, f, t, a=(), k=None: f(*a, **(k or {})))
        with pytest.raises(StateError, match="CUDA graph"), draft_tree([-1, 0, 0]):
            run.compiled(run.states[0], *inputs)
    run.oracle.check(dense(run.account), *run.states[1:], "state")

    def torn(*args: object) -> None:
        raise RuntimeError("torn")

    with monkeypatch.context() as patched, torch.no_grad():
        patched.setattr("kvbuffer_compile.steps.tree.tree_step", torn)
        with pytest.raises(RuntimeError, match="torn"), draft_tree([-1, 0, 0]):
            run.compiled(run.states[0], *inputs)
    run.oracle.check(dense(run.account), *run.states[1:], "state")
    run.decode(3)


def test_counts_and_paths_on_the_device_are_checked_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """The way without a host that waits, taken on a CPU, where a failed check is an error at once."""
    monkeypatch.setattr("kvbuffer_compile.accounts.rollback.on_device", lambda *_: True)
    monkeypatch.setattr(drafts, "on_device", lambda *_: True)
    run = Drafts()
    run.decode(3)
    inputs = run.draft(TREE)
    for path in ([[0, 3], [0, 1]], [[1], [0]], [[-1, 0], [0, 1]]):
        with pytest.raises(RuntimeError, match="no path of the draft tree"):
            accept(run.states[0], torch.tensor(path))
    accept(run.states[0], torch.tensor([[0, 1, 3], [0, -1, -1]]))
    run.keep(inputs, [[0, 1, 3], [0]])
    owed = run.account.cursor[0].tolist()
    for n in ([0, 99], [-1, 0]):
        with pytest.raises(RuntimeError, match="more tokens than can be taken back"):
            rollback(run.states[0], torch.tensor(n))
    assert run.account.cursor[0].tolist() == owed
    rollback(run.states[0], torch.tensor([2, 0]))
    assert run.account.cursor[0].tolist() == [owed[0] - 2, owed[1]]
