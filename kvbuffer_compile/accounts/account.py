"""The rows that one state owes, and where that state is."""

from __future__ import annotations

import functools
import weakref
from typing import Protocol

import torch
from torch import Tensor

from kvbuffer_compile.accounts.allocation import Allocation
from kvbuffer_compile.accounts.attempt import Attempt
from kvbuffer_compile.accounts.buffers import allocate, allocate_shadow
from kvbuffer_compile.accounts.history import History, Rhythm, Tally, profiled
from kvbuffer_compile.guard.aliases import Place, alias, plain
from kvbuffer_compile.guard.overlap import has_memory, provide
from kvbuffer_compile.ir.plan import Plan
from kvbuffer_compile.process.forks import one_thread_in_a_fork
from kvbuffer_compile.process.locks import RLock
from kvbuffer_compile.process.surroundings import neutral
from kvbuffer_compile.steps import composite

Key = tuple[int, Place | None]  # of an account: id of the user's tensor, and the slice of it that is the state


class Keeper(Protocol):
    """Whoever finds accounts by their tensors and their memory."""

    def owner_died(self, account: weakref.ref[Account], owner: object) -> None: ...


class Account:
    """The rows owed to one state: a tensor of the user, or one slice of a tensor that holds several.

    Everything but reading fields is done with `lock` held; states that are stepped together share one.
    state: an ordinary alias of the user's memory, what compiled code and flushes get. phase: the number of rows at
    which the first flush after settling comes, so that the layers of a model do not all flush at one step.
    rivals: other accounts whose state shares memory with this one.
    shared: who else can reach the memory for ever, None when nobody can. Then, as while `aliased`, nothing is owed: the
    rows are folded in after every step.
    bare: the state was zero after the last write from outside, so that cursor[3] may still be set. dirty: the memory
    may not hold what it should, because rows are owed or because it was never made zero. drafts: the parents of a tree
    whose rows lie behind the owed ones until anything else happens to the state. held: the counts at which sequences
    flush next when they are no longer held.
    progress: the steps that count (of all sequences, or one by one), and the calls after them with the tokens of each,
    which count when they are done; afterwards, how many tokens they had. first, most: of a state without memory, the
    count at which it first flushes, and no less than what it owes.
    """

    allocation: Allocation[Account]

    def __init__(
        self, owner: Tensor, plan: Plan, place: Place | None, lock: RLock, keeper: Keeper, serial: int, phase: int
    ) -> None:
        self.plan = plan
        self.serial = serial
        self.phase = phase
        self.place = place
        self.lock = lock
        self.state = plain(owner) if place is None else alias(owner, place)
        if self.state is owner:
            self.state = alias(owner)  # of a class that cannot be guarded
        self.key: Key = (id(owner), place)
        me = weakref.ref(self)
        self.owner = weakref.ref(owner, functools.partial(keeper.owner_died, me))
        self.seen = geometry(owner)
        self.base = owner._base if owner._is_view() else None
        self.rivals: list[Account] = []
        self.shared: str | None = None
        self.dirty = False
        self.bare = False
        self.drafts: Tensor | None = None
        self.progress: tuple[int | Tensor, Attempt[Account] | None, int] = (0, None, 0)
        self.held: Tensor | None = None
        self.without_memory = not has_memory(self.state)
        self.first = phase
        self.most = 0
        with torch.inference_mode(False):
            self.cursor, self.rows = allocate(self.state, plan)
            self.shadow = allocate_shadow(self.state, plan)
        self.cursor[1].fill_(phase)
        self.history = History(self.cursor, Rhythm(phase, plan.flush, plan.capacity), not plan.several)
        self.arguments = (self.cursor, *self.rows, *self.shadow)  # of a step op, behind the state

    @property
    def row_bytes(self) -> int:
        """Memory of rows and cursor."""
        return sum(t.untyped_storage().nbytes() for t in (self.cursor, *self.rows))

    @property
    def shadow_bytes(self) -> int:
        """Memory of the copy of the state that steps read in its place, with its scales; 0 for none."""
        return sum(t.untyped_storage().nbytes() for t in self.shadow)

    def matches(self, owner: Tensor, plan: Plan) -> bool:
        """Whether this account can go on serving `owner` under `plan`."""
        return (
            self.owner() is owner
            and (self.plan is plan or self.plan.shares_rows(plan))
            and (self.seen[0] == owner.data_ptr() or self.seen == geometry(owner))
        )

    @property
    def aliased(self) -> bool:
        """Whether the memory can be reached by somebody for now."""
        return self.allocation.aliased

    @property
    def unsettled(self) -> Tensor:
        """Which sequences owe rows, or have no base yet."""
        return (self.cursor[0] > 0) | ((self.cursor[3] > 0) & (self.cursor[0] >= 0))

    # ------------------------------------------------------------------------------------------ steps

    def attempt(self, attempt: Attempt[Account], tokens: int) -> None:
        """To be called before a step of so many tokens: if it may flush, the state has memory from now on."""
        self.history.warn_of_sharing(self.shared)
        self.reconcile()
        self.dirty = True
        self.drafts = None
        if self.without_memory:
            limit = self.first if self.held is None else self.plan.capacity
            if self.most >= limit or self.most + tokens > self.plan.capacity:
                self.provide()
            self.most += tokens
        self.progress = (self.progress[0], attempt, tokens)

    def reconcile(self) -> None:
        """Bring the last calls to their end: their tokens count, or, of one that failed, are taken back.

        An exception at any point leaves this to be done again, with the same result.
        """
        steps, attempt, tokens = self.progress
        if attempt is None:
            return
        attempt.again = None  # whoever calls this is about to look at the state, or has another step for it
        if attempt.done == attempt.begun:
            self.drafts = attempt.parents
            counted = self._slot_steps() if self.plan.slots else steps + attempt.done
        else:
            counted = steps + attempt.done if attempt.done else steps
            self.take_back_unfinished(0 if self.cursor.data_ptr() in attempt.drafted else tokens, counted)
        self.progress = (counted, None, tokens)

    @neutral  # the garbage collector may ask while something is traced
    def _slot_steps(self) -> Tensor:
        return self.cursor[2].clone()

    def leave(self) -> None:
        """The next call is not like the last ones: what it would need is let go."""
        attempt = self.progress[1]
        if attempt is not None:
            attempt.again = None

    @property
    def so_far(self) -> tuple[int | Tensor, None, int]:
        """`progress` as it stands, whatever becomes of the call that is not done."""
        steps, attempt, tokens = self.progress
        return steps if attempt is None or self.plan.slots else steps + attempt.done, None, tokens

    def may_go_on(self, lock: RLock) -> bool:
        """Whether a call like the last one has nothing to look up or to prepare for this state."""
        nobody_else = self.shared is None and not self.allocation.aliased and not self.rivals
        return nobody_else and self.lock is lock and self.dirty and not self.without_memory and not self.plan.slots

    def finished(self) -> None:
        """To be called when the steps of a call have gone through: memory that others can reach holds the truth again.

        Before the call is done: when this fails, the token is there, as after an eager step that failed later on.
        """
        if self.shared is not None or self.allocation.check():
            self.leave()  # nothing is owed any more
            self.fold()
            self.history.exposed += 1

    @neutral
    def take_back_unfinished(self, tokens: int, counted: int | Tensor) -> None:
        """Undo what the state may have stepped beyond the steps that count; rows that were folded in stay.

        Of memory that others can reach the call has not folded them in, and they may write it before the next one."""
        self.forget_shadow()
        cursor = self.cursor.clone()
        stepped = cursor[2] - counted
        cursor[0] -= torch.where(cursor[0] > 0, stepped * tokens, 0)
        cursor[2] -= stepped
        self.cursor.copy_(cursor)

    # ---------------------------------------------------------------------------------------- settling

    def settle(self, why: str | None = None) -> None:
        """Fold every owed row into the state; whoever comes now may change it. why: when no line of code asks."""
        with self.lock:
            self.reconcile()
            self.drafts = self.held = None
            if self.dirty:
                since = self.history.begin(self.progress, self.phase)
                self.fold()
                if not isinstance(since, int) or since > 0:
                    self.history.settled(since, why)
            elif self.bare:
                self.drop()
            self.bare = False

    @neutral  # whoever looks may be a tracer, or under autocast
    def fold(self) -> None:
        """Fold in every row there is, those of a call that is not done among them."""
        self.provide()
        self.forget_shadow()
        with one_thread_in_a_fork(), profiled("kvbuffer::flush of a state that someone looks at"):
            composite.flush(self.plan, self.state, self.cursor, self.rows, self.unsettled)
        self.cursor[1].fill_(self.phase)
        self.dirty = False  # not before: a flush that ran out of memory is still owed

    @neutral
    def drop(self, zero: bool = False, dirty: bool = False) -> None:
        """Forget the owed rows: the state was overwritten as a whole. zero: and need not be read before it has a base;
        dirty: because it is not zero in memory.

        The first limit of such a state keeps the distance to those of other layers that its phase has.
        """
        with self.lock:
            self.reconcile()
            self.forget_shadow()
            self.drafts = self.held = None
            self.bare, self.dirty = self.bare or zero, self.dirty or dirty
            limit = self.fresh_rows - (self.plan.flush - self.phase) if zero else self.phase
            self.first, self.most = max(1, limit), 0
            self.history.overwritten(self.progress, self.first, zero)
            cursor = self.cursor.clone()
            cursor[0].clamp_(max=0)
            cursor[1].fill_(self.first)
            cursor[3].fill_(int(zero))
            self.cursor.copy_(cursor)
            self.dirty, self.bare = dirty, zero

    def begin(self) -> None:
        """From now on the state is zero, whatever its memory holds."""
        self.drop(zero=True, dirty=True)

    def forget_shadow(self) -> None:
        """Whoever comes next may write the state. None is made for memory that others can write at any time."""
        for scale in self.shadow[1:]:
            scale.fill_(torch.nan if self.shared is not None or self.allocation.aliased else 0)

    @functools.cached_property
    def fresh_rows(self) -> int:
        """How many rows the state owes before its first flush when it is known to be zero."""
        return self.plan.fresh_rows(self.plan.layout.sizes(self.state.shape)[:-2])

    @neutral
    def hold(self) -> None:
        """Flush only when the buffer is full, so that as many tokens as can be may be taken back."""
        with self.lock:
            self.reconcile()
            if self.held is None:
                self.history.disturbed = True
                self.held = self.cursor[1].clone()
                self.cursor[1].fill_(self.plan.capacity)

    @neutral
    def release(self) -> None:
        """Flush as before `hold`; a sequence that has flushed since then keeps its new count."""
        with self.lock:
            self.reconcile()
            if self.held is not None:
                kept = self.cursor[1] != self.plan.capacity
                self.cursor[1].copy_(torch.where(kept, self.cursor[1], self.held))
                self.held = None

    def tally(self, wait: bool = True) -> Tally:
        """What has happened to the state. wait: for the device, to know how many rows are owed."""
        with self.lock:
            self.reconcile()
            return self.history.now(self.progress, wait)

    def provide(self) -> None:
        """Let the state have memory; what that then holds is not read."""
        if self.without_memory:
            for tensor in (self.state, *self.shadow):
                provide(tensor)
            owner = self.owner()
            self.seen = self.seen if owner is None else geometry(owner)
            self.without_memory = False


def geometry(t: Tensor) -> tuple[int, torch.Size, tuple[int, ...]]:
    """Where a tensor lies and how."""
    return t.data_ptr(), t.shape, t.stride()
