"""States of many sequences in one pool: a step takes some slots, updates them and puts them back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
from torch import Tensor

from kvbuffer_compile import explain, materialize, rollback
from kvbuffer_compile.backend import GraphRecord
from kvbuffer_compile.codegen import build
from kvbuffer_compile.errors import Declined
from kvbuffer_compile.runtime import by_hand
from tests.spelled.forms import operands, outer, read, rows
from tests.spelled.lifting import capture, capture_plain, lifted_and_right
from tests.support.daily import diagonal, row
from tests.support.fuse import blown, fuse
from tests.support.oracle import Oracle, check
from tests.support.steps import Sizes

L, SLOTS = 4, 7
SIZES = Sizes(3, 2, 4, 5)
FAST = {"inner": "eager", "target": "aten", "flush": L}
TARGETS = ["aten", *(["cpp"] if build.compiler() else [])]


# ------------------------------------------------------------------------------------------------ recurrences


def token(S: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    S = S * g.exp()[..., None, None]
    return S + outer(k, (v - read(S, k)) * beta[..., None])


def gdn(pool: Tensor, idx: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    S = token(pool[idx], k, v, g, beta)
    pool[idx] = S
    return read(S, q)


def gla(pool: Tensor, idx: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    S = pool.index_select(0, idx) * rows(g.exp()) + outer(k, v)
    pool.index_copy_(0, idx, S)
    return torch.einsum("bhkv,bhk->bhv", S, q)


def mamba2(pool: Tensor, idx: Tensor, C: Tensor, B: Tensor, x: Tensor, dt: Tensor, A: Tensor) -> Tensor:
    """Stored as [slots, H, P, N]; the decay is formed at full size."""
    S = pool[idx]
    decay = torch.exp(dt[..., None, None] * A[:, None, None].expand(S.shape[1:]))
    S = S * decay + (dt[..., None] * x)[..., None] * B[:, :, None]
    pool.index_put_((idx,), S)
    return (S @ C[..., None]).squeeze(-1)


def _ssd_inputs(s: Sizes, g: torch.Generator) -> tuple[Tensor, ...]:
    return (*operands("qkv")(s, g), torch.rand(s.B, s.H, generator=g), -torch.rand(s.H, generator=g))


def masked(pool: Tensor, idx: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """Padding entries are -1: they take slot 0, which is nobody's, and leave it as it is."""
    valid = idx >= 0
    slots = torch.where(valid, idx, 0)
    S = pool[slots]
    new = torch.where(valid[:, None, None, None], token(S, k, v, g, beta), S)
    pool[slots] = new
    return torch.where(valid[:, None, None], read(new, q), 0.0)


def several(pool: Tensor, idx: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """Three tokens at once."""
    S, out = pool[idx], []
    for t in range(3):
        S = token(S, k, v + t, g, beta)
        out.append(read(S, q * (t + 1)))
    pool[idx] = S
    return torch.stack(out)


def layers(pool: Tensor, idx: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """[layers, slots, H, K, V]"""
    for layer in range(2):
        S = token(pool[layer][idx], k, v, g, beta)
        pool[layer][idx] = S
        v = torch.tanh(read(S, q))
    return v


def heads(pool: Tensor, idx: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """Only head 0."""
    S = token(pool[idx, 0], k[:, 0], v[:, 0], g[:, 0], beta[:, 0])
    pool[idx, 0] = S
    return read(S, q[:, 0])


STEPS: dict[str, tuple[Callable[..., Tensor], Callable[..., Any], str, str]] = {
    "gdn": (gdn, operands("qkvgb"), "HKV", "DRUR"),
    "gla": (gla, operands("qkvG"), "HKV", "DUR"),
    "mamba2": (mamba2, _ssd_inputs, "HVK", "DUR"),
    "masked": (masked, operands("qkvgb"), "HKV", "RDUR"),
}


class Beside:
    """The same steps on a compiled, an eager and a float64 pool, each with slots drawn anew."""

    def __init__(self, name: str | Callable[..., Tensor] = "gdn", sizes: Sizes = SIZES, **options: Any) -> None:
        known = STEPS[name] if isinstance(name, str) else (name, operands("qkvgb"), "HKV", "")
        self.step, self.inputs, letters, self.signature = known
        self.compiled = torch.compile(self.step, backend="kvbuffer", fullgraph=True, options={**FAST, **options})
        self.g = torch.Generator().manual_seed(0)
        self.sizes = sizes
        self.pool = torch.randn(SLOTS, *(getattr(sizes, x) for x in letters), generator=self.g)
        if self.step is layers:
            self.pool = torch.stack([self.pool, -self.pool])
        self.eager, self.exact = self.pool.clone(), self.pool.double()
        self.oracle = Oracle()
        self.first = 1 if self.step is masked else 0

    def draw(self) -> Tensor:
        """Distinct slots in any order."""
        return self.first + torch.randperm(SLOTS - self.first, generator=self.g)[: self.sizes.B]

    def run(self, steps: int = 1, slots: Tensor | None = None) -> None:
        for _ in range(steps):
            idx, x = self.draw() if slots is None else slots, self.inputs(self.sizes, self.g)
            with torch.no_grad():
                out = self.compiled(self.pool, idx, *x)
                eager, exact = (
                    self.step(p, idx, *(y.to(p.dtype) for y in x)) for p in (self.eager, self.exact)
                )  # fmt: skip
            self.oracle.check(out, eager, exact, "output")

    def each(self, change: Callable[[Tensor], Any]) -> None:
        for pool in (self.pool, self.eager, self.exact):
            change(pool)

    def check(self, got: Tensor | None = None) -> None:
        self.oracle.check(self.pool + 0 if got is None else got, self.eager, self.exact, "pool")

    @property
    def owed(self) -> list[int]:
        (account,) = by_hand.accounts_of(self.pool)
        return account.cursor[0].tolist()  # type: ignore[no-any-return]


def rewritten(records: list[GraphRecord], variant: str = "buffered", count: int = 1) -> bool:
    plans = [[plan for _, plan in r.rewritten] for r in records]
    return bool(plans) and all(len(p) == count and all(x.variant == variant and x.slots for x in p) for p in plans)


@pytest.fixture
def pair(records: list[GraphRecord]) -> Beside:
    p = Beside()
    p.run(3 * L)
    assert rewritten(records) and max(p.owed) > 0
    return p


def test_the_report_is_of_the_whole_pool(pair: Beside) -> None:
    """Shape and memory of rows are those of all slots, of which a step takes some."""
    (account,) = by_hand.accounts_of(pair.pool)
    with torch.no_grad():
        report = explain(pair.step, pair.pool, pair.draw(), *pair.inputs(pair.sizes, pair.g), options=FAST)
    (state,) = report.states
    assert (state.status, state.shape) == ("buffered", tuple(pair.pool.shape)) and pair.sizes.B < SLOTS
    assert state.row_bytes == sum(t.untyped_storage().nbytes() for t in account.rows)


# --------------------------------------------------------------------------------------------------- running


# Compiled in every run are one program with a mask and one without.
RAGGED = [row((n, t), t == "aten" or n in ("gdn", "masked")) for n in STEPS for t in TARGETS]


@pytest.mark.parametrize(("name", "target"), RAGGED)
def test_pools_run_buffered_with_ragged_membership(name: str, target: str, records: list[GraphRecord]) -> None:
    p = Beside(name, target=target)
    for _ in range(4):
        p.run(20)  # a slot takes part in three steps of seven: more than eight flushes in all
        p.check()
    p.run(3)
    assert rewritten(records) and max(p.owed) > 0
    assert all(plan.program.signature == p.signature for r in records for _, plan in r.rewritten)
    assert all(r.name(r.rewritten[0][0].state) == "pool" for r in records)


@pytest.mark.parametrize(("name", "dtype", "flush"), diagonal(["gdn", "mamba2"], [torch.int64, torch.int32], [L, 1]))
def test_with_inductor_and_the_check_option(
    name: str, dtype: torch.dtype, flush: int, records: list[GraphRecord]
) -> None:
    p = Beside(name, inner="inductor", check=True, flush=flush)
    for _ in range(2 * L):
        p.run(1, p.draw().to(dtype))
    p.check()
    assert rewritten(records, "buffered" if flush > 1 else "recurrent")


@pytest.mark.parametrize("target", TARGETS)
def test_several_tokens_are_one_step(target: str, records: list[GraphRecord]) -> None:
    p = Beside(several, target=target)
    p.run(20)
    p.check()
    assert rewritten(records, "verify")


def test_a_pool_of_each_layer_in_one_tensor(records: list[GraphRecord]) -> None:
    p = Beside(layers)
    p.run(8 * L)
    p.check()
    assert rewritten(records, count=2)
    assert [r.name(r.rewritten[1][0].state) for r in records] == ["pool[1]"] * len(records)


def test_one_head_of_each_slot(records: list[GraphRecord]) -> None:
    p = Beside(heads)
    p.run(8 * L)
    p.check()
    assert rewritten(records)
    assert [r.name(r.rewritten[0][0].state) for r in records] == ["pool[:, 0]"] * len(records)


def test_a_batch_of_one_and_of_all(records: list[GraphRecord]) -> None:
    p = Beside()
    for batch in (1, SLOTS, 2, 5):
        p.sizes = Sizes(batch, SIZES.H, SIZES.K, SIZES.V)
        p.run(L + 2)
        p.check()
    assert rewritten(records)


def test_slots_left_out_owe_what_they_owed(records: list[GraphRecord]) -> None:
    p = Beside()
    p.run(2, torch.tensor([0, 1, 2]))
    p.run(3, torch.tensor([6, 4, 0]))
    assert p.owed == [1, 2, 2, 0, 3, 0, 3]
    p.run(1, torch.tensor([2, 5, 1]))
    assert p.owed == [1, 3, 3, 0, 3, 1, 3]
    p.check()


def test_the_pool_and_the_batch_share_rows(records: list[GraphRecord]) -> None:
    """A graph that steps the whole pool as a batch goes on with the rows that steps on slots left."""
    p = Beside(sizes=Sizes(SLOTS, SIZES.H, SIZES.K, SIZES.V))

    def batch(S: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
        S.copy_(token(S, k, v, g, beta))
        return read(S, q)

    compiled = torch.compile(batch, backend="kvbuffer", fullgraph=True, options=FAST)
    p.run(2)
    x = p.inputs(p.sizes, p.g)
    with torch.no_grad():
        compiled(p.pool, *x)
    batch(p.eager, *x), batch(p.exact, *(y.double() for y in x))
    assert p.owed == [3] * SLOTS
    p.run(2)
    p.check()


@pytest.mark.parametrize("width", [torch.bfloat16, torch.float16])
def test_pools_of_sixteen_bits(width: torch.dtype, records: list[GraphRecord]) -> None:
    def step(pool: Tensor, idx: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
        S = token(pool[idx].to(q.dtype), k, v, g, beta)
        pool[idx] = S.to(pool.dtype)
        return read(S, q)

    p = Beside(step)
    p.pool, p.eager = p.pool.to(width), p.eager.to(width)
    p.exact = p.pool.double()
    for _ in range(8 * L):
        idx, x = p.draw(), p.inputs(p.sizes, p.g)
        with torch.no_grad():
            p.compiled(p.pool, idx, *x)
            step(p.eager, idx, *x), step(p.exact, idx, *(y.double() for y in x))
    p.check()
    assert rewritten(records)


# --------------------------------------------------------------------------------------------------- indices


def test_negative_slots_count_from_the_end(records: list[GraphRecord]) -> None:
    p = Beside()
    for _ in range(2 * L):
        p.run(1, p.draw() - SLOTS)
        p.run(1, torch.tensor([-1, 0, 2]))
    p.check()
    assert rewritten(records)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("flush", [1, L])
def test_a_slot_beyond_the_pool_is_an_error_and_changes_nothing(
    flush: int, target: str, records: list[GraphRecord]
) -> None:
    p = Beside(flush=flush, target=target)
    p.run(3)
    for bad in ([0, SLOTS, 1], [0, 1, -SLOTS - 1]):
        with pytest.raises((IndexError, RuntimeError), match="out of range"), torch.no_grad():
            p.compiled(p.pool, torch.tensor(bad), *p.inputs(p.sizes, p.g))
        p.run(3)
    p.check()
    assert rewritten(records, "buffered" if flush > 1 else "recurrent")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("flush", [1, L])
def test_of_equal_slots_the_last_is_stored(flush: int, target: str, records: list[GraphRecord]) -> None:
    """As index_put does on one thread: every entry reads the same old state."""
    p = Beside(flush=flush, target=target)
    for _ in range(2 * L + 1):
        a, b = p.draw()[:2].tolist()
        p.run(1, torch.tensor([a, b, a]))
    p.check()
    assert rewritten(records, "buffered" if flush > 1 else "recurrent")


def test_padding_entries_share_a_slot_of_nobody(records: list[GraphRecord]) -> None:
    p = Beside("masked")
    for t in range(8 * L):
        idx = p.draw()
        idx[torch.randperm(3, generator=p.g)[: t % 3]] = -1
        p.run(1, idx)
    p.check()
    assert rewritten(records)


@pytest.mark.parametrize("flush", [row(1, False), row(L, True)])
def test_triton_kernels_step_slots(flush: int, records: list[GraphRecord]) -> None:
    """What a GPU runs, interpreted: other slots at every step, two entries with one slot, a read between."""
    with triton.knobs.runtime.scope():  # what is set of them inside would stay set
        triton.knobs.runtime.interpret = True  # and with it the environment
        p = Beside(flush=flush, target="triton")
        for t in range(L + 2):
            a, b, c = p.draw().tolist()
            p.run(1, torch.tensor([a, b, a if t % 3 == 1 else c]))
            if t == L:
                p.check()
        p.check()
    assert rewritten(records, "buffered" if flush > 1 else "recurrent")
    assert {plan.target for record in records for _, plan in record.rewritten} == {"triton"}


# ------------------------------------------------------------------------------------ never stale, never lost

READERS: dict[str, Callable[[Tensor], Tensor]] = {
    "add": lambda s: s + 0,
    "one slot": lambda s: torch.stack([s[i] + 0 for i in range(SLOTS)]),
    "gather": lambda s: s[torch.arange(SLOTS)],
    "index_select": lambda s: s.index_select(0, torch.arange(SLOTS)),
    "numpy": lambda s: torch.from_numpy(s.numpy().copy()),
}


def test_a_read_from_outside_sees_the_true_value(pair: Beside) -> None:
    for _ in range(L + 1):
        for reader in READERS.values():
            pair.run()
            assert max(pair.owed) > 0
            pair.check(reader(pair.pool))


WRITERS: dict[str, Callable[[Tensor], Any]] = {
    "zero_": lambda s: s.zero_(),
    "a slot is freed": lambda s: s[2].zero_(),
    "a slot is copied": lambda s: s[3].copy_(s[5] + 0),
    "slots are freed": lambda s: s.index_fill_(0, torch.tensor([1, 6]), 0),
}


def test_a_write_from_outside_is_honoured(pair: Beside) -> None:
    for _ in range(3):
        for writer in WRITERS.values():
            pair.each(writer)
            pair.run(L)
            pair.check()
            pair.run()


def test_rolling_back_slot_by_slot(records: list[GraphRecord]) -> None:
    p = Beside(flush=16)
    p.run(2, torch.tensor([0, 1, 2]))
    kept = p.eager.clone(), p.exact.clone()
    p.run(3, torch.tensor([1, 4, 2]))
    rollback(p.pool, [0, 3, 0, 0, 3, 0, 0])
    for now, old in zip((p.eager, p.exact), kept, strict=True):
        now[[1, 4]] = old[[1, 4]]
    assert p.owed == [2, 2, 5, 0, 0, 0, 0]
    p.run(1, torch.tensor([4, 2, 1]))
    with pytest.raises(ValueError, match="can be taken back"):
        rollback(p.pool, 1)  # of every slot
    materialize(p.pool)
    assert p.owed == [0] * SLOTS
    p.check()


def test_a_step_that_fails_is_taken_back(records: list[GraphRecord]) -> None:
    """Two pools; the graph fails after the first has stepped, with other slots than in the step before."""

    def two(pool: Tensor, idx: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
        first, second = pool
        out = fuse(gdn(first, idx, q, k, v, g, beta))
        return gdn(second, idx, q, k, out, g, beta)

    p = Beside(two)
    p.pool = torch.stack([p.pool, -p.pool])
    p.eager, p.exact = p.pool.clone(), p.pool.double()
    for t in range(3 * L):
        if t > 1 and t % 3 == 0:
            with blown(), torch.no_grad():
                p.compiled(p.pool, p.draw(), *p.inputs(p.sizes, p.g))
        p.run()
    p.check()
    assert rewritten(records, count=2)


# --------------------------------------------------------------------------------------- what stays as it was


def both_kinds(pool: Tensor, idx: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """Only the first of two pools is a recurrence."""
    first, second = pool
    out = gdn(first, idx, q, k, v, g, beta)
    S = torch.tanh(token(second[idx], k, out, g, beta))
    second[idx] = S
    return out + read(S, q)


def test_a_pool_that_is_no_recurrence_is_gathered_as_before(records: list[GraphRecord]) -> None:
    p = Beside(both_kinds, inner="inductor")
    p.pool = torch.stack([p.pool, -p.pool])
    p.eager, p.exact = p.pool.clone(), p.pool.double()
    p.run(2 * L + 1)
    p.check()
    assert rewritten(records)
    assert {x.why.rule for r in records for x in r.refused if not x.kept} == {"nonlinear"}


@pytest.mark.parametrize("target", ["auto", "aten"])
def test_small_states_gain_nothing(target: str, records: list[GraphRecord]) -> None:
    p = Beside(flush="auto", target=target)
    p.run(3)
    p.check()
    reasons = [plan for r in records for _, plan in r.states]
    assert reasons and all(isinstance(why, Declined) and why.rule == "no-gain" for why in reasons)


def other_index(pool: Tensor, idx: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    S = token(pool[idx], k, v, g, beta)
    pool[idx.flip(0)] = S
    return read(S, q)


def written_twice(pool: Tensor, idx: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    gdn(pool, idx, q, k, v, g, beta)
    return gdn(pool, idx, q, k, v, g, beta)


def read_again(pool: Tensor, idx: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    gdn(pool, idx, q, k, v, g, beta)
    return read(pool[idx], q)


def index_of_the_state(pool: Tensor, idx: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    idx = pool.sum((-1, -2, -3)).argsort()[: idx.shape[0]]
    return gdn(pool, idx, q, k, v, g, beta)


def neighbour(pool: Tensor, idx: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    return gdn(pool, idx, q, k, v, g, beta) + read(pool[(idx + 1) % pool.shape[0]], q)


def added(pool: Tensor, idx: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    S = pool[idx]
    pool.index_put_((idx,), outer(k, v) - S / 2, accumulate=True)
    return read(S, q)


def chosen(pool: Tensor, idx: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """Stored to other slots than were read, by a draw."""
    S = token(pool[torch.randint_like(idx, 7)], k, v, g, beta)
    pool[torch.randint_like(idx, 7)] = S
    return read(S, q) * 0


NEAR = (other_index, written_twice, read_again, index_of_the_state, neighbour, added, chosen)


@pytest.mark.parametrize("step", NEAR, ids=lambda step: step.__name__)
@pytest.mark.parametrize("how", [capture, lambda *args: [capture_plain(*args)]], ids=["inductor", "plain"])
def test_near_misses_are_declined(step: Callable[..., Tensor], how: Callable[..., Any]) -> None:
    g = torch.Generator().manual_seed(0)
    pool = torch.randn(SLOTS, SIZES.H, SIZES.K, SIZES.V, generator=g)
    (gm,) = how(step, pool, torch.tensor([3, 1, 5]), *operands("qkvgb")(SIZES, g))
    from kvbuffer_compile.passes.lift.lift import lift

    graph = lift(gm)
    assert not graph.found and not graph.pools
    assert [r.why.rule for r in graph.refused if not r.kept and r.state.meta["val"].dim() == 4] == ["partial"]


@pytest.mark.parametrize("step", NEAR[:-1], ids=lambda step: step.__name__)
def test_near_misses_run_as_they_are(step: Callable[..., Tensor], records: list[GraphRecord]) -> None:
    p = Beside(step)
    p.run(6)
    p.check()
    assert records and not any(r.rewritten for r in records)


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("how", [capture, lambda *args: [capture_plain(*args)]], ids=["inductor", "plain"])
def test_pools_lift_in_any_graph(name: str, how: Callable[..., Any]) -> None:
    p = Beside(name)
    (gm,) = how(p.step, p.pool, p.draw(), *p.inputs(p.sizes, p.g))
    graph = lifted_and_right(gm)
    assert [one.program.signature for one in graph.found] == [p.signature]
    assert all(one.slots is pool.slots for one, pool in zip(graph.found, graph.pools, strict=True))


# ---------------------------------------------------------------------------------------------------- returned


def put(pool: Tensor, idx: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    S = token(pool[idx], k, v, g, beta)
    return read(S, q), pool.index_put((idx,), S)


def copied(
    pool: Tensor, idx: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor
) -> tuple[Tensor, Tensor]:
    pool = pool.clone()
    return gdn(pool, idx, q, k, v, g, beta), pool


@pytest.mark.parametrize("step", [put, copied])
@pytest.mark.parametrize("donate", [True, False])
def test_a_pool_that_is_returned(step: Callable[..., Any], donate: bool, records: list[GraphRecord]) -> None:
    """Buffered when it is donated, and then the very tensor that was passed in."""
    g = torch.Generator().manual_seed(0)
    compiled = torch.compile(step, backend="kvbuffer", fullgraph=True, options={**FAST, "donate": donate})
    first = torch.randn(SLOTS, SIZES.H, SIZES.K, SIZES.V, generator=g)
    pool, eager, exact = first.clone(), first.clone(), first.double()
    with torch.no_grad(), Oracle() as oracle:
        for _ in range(10 * L):
            idx = torch.randperm(SLOTS, generator=g)[: SIZES.B]
            x = operands("qkvgb")(SIZES, g)
            before = pool
            out, pool = compiled(pool, idx, *x)
            want, eager = step(eager, idx, *x)
            true, exact = step(exact, idx, *(y.double() for y in x))
            oracle.add(out, want, true, "output")
            assert (pool is before) == donate
    check(pool + 0, eager, exact, "pool")
    assert records and all(len(r.rewritten) == donate for r in records)
