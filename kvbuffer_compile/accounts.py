"""The rows that one state owes, and where that state is."""

from __future__ import annotations

import functools
import weakref
from typing import Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from kvbuffer_compile import composite
from kvbuffer_compile.buffers import allocate
from kvbuffer_compile.guard import plain_calls
from kvbuffer_compile.overlap import address, has_memory, provide
from kvbuffer_compile.plan import Plan

Place = tuple[tuple[int, int], ...]  # a slice of a tensor: a dim and the position in it, once for each index
Key = tuple[int, Place | None]  # of an account: id of the user's tensor, and the slice of it that is the state


class Keeper(Protocol):
    """Whoever finds accounts by their tensors and their memory."""

    def owner_died(self, key: Key) -> None: ...

    def moved(self, account: Account, before: int) -> None: ...


class Account:
    """The rows owed to one state: a tensor of the user, or one slice of a tensor that holds several.

    state: an ordinary alias of the user's memory, what compiled code and flushes get. phase: the number of rows at
    which the first flush after settling comes, so that the layers of a model do not all flush at one step.
    rivals: other accounts whose state shares memory with this one.
    aliased: the storage is visible through something that is not guarded: settle after every step. exposed: it always
    will be, because its memory was handed out or its class cannot be guarded.
    bare: the state was zero after the last write from outside, so that cursor[3] may still be set. dirty: the memory
    may not hold what it should, because rows are owed or because it was never made zero. drafts: the parents of a tree
    whose rows lie behind the owed ones until anything else happens to the state. held: the counts at which sequences
    flush next when they are no longer held.
    first, most: of a state without memory, the count at which it first flushes, and no less than what it owes.
    """

    def __init__(self, owner: Tensor, plan: Plan, phase: int, place: Place | None, keeper: Keeper) -> None:
        self.plan = plan
        self.phase = phase
        self.place = place
        self.state = alias(owner, place)
        key = self.key = (id(owner), place)
        self.owner = weakref.ref(owner, lambda _: keeper.owner_died(key))
        self.keeper = keeper
        self.seen = _geometry(owner)
        self.base = owner._base if owner._is_view() else None
        self.storage = address(self.state)
        self._storage = self.state.untyped_storage()._cdata  # valid as long as self.state is there
        self.rivals: list[Account] = []
        self.aliased = False
        self.exposed = False
        self.dirty = False
        self.bare = False
        self.drafts: Tensor | None = None
        self.steps: int | Tensor = 0  # of all sequences, or one by one
        self.held: Tensor | None = None
        self.without_memory = not has_memory(self.state)
        self.first = phase
        self.most = 0
        with torch.inference_mode(False):
            self.cursor, self.rows = allocate(self.state, plan)
        self.cursor[1].fill_(phase)

    @property
    def row_bytes(self) -> int:
        """Memory the account holds besides the state."""
        return sum(t.untyped_storage().nbytes() for t in (self.cursor, *self.rows))

    @property
    def storage_users(self) -> int:
        """How many tensors, arrays and views hold the state's memory, this account's alias among them."""
        return storage_users(self._storage)

    def matches(self, owner: Tensor, plan: Plan) -> bool:
        """Whether this account can go on serving `owner` under `plan`."""
        return self.owner() is owner and self.plan.shares_rows(plan) and self.seen == _geometry(owner)

    @property
    def unsettled(self) -> Tensor:
        """Which sequences owe rows, or have no base yet."""
        return (self.cursor[0] > 0) | ((self.cursor[3] > 0) & (self.cursor[0] >= 0))

    def settle(self) -> None:
        """Fold every owed row into the state; whoever comes now may change it."""
        self.drafts = self.held = None
        if self.dirty:
            # whoever looks may be a tracer: what is folded in are the real tensors
            with _disable_current_modes(), torch.inference_mode(False), torch.no_grad(), plain_calls():
                self.provide()
                composite.flush(self.plan, self.state, self.cursor, self.rows, self.unsettled)
                self.cursor[1].fill_(self.phase)
            self.dirty = False  # not before: a flush that ran out of memory is still owed
        elif self.bare:
            self.drop()
        self.bare = False

    def drop(self, zero: bool = False) -> None:
        """Forget the owed rows: the state was overwritten as a whole. zero: and need not be read before it has a base.

        The first limit of such a state keeps the distance to those of other layers that its phase has.
        """
        self.dirty, self.bare, self.drafts, self.held = False, zero, None, None
        limit = self.fresh_rows - (self.plan.flush - self.phase) if zero else self.phase
        self.cursor[3].fill_(int(zero))
        self.cursor[0].clamp_(max=0)
        self.first, self.most = max(1, limit), 0
        self.cursor[1].fill_(self.first)

    def begin(self) -> None:
        """From now on the state is zero, whatever its memory holds."""
        self.drop(zero=True)
        self.dirty = True

    @functools.cached_property
    def fresh_rows(self) -> int:
        """How many rows the state owes before its first flush when it is known to be zero."""
        return self.plan.fresh_rows(self.plan.layout.sizes(self.state.shape)[:-2])

    def hold(self) -> None:
        """Flush only when the buffer is full, so that as many tokens as can be may be taken back."""
        if self.held is None:
            self.held = self.cursor[1].clone()
            self.cursor[1].fill_(self.plan.capacity)

    def release(self) -> None:
        """Flush as before `hold`; a sequence that has flushed since then keeps its new count."""
        if self.held is not None:
            kept = self.cursor[1] != self.plan.capacity
            self.cursor[1].copy_(torch.where(kept, self.cursor[1], self.held))
            self.held = None

    def provide(self) -> None:
        """Let the state have memory; what that then holds is not read."""
        if self.without_memory:
            provide(self.state)
            self.without_memory = False
            owner, before = self.owner(), self.storage
            self.storage = address(self.state)
            self.seen = self.seen if owner is None else _geometry(owner)
            self.keeper.moved(self, before)

    def expect(self, tokens: int) -> None:
        """To be called before a step of so many tokens: if it may flush, the state has memory from now on."""
        if self.without_memory:
            limit = self.first if self.held is None else self.plan.capacity
            if self.most >= limit or self.most + tokens > self.plan.capacity:
                self.provide()

    def finished(self, plan: Plan, tokens: int) -> None:
        """A step of so many tokens has gone through."""
        if self.without_memory:
            self.most += tokens
        self.steps = self.cursor[2].clone() if plan.slots else self.steps + 1

    def take_back_unfinished(self, tokens: int) -> None:
        """After an exception in the middle of a step of so many tokens: if this state had stepped, undo it."""
        stepped = self.cursor[2] - self.steps
        self.cursor[0] -= torch.where(self.cursor[0] > 0, stepped * tokens, 0)
        self.cursor[2] -= stepped


def _geometry(t: Tensor) -> tuple[int, torch.Size, tuple[int, ...]]:
    return t.data_ptr(), t.shape, t.stride()


def storage_users(handle: int) -> int:
    """How many hold a storage. handle: its `_cdata`; asking takes one more hold."""
    return int(torch._C._storage_Use_Count(handle)) - 1


def alias(owner: Tensor, place: Place | None = None) -> Tensor:
    """An ordinary tensor on the memory of a tensor or of a slice of it; not a view, which would keep its base, the
    owner, alive."""
    offset, sizes, strides = owner.storage_offset(), list(owner.shape), list(owner.stride())
    for dim, at in place or ():
        offset += at * strides.pop(dim)
        del sizes[dim]
    with torch.inference_mode(False), torch.no_grad():
        if not has_memory(owner):
            return owner.data  # set_ would provide memory
        return torch.empty(0, dtype=owner.dtype, device=owner.device).set_(
            owner.untyped_storage(), offset, sizes, strides
        )
