"""One tensor that holds the states of several layers, each a constant slice of it and a state of its own."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kvbuffer_compile import materialize, rollback
from kvbuffer_compile.accounts.ledger import LEDGER
from kvbuffer_compile.backend import GraphRecord
from kvbuffer_compile.guard.overlap import overlap
from kvbuffer_compile.runtime import by_hand
from tests.spelled.forms import operands, outer, read
from tests.spelled.lifting import capture, lifted_and_right
from tests.support.fuse import blown, fuse
from tests.support.oracle import Oracle, check
from tests.support.steps import DISTINCT, Sizes

L = 4
FAST = {"inner": "eager", "target": "aten", "flush": L}
LAYERS = 3


def token(S: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    S = S * g.exp()[..., None, None]
    return S + outer(k, (v - read(S, k)) * beta[..., None])


def layers_first(states: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """[L, B, H, K, V]; every layer's output is the next one's value."""
    for layer in range(states.shape[0]):
        states[layer] = token(states[layer], k, v, g, beta)
        v = torch.tanh(read(states[layer], q))
    return v


def layers_inside(states: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """[B, L, H, K, V], written in place."""
    for layer in range(states.shape[1]):
        S = states[:, layer]
        S.mul_(g.exp()[..., None, None])
        S.add_(outer(k, (v - read(S, k)) * beta[..., None]))
        v = torch.tanh(read(S, q))
    return v


def copied(states: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    for layer in range(-LAYERS, 0):
        new = token(states[layer], k, v, g, beta)
        states[layer].copy_(new)
        v = torch.tanh(read(new, q))
    return v


def unbound(states: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    for S in states.unbind(1):
        S.copy_(token(S, k, v, g, beta))
        v = torch.tanh(read(S, q))
    return v


def restacked(dim: int) -> Callable[..., Tensor]:
    """New states are stacked and copied as one."""

    def step(states: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
        new = []
        for S in states.unbind(dim):
            new.append(token(S, k, v, g, beta))
            v = torch.tanh(read(new[-1], q))
        states.copy_(torch.stack(new, dim))
        return v

    return step


def two_tokens(states: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """Every layer is written twice."""
    for layer in range(LAYERS):
        states[layer] = token(states[layer], k, v, g, beta)
        v = torch.tanh(read(states[layer], q))
        states[layer] = token(states[layer], q / 4, v, g, beta)
        v = torch.tanh(read(states[layer], k))
    return v


def uneven(states: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """The same, but the whole stack is used at the end."""
    return layers_first(states, q, k, v, g, beta) + states.sum(0).mean(-2)


def one_is_a_cache(states: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """The last slice is overwritten as a whole, the one before only read."""
    states[0] = token(states[0], k, v, g, beta)
    out = torch.tanh(read(states[0], q)) + read(states[2], q)
    states[2] = torch.tanh(outer(k, out)) + states[1]
    return out


def only_caches(states: Tensor, S: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    states[0] = outer(q, v)
    S.copy_(token(S, k, v, g, beta))
    return read(S, q) + read(states[1], q)


STACKS: dict[str, tuple[Callable[..., Tensor], int]] = {
    "first": (layers_first, 0),
    "inside": (layers_inside, 1),
    "copied": (copied, 0),
    "unbound": (unbound, 1),
    "restacked": (restacked(0), 0),
    "restacked inside": (restacked(1), 1),
    "two tokens": (two_tokens, 0),
}


def start(dim: int, g: torch.Generator, s: Sizes = DISTINCT) -> Tensor:
    sizes = [s.B, s.H, s.K, s.V]
    sizes.insert(dim, LAYERS)
    return torch.randn(sizes, generator=g)


class Beside:
    """The same steps on a compiled, an eager and a float64 stack."""

    def __init__(self, step: Callable[..., Tensor] = layers_first, dim: int = 0, **options: Any) -> None:
        self.step = step
        self.compiled = torch.compile(step, backend="kvbuffer", fullgraph=True, options={**FAST, **options})
        self.g = torch.Generator().manual_seed(0)
        self.oracle = Oracle()
        self.begin(dim)

    def begin(self, dim: int = 0, sizes: Sizes = DISTINCT) -> None:
        self.sizes = sizes
        self.states = start(dim, self.g, sizes)
        self.eager, self.exact = self.states.clone(), self.states.double()

    def run(self, steps: int = 1) -> None:
        for _ in range(steps):
            x = operands("qkvgb")(self.sizes, self.g)
            with torch.no_grad():
                out = self.compiled(self.states, *x)
                want, true = self.step(self.eager, *x), self.step(self.exact, *(y.double() for y in x))
            self.oracle.check(out, want, true, "output")

    def each(self, change: Callable[[Tensor], Any]) -> None:
        for states in (self.states, self.eager, self.exact):
            change(states)

    def check(self, got: Tensor | None = None) -> None:
        self.oracle.check(self.states + 0 if got is None else got, self.eager, self.exact, "states")

    @property
    def owed(self) -> list[int]:
        return [int(a.cursor[0].max()) for a in by_hand.accounts_of(self.states)]


@pytest.fixture
def pair(records: list[GraphRecord]) -> Beside:
    p = Beside()
    p.run(L + 1)  # past a flush of each layer, with rows owed again by two
    assert records and all(len(r.rewritten) == LAYERS for r in records)
    assert sum(owed > 0 for owed in p.owed) == LAYERS
    return p


# --------------------------------------------------------------------------------------------------- lifting


@pytest.mark.parametrize("name", STACKS)
def test_each_slice_is_lifted(name: str) -> None:
    step, dim = STACKS[name]
    g = torch.Generator().manual_seed(0)
    (gm,) = capture(step, start(dim, g), *operands("qkvgb")(DISTINCT, g))
    graph = lifted_and_right(gm)
    assert [one.program.signature for one in graph.found] == ["DRUR" * (2 if name == "two tokens" else 1)] * LAYERS
    assert [part.place for part in graph.parts] == [((dim, i),) for i in range(LAYERS)]
    assert [part.named("x") for part in graph.parts][1] == ("x[1]" if dim == 0 else "x[:, 1]")


def test_a_stack_that_is_used_whole_is_no_stack() -> None:
    g = torch.Generator().manual_seed(0)
    (gm,) = capture(uneven, start(0, g), *operands("qkvgb")(DISTINCT, g))
    graph = lifted_and_right(gm)
    assert not graph.found and not graph.parts
    assert [r.why.rule for r in graph.refused if not r.kept] == ["partial"]


# --------------------------------------------------------------------------------------------------- running


@pytest.mark.parametrize("name", STACKS)
def test_stacks_run_buffered(name: str, records: list[GraphRecord]) -> None:
    p = Beside(*STACKS[name])
    p.run(8 * L + 3)
    assert max(p.owed) > 0
    p.check()
    assert records
    for r in records:
        assert len(r.rewritten) == LAYERS and {plan.variant for _, plan in r.rewritten} == {"buffered"}
        assert r.name(r.rewritten[0][0].state) == ("states[0]" if STACKS[name][1] == 0 else "states[:, 0]")


@pytest.mark.parametrize("flush", [1, L])
def test_with_inductor_and_the_check_option(flush: int, records: list[GraphRecord]) -> None:
    p = Beside(layers_inside, 1, inner="inductor", flush=flush, check=True)
    p.run(2 * L + 1)
    p.check()
    assert records and all(len(r.rewritten) == LAYERS for r in records)


def test_slices_that_are_no_states_are_read_and_written_where_they_lie(records: list[GraphRecord]) -> None:
    p = Beside(one_is_a_cache, inner="inductor")
    p.run(2 * L + 1)
    p.check()
    assert records and all(len(r.rewritten) == 1 for r in records)
    first_and_last = torch.compile(layers_first, backend="kvbuffer", fullgraph=True, options=FAST)
    x = operands("qkvgb")(DISTINCT, p.g)
    with torch.no_grad():
        first_and_last(p.states, *x)  # now all slices owe rows
        p.step, _ = layers_first, p.step
        p.step(p.eager, *x), p.step(p.exact, *(y.double() for y in x))
    p.step = one_is_a_cache
    p.run(3)
    p.check()


def test_a_stack_without_states_stays_whole(records: list[GraphRecord]) -> None:
    g = torch.Generator().manual_seed(0)
    states, S = start(0, g), start(0, g)[0]
    same = states.clone(), S.clone()
    compiled = torch.compile(only_caches, backend="kvbuffer", fullgraph=True, options=FAST)
    with torch.no_grad():
        for _ in range(L + 1):
            x = operands("qkvgb")(DISTINCT, g)
            torch.testing.assert_close(compiled(states, S, *x), only_caches(*same, *x))
    torch.testing.assert_close(states, same[0])
    assert records and all([r.name(one.state) for one, _ in r.rewritten] == ["S"] for r in records)


def test_slices_of_one_stack_do_not_settle_each_other() -> None:
    p = Beside(layers_inside, 1, flush=8)
    p.run(2)
    assert p.owed == [2, 2, 2]


# ------------------------------------------------------------------------------------ never stale, never lost

READERS: dict[str, Callable[[Tensor], Tensor]] = {
    "add": lambda s: s + 0,
    "one slice": lambda s: torch.stack([s[0] + 0, s[1].clone(), s[2].detach()]),
    "across slices": lambda s: s.transpose(0, 1).contiguous().transpose(0, 1),
    "numpy": lambda s: torch.from_numpy(s.numpy().copy()),
    "deepcopy": lambda s: s.__deepcopy__({}),
    "iterate": lambda s: torch.stack(list(s)),
}


def test_a_read_sees_every_slice_materialised(pair: Beside) -> None:
    for _ in range(L + 1):  # at every fill level
        for name, reader in READERS.items():
            pair.run()
            assert max(pair.owed) > 0, name
            pair.check(reader(pair.states))


def test_memory_that_was_handed_out_is_never_stale(pair: Beside) -> None:
    """The storage of one slice is that of all."""
    storage = pair.states[0].untyped_storage()
    for _ in range(L):
        pair.check(torch.tensor(list(storage), dtype=torch.uint8).view(torch.float32).view(pair.states.shape))
        pair.run()


WRITERS: dict[str, Callable[[Tensor], Any]] = {
    "zero_": lambda s: s.zero_(),
    "one slice": lambda s: s[1].zero_(),
    "a sequence of all": lambda s: s[:, 1].mul_(0.5),
    "copy_": lambda s: s.copy_(torch.ones(s.shape, dtype=s.dtype) * 0.25),
    "setitem": lambda s: s.__setitem__(2, 0.125),
    "numpy": lambda s: s.numpy().__setitem__(0, 0),
}


def test_a_write_from_outside_is_honoured(pair: Beside) -> None:
    for _ in range(2):
        for name, writer in WRITERS.items():
            assert max(pair.owed) > 0, name
            pair.each(writer)
            pair.run(L + 1)
            pair.check()
            pair.run()


def test_overwriting_the_stack_drops_the_rows_of_all_slices(pair: Beside) -> None:
    for account in by_hand.accounts_of(pair.states):
        account.rows[0].fill_(float("nan"))  # folding them in would show
    pair.states.zero_()
    assert bool((pair.states == 0).all())


def test_a_slice_held_across_steps_stays_true(pair: Beside) -> None:
    slice_of = pair.states[1]
    pair.run(2)
    check(slice_of + 0, pair.eager[1], pair.exact[1])


def test_a_slice_made_before_the_first_step_is_never_stale(records: list[GraphRecord]) -> None:
    p = Beside()
    slice_of = p.states[1]
    for _ in range(2 * L):
        p.run()
        p.oracle.check(slice_of.clone(), p.eager[1], p.exact[1], "slice")
    assert records and all(len(r.rewritten) == LAYERS for r in records)


def test_eager_steps_and_other_graphs_alternate_with_compiled_ones(pair: Beside) -> None:
    norm = torch.compile(lambda s: s.square().sum((-1, -2)), backend="kvbuffer")
    one = torch.compile(lambda s: s[1].square().sum((-1, -2)), backend="aot_eager")
    for _ in range(3):
        x = operands("qkvgb")(DISTINCT, pair.g)
        pair.each(lambda s, x=x: layers_first(s, *(y.to(s.dtype) for y in x)))
        pair.run(2)
        with torch.no_grad():
            norms = [x.square().sum((-1, -2)) for x in (pair.eager, pair.exact)]
            pair.oracle.check(norm(pair.states), *norms, "norms")
            pair.run()
            norms = [x[1].square().sum((-1, -2)) for x in (pair.eager, pair.exact)]
            pair.oracle.check(one(pair.states), *norms, "norms of one")
    pair.check()


def test_rows_go_with_the_stack(records: list[GraphRecord]) -> None:
    before = len(LEDGER.accounts)
    p = Beside()
    p.run(2)
    assert len(LEDGER.accounts) == before + LAYERS
    slice_of = p.states[1]
    p.run()
    p.states = torch.zeros(0)
    gc.collect()
    check(slice_of + 0, p.eager[1], p.exact[1])
    del slice_of
    gc.collect()
    assert len(LEDGER.accounts) == before


def test_a_dead_stack_is_not_folded_in(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvbuffer_compile.steps import composite

    p = Beside()
    p.run(2)
    flushed: list[int] = []
    monkeypatch.setattr(composite, "flush", lambda *_: flushed.append(1))
    p.states = torch.zeros(0)
    gc.collect()
    assert not flushed


def test_batches_of_any_size_share_a_graph(records: list[GraphRecord]) -> None:
    p = Beside()
    for batch in (2, 7, 5):
        p.begin(0, Sizes(batch, DISTINCT.H, DISTINCT.K, DISTINCT.V))
        p.run(2 * L + 1)
        p.check()
    assert len(records) <= 4, "plain and guarded, of one batch and of any"
    assert all(len(r.rewritten) == LAYERS for r in records)


def test_a_step_that_fails_is_taken_back(records: list[GraphRecord]) -> None:
    """The graph fails after the first slice has stepped; trying again must not apply its token twice."""

    def step(states: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
        states[0] = token(states[0], k, v, g, beta)
        out = fuse(torch.tanh(read(states[0], q)))
        states[1] = token(states[1], k, out, g, beta)
        return read(states[1], q)

    p = Beside(step)
    for t in range(2 * L):
        if t > 1 and t % 3 == 0:
            with blown():
                p.compiled(p.states, *operands("qkvgb")(DISTINCT, p.g))
        p.run()
    p.check()
    assert records and all(len(r.rewritten) == 2 for r in records)


def test_rolling_back_and_materialising_reach_all_slices() -> None:
    p = Beside(flush=24)
    p.run(2)
    kept = p.eager.clone(), p.exact.clone()
    p.run(3)
    rollback(p.states, 3)
    p.eager, p.exact = kept
    p.run(1)
    assert min(p.owed) > 0
    materialize({"cache": [p.states]})
    assert p.owed == [0] * LAYERS
    p.check()


# ---------------------------------------------------------------------------------------------------- overlap


def test_overlap_is_told_from_strides() -> None:
    """Against the addresses themselves, for random pairs of slices of one tensor."""
    base = torch.arange(3 * 4 * 5 * 6)
    generator = torch.Generator().manual_seed(0)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    def slice_of(t: Tensor) -> Tensor:
        for dim in reversed(range(t.dim())):
            kind, at = number(0, 4), number(0, t.shape[dim])
            if kind == 0:
                t = t.select(dim, at)
            elif kind == 1:
                t = t.narrow(dim, at, number(1, t.shape[dim] - at + 1))
        return t

    met = 0
    for _ in range(2000):
        a, b = (slice_of(base.view(3, 4, 5, 6)) for _ in range(2))
        really = not set(a.flatten().tolist()).isdisjoint(b.flatten().tolist())
        assert overlap(a, b) == really, (a.shape, a.stride(), a.storage_offset(), b.shape, b.stride())
        met += really
    assert 200 < met < 1800
    assert overlap(base, base.view(torch.int32)) and not overlap(base[:0], base)


# ------------------------------------------------------------------------------------ slices of length 1, of slices


def short_slices(states: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """states[i : i + 1], read and written with its dim of size 1."""
    for i in range(LAYERS):
        S = states[i : i + 1] * g.exp()[..., None, None]
        states[i : i + 1] = S + outer(k, (v - read(S, k)[0]) * beta[..., None])
        v = torch.tanh(read(states[i], q))
    return v


def split(states: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    new = []
    for S in torch.split(states, 1):
        new.append(token(S[0], k, v, g, beta)[None])
        v = torch.tanh(read(new[-1][0], q))
    states.copy_(torch.cat(new))
    return v


def nested(states: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """Each sequence by itself."""
    outs = []
    for b in range(states.shape[1]):
        y = v[b]
        for i in range(LAYERS):
            states[i][b] = token(states[i][b], k[b], y, g[b], beta[b])
            y = torch.tanh(read(states[i][b], q[b]))
        outs.append(y)
    return torch.stack(outs)


def exchanged(states: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """Two slices change places."""
    first = states[0].clone()
    states[0] = states[1]
    states[1] = first
    states[2] = token(states[2], k, v, g, beta)
    return read(states[2], q) + read(states[0], k)


@pytest.mark.parametrize(("step", "states"), [(short_slices, LAYERS), (split, LAYERS), (nested, 2 * LAYERS)])
def test_slices_of_other_shapes_run_buffered(
    step: Callable[..., Tensor], states: int, records: list[GraphRecord]
) -> None:
    p = Beside(step, check=True)
    p.run(8 * L + 3)
    assert sum(owed > 0 for owed in p.owed) > 1
    p.check()
    assert records and all(len(r.rewritten) == states for r in records)
    if step is nested:
        assert records[0].name(records[0].rewritten[1][0].state) in ("states[0][1]", "states[1][0]")


def test_slices_that_change_places() -> None:
    p = Beside(exchanged)
    p.run(2 * L + 1)
    p.check()


# --------------------------------------------------------------------------------------------------- returned


def new_stack(states: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    new = []
    for i in range(LAYERS):
        new.append(token(states[i], k, v, g, beta))
        v = torch.tanh(read(new[-1], q))
    return v, torch.stack(new)


def changed_copy(states: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    states = states.clone()
    return layers_first(states, q, k, v, g, beta), states


def two_stacks(
    a: Tensor, b: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Returned in another order."""
    x, new_a = new_stack(a, q, k, v, g, beta)
    y, new_b = new_stack(b, k, q, v, g, beta)
    return x + y, new_b, new_a


def returned_whole(states: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """The stack is used besides."""
    v, new = new_stack(states, q, k, v, g, beta)
    return v + new.abs().mean(), new


def stepped(step: Callable[..., Any], order: tuple[int, ...], **options: Any) -> None:
    """Steps that hand their stacks on, by the oracle. order: which output each input becomes."""
    g = torch.Generator().manual_seed(0)
    compiled = torch.compile(step, backend="kvbuffer", fullgraph=True, options={**FAST, **options})
    first = [start(0, g) for _ in order]
    states = [first, [s.clone() for s in first], [s.double() for s in first]]
    with torch.no_grad(), Oracle() as oracle:
        for _ in range(8 * L + 3):
            x = operands("qkvgb")(DISTINCT, g)
            wide = [y.double() for y in x]
            outs = [
                call(*s, *given) for call, s, given in zip((compiled, step, step), states, (x, x, wide), strict=True)
            ]
            oracle.add(*(out[0] for out in outs), "output")
            states = [[out[i] for i in order] for out in outs]
    for i in range(len(order)):
        check(states[0][i] + 0, states[1][i], states[2][i], "states")


@pytest.mark.parametrize(
    ("step", "order", "checked"), [(new_stack, (1,), True), (changed_copy, (1,), False), (two_stacks, (2, 1), False)]
)
def test_returned_stacks_that_are_donated(
    step: Callable[..., Any], order: tuple[int, ...], checked: bool, records: list[GraphRecord]
) -> None:
    stepped(step, order, donate=True, check=checked)
    assert records and all(len(r.rewritten) == LAYERS * len(order) for r in records)


@pytest.mark.parametrize(("step", "donate"), [(new_stack, False), (returned_whole, True)])
def test_returned_stacks_that_stay(step: Callable[..., Any], donate: bool, records: list[GraphRecord]) -> None:
    stepped(step, (1,), donate=donate)
    assert records and not any(r.rewritten for r in records)
