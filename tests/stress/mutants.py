"""Ways to break the runtime that the stress machine must notice: each replaces one rule of it by a wrong one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from kvbuffer_compile.accounts import account as accounts
from kvbuffer_compile.accounts import attempt, ledger
from kvbuffer_compile.guard import dispatch_watch
from kvbuffer_compile.guard import guarded as guard
from kvbuffer_compile.runtime import access, by_hand, drafts, entry
from kvbuffer_compile.steps import composite

Patch = pytest.MonkeyPatch
MUTANTS: dict[str, Callable[[Patch], None]] = {}


def mutant(name: str) -> Callable[[Callable[[Patch], None]], Callable[[Patch], None]]:
    def register(apply: Callable[[Patch], None]) -> Callable[[Patch], None]:
        MUTANTS[name] = apply
        return apply

    return register


def _flush(patch: Patch, wrong: Callable[..., None]) -> None:
    right = composite.flush
    patch.setattr(composite, "flush", lambda *args: wrong(right, *args))


@mutant("a flush drops the newest row")
def dropping(patch: Patch) -> None:
    def flush(right: Any, plan: Any, state: Tensor, cursor: Tensor, rows: Any, which: Tensor) -> None:
        cursor[0] -= ((cursor[0] > 1) & which).int()
        right(plan, state, cursor, rows, which)

    _flush(patch, flush)


@mutant("a flush is applied twice")
def twice(patch: Patch) -> None:
    def flush(right: Any, plan: Any, state: Tensor, cursor: Tensor, rows: Any, which: Tensor) -> None:
        before = cursor.clone()
        right(plan, state, cursor, rows, which)
        cursor.copy_(before)
        right(plan, state, cursor, rows, which)

    _flush(patch, flush)


@mutant("a flush leaves out the last sequence")
def one_short(patch: Patch) -> None:
    def flush(right: Any, plan: Any, state: Tensor, cursor: Tensor, rows: Any, which: Tensor) -> None:
        right(plan, state, cursor, rows, which & (torch.arange(len(which)) < len(which) - 1))

    _flush(patch, flush)


@mutant("states in lists are not seen")
def no_lists(patch: Patch) -> None:
    def states(given: Any) -> Iterator[Tensor]:
        args, kwargs = given
        yield from (x for x in (*args, *kwargs.values()) if isinstance(x, guard.GuardedState))

    patch.setattr(access, "states_in", states)
    patch.setattr(dispatch_watch, "_callback", None)  # would see them all the same


@mutant("who else holds the memory is not asked")
def no_aliases(patch: Patch) -> None:
    patch.setattr(accounts.Allocation, "check", lambda self: False)


@mutant("only a state itself is its own")
def no_overlap(patch: Patch) -> None:
    patch.setattr(ledger, "overlap", lambda a, b: a.data_ptr() == b.data_ptr() and a.shape == b.shape)


@mutant("a step that failed is not taken back")
def not_undone(patch: Patch) -> None:
    patch.setattr(accounts.Account, "take_back_unfinished", lambda self, tokens, counted: None)


@mutant("one token too few is taken back")
def too_few(patch: Patch) -> None:
    right = by_hand.take_back
    patch.setattr(by_hand, "take_back", lambda found, n: right(found, torch.as_tensor(n).sub(1).clamp_min(0)))


@mutant("an accepted path stays where it was")
def not_moved(patch: Patch) -> None:
    def keep(found: Any, paths: Tensor) -> None:
        for account in found:
            account.cursor[0] += (paths >= 0).sum(1)
            account.drafts = None

    patch.setattr(drafts, "_keep", keep)


@mutant("a call counts before it is done")
def too_early(patch: Patch) -> None:
    right = attempt.Attempt.__init__

    def begin(self: Any, parents: Tensor | None = None) -> None:
        right(self, parents)
        self.done = self.begun

    patch.setattr(attempt.Attempt, "__init__", begin)


@mutant("a call goes on where the last one ended, whoever has looked since")
def going_on(patch: Patch) -> None:
    right = accounts.Account.reconcile

    def reconcile(self: Any) -> None:
        last = self.progress[1]
        again = None if last is None else last.again
        right(self)
        if last is not None:
            last.again = again

    patch.setattr(accounts.Account, "reconcile", reconcile)


@mutant("graphs of other backends settle nothing")
def unsettled(patch: Patch) -> None:
    patch.setattr(entry, "touch", lambda state: None)


@mutant("accounts outlive their states")
def immortal(patch: Patch) -> None:
    patch.setattr(ledger.Ledger, "owner_died", lambda self, account, owner=None: None)
