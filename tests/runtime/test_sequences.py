"""Single slots of a pool, read and overwritten while the others go on owing rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kvbuffer_compile import read_slots, stats, write_slots
from kvbuffer_compile.runtime import by_hand
from tests.lift.test_pools import FAST, SLOTS, TARGETS, Beside


class Slots(Beside):
    """A compiled pool, and an eager one, with which the same is done."""

    def take(self, slots: Any) -> None:
        want = self.eager[torch.as_tensor(slots).flatten()]
        torch.testing.assert_close(read_slots(self.pool, slots), want, rtol=1e-4, atol=1e-5)

    def put(self, slots: list[int], states: torch.Tensor) -> None:
        write_slots(self.pool, slots, states)
        for pool in (self.eager, self.exact):
            pool[slots] = states.to(pool.dtype)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ["gdn", "gla", "mamba2", "masked"])
def test_others_owe_what_they_owed(name: str, target: str) -> None:
    pools = Slots(name, target=target)
    pools.run(3, slots=torch.tensor([1, 2, 4]))
    assert pools.owed[1] == pools.owed[2] == pools.owed[4] > 0
    before = pools.owed
    pools.take([4, 0])
    assert pools.owed == [n if slot != 4 else 0 for slot, n in enumerate(before)]
    pools.put([2, 5], torch.randn(2, *pools.pool.shape[1:]))
    assert pools.owed[1] == before[1] and pools.owed[2] == 0
    pools.put([6], torch.randn(pools.pool.shape[1:]).double())
    pools.run(9)
    pools.take(-1)
    pools.take(range(SLOTS))
    pools.run(2)
    pools.check()


def test_what_was_there_does_not_matter() -> None:
    """NaN in a slot that nobody has, with rows that are owed, is gone with the next owner."""
    pools = Slots()
    pools.run(2, slots=torch.tensor([1, 2, 3]))
    pools.each(lambda pool: pool[2].fill_(float("nan")))
    slots, inputs = torch.tensor([1, 2, 3]), pools.inputs(pools.sizes, pools.g)
    with torch.no_grad():
        assert pools.compiled(pools.pool, slots, *inputs)[1].isnan().all()
        for pool in (pools.eager, pools.exact):
            pools.step(pool, slots, *(x.to(pool.dtype) for x in inputs))
    assert pools.owed[2] == 1
    pools.put([2], torch.ones(pools.pool.shape[1:]))
    pools.run(6)
    pools.check()


def test_copies_from_one_slot_to_another() -> None:
    """A snapshot is a copy, from the pool itself too."""
    pools = Slots()
    pools.run(3)
    kept = read_slots(pools.pool, 3)
    write_slots(pools.pool, [0, 5], pools.pool[[3, 1]])
    for pool in (pools.eager, pools.exact):
        pool[[0, 5]] = pool[[3, 1]].clone()
    pools.run(5)
    pools.check()
    write_slots(pools.pool, 3, kept)
    torch.testing.assert_close(read_slots(pools.pool, 3), kept)


def test_pools_that_nobody_has_stepped() -> None:
    pool = torch.randn(4, 2)
    kept = pool.clone()
    assert torch.equal(read_slots(pool, [2, 0]), kept[[2, 0]])
    write_slots(pool, torch.tensor([1]), torch.zeros(1, 2))
    assert torch.equal(pool, kept.index_fill(0, torch.tensor([1]), 0))
    with torch.inference_mode():
        assert torch.equal(read_slots(pool, 1), torch.zeros(1, 2))


def test_a_stack_of_layers_is_settled_as_a_whole() -> None:
    from tests.lift.test_pools import layers

    pools = Slots(layers)
    pools.run(2)
    torch.testing.assert_close(read_slots(pools.pool, 1), pools.eager[[1]], rtol=1e-4, atol=1e-5)
    write_slots(pools.pool, 1, pools.eager[1])
    pools.run(3)
    pools.check()


@pytest.mark.parametrize(
    ("slots", "states", "message"),
    [
        ([7], torch.ones(1, 2, 4, 5), "slot 7 is not allowed: there are 7 slots"),
        ([1, 8 - 14], torch.ones(2, 2, 4, 5), "names a slot twice"),
        ([1, 2], torch.ones(3, 2, 4, 5), r"states has shape \(3, 2, 4, 5\), it must be \(2, 2, 4, 5\)"),
        ([0.5], torch.ones(1, 2, 4, 5), "must be an integer"),
    ],
)
def test_what_is_not_allowed(slots: Any, states: torch.Tensor, message: str) -> None:
    pools = Slots()
    pools.run(2)
    before = pools.owed
    with pytest.raises(ValueError, match=message):
        write_slots(pools.pool, slots, states)
    with pytest.raises(ValueError, match="no dims"):
        read_slots(torch.tensor(1.0), 0)
    assert pools.owed == before
    pools.check()


def test_an_account_is_kept() -> None:
    pools = Slots(**{k: v for k, v in FAST.items() if k != "flush"}, flush=6)
    pools.run(1)
    (account,) = by_hand.accounts_of(pools.pool)
    pools.put([1], torch.zeros(1, *pools.pool.shape[1:]))
    pools.run(2)
    assert by_hand.accounts_of(pools.pool) == [account]
    pools.check()


def test_a_pool_that_was_made_zero() -> None:
    """Its memory is not read before there is a base, but what is written has one."""
    pools = Slots()
    pools.run(3)
    pools.each(lambda pool: pool.zero_())
    pools.put([2], torch.randn(1, *pools.pool.shape[1:]))
    assert read_slots(pools.pool, []).shape[0] == 0
    pools.take([2, 1])
    pools.run(6, slots=torch.tensor([2, 1, 4]))
    pools.check()


@pytest.mark.parametrize("target", TARGETS)
def test_one_sequence_alone_shares_the_rows_of_several(target: str) -> None:
    """A graph for one sequence has no lane of sequences in its operands: rows of a pool have one all the same, so
    nothing is folded in when batches of one and of several take turns."""

    def step(pool: Tensor, slots: Tensor, q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
        s = pool[slots] * gate[..., None] + k[..., None] * v[..., None, :]
        pool[slots] = s
        return (q[..., None] * s).sum(-2)

    compiled = torch.compile(step, backend="kvbuffer", options={"flush": 8, "inner": "eager", "target": target})
    pool = torch.randn(6, 2, 8, 16)
    expected = pool.clone()
    with torch.no_grad():
        for slots in ([3], [3, 5, 0], [1, 2], [3], [5], [0, 3], [4], [3, 1, 2]) * 3:
            n = len(slots)
            given = (torch.randn(n, 2, 8), torch.randn(n, 2, 8), torch.randn(n, 2, 16), torch.rand(n, 2, 8))
            got = compiled(pool, torch.tensor(slots), *given)
            torch.testing.assert_close(got, step(expected, torch.tensor(slots), *given), atol=1e-4, rtol=1e-4)
    assert stats(pool).total("settles") == 0 and stats(pool).total("owed") > 0
    torch.testing.assert_close(pool, expected, atol=1e-4, rtol=1e-4)
