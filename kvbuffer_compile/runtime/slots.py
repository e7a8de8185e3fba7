"""Single sequences of a pool of states: read or overwritten without settling those of all others.

Indexing a pool (`pool[slots]`) is right at any time, and folds in the rows of every sequence there. A server that takes
a new request into a slot, keeps a snapshot of one, or puts one back, means that one alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kvbuffer_compile.accounts.fresh import make_zero
from kvbuffer_compile.accounts.ledger import LEDGER
from kvbuffer_compile.accounts.rollback import Counts, integers
from kvbuffer_compile.accounts.sequences import are_along, settle_sequences
from kvbuffer_compile.guard import dispatch_watch
from kvbuffer_compile.guard.aliases import plain
from kvbuffer_compile.guard.guarded import plain_calls
from kvbuffer_compile.process.locks import under_locks
from kvbuffer_compile.process.surroundings import neutral


def read_slots(pool: Tensor, slots: Counts) -> Tensor:
    """A copy of the states in some slots of a pool, [len(slots), *pool.shape[1:]].

    pool: [slots, ...], stepped by compiled graphs or not. slots: indices along its first dim, an integer or several.
    ValueError for a pool without slots and for an index beyond them.
    """
    which = _indices(pool, slots, "read_slots(pool, slots)")
    return _alone(pool, which, lambda memory, index: memory.index_select(0, index))


def write_slots(pool: Tensor, slots: Counts, states: Tensor) -> None:
    """Overwrite the states in some slots of a pool; what these owed is void.

    pool, slots: as for `read_slots`, each slot at most once. states: [len(slots), *pool.shape[1:]], or one without the
    first dim for all of them; cast to the dtype of the pool. ValueError, and nothing is changed, for other shapes.
    """
    call = "write_slots(pool, slots, states)"
    which = _indices(pool, slots, call)
    if len(set(which)) < len(which):
        raise ValueError(f"{call}: slots={which} names a slot twice")
    allowed = (torch.Size([len(which), *pool.shape[1:]]), pool.shape[1:])
    if states.shape not in allowed:
        raise ValueError(f"{call}: states has shape {tuple(states.shape)}, it must be {tuple(allowed[0])}")
    new = read_slots(states, range(len(which))) if states.shape == allowed[0] else states.detach()[None]
    new = new.expand(allowed[0]).to(pool.dtype)
    _alone(pool, which, lambda memory, index: memory.index_copy_(0, index, new))


def _indices(pool: Tensor, slots: Counts, call: str) -> list[int]:
    if pool.dim() < 1:
        raise ValueError(f"{call}: pool has no dims, it must have one of slots in front")
    empty = isinstance(slots, Sequence) and len(slots) == 0
    given = [] if empty else integers(slots, f"{call}: slots").flatten().tolist()
    count = pool.shape[0]
    for n in given:
        if not -count <= n < count:
            raise ValueError(f"{call}: slot {n} is not allowed: there are {count} slots")
    return [n % count for n in given]


def _alone(pool: Tensor, which: Sequence[int], use: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """use(memory, indices) where these slots of the memory hold the truth, and nobody steps the pool meanwhile."""
    with plain_calls():
        accounts = LEDGER.reached([pool])

        @neutral
        def run() -> Tensor:
            make_zero(pool)
            for account in accounts:
                if are_along(account, pool):
                    settle_sequences(account, which)
                else:
                    account.settle()
            with dispatch_watch.unwatched():
                return use(plain(pool), torch.tensor(which, dtype=torch.int64, device=pool.device))

        return under_locks(accounts, run)
