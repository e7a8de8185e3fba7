"""Taking tokens back: the cursors of all states are moved, or none of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kvbuffer_compile.accounts.account import Account
from kvbuffer_compile.process.at_once import at_once
from kvbuffer_compile.process.surroundings import neutral

Counts = int | Sequence[int] | Tensor


@neutral
def take_back(accounts: Sequence[Account], n: Counts) -> None:
    """Take the last n tokens of these states back; ValueError, and nothing has changed, when that cannot be done.

    A tensor n on the states' own device is not brought to the host: what is wrong with it fails there, as an index out
    of range does.
    """
    counts = integers(n, "rollback(obj, n): n")
    for account in accounts:
        if counts.dim() > 1 or (counts.dim() == 1 and counts.shape[0] != account.cursor.shape[1]):
            sequences = account.cursor.shape[1]
            raise ValueError(
                f"rollback(obj, n): n has shape {tuple(counts.shape)}, the state has {sequences} sequences"
            )
    if not all([_possible(account, counts) for account in accounts]):
        if counts.device.type == "cpu" and bool((counts < 0).any()):
            raise ValueError(f"rollback(obj, n): n={counts.tolist()} is not allowed: it must not be negative")
        raise ValueError(f"rollback(obj, n): n={counts.tolist()} but {_most(accounts)}")
    at_once(*[write for account in accounts for write in _without(account, counts)])


@neutral
def note(accounts: Sequence[Account], n: Counts) -> None:
    """Count that this many tokens were taken back, for people."""
    counts = integers(n, "n")
    most = int(counts.max()) if counts.device.type == "cpu" and counts.numel() else 0
    for account in accounts:
        account.history.took_back(most)


def _without(account: Account, counts: Tensor) -> list[Callable[[], object]]:
    """What takes so many tokens back."""
    owed = account.cursor[0]
    slots = (counts // account.plan.program.tokens).to(owed.device, owed.dtype)
    fewer = 0 if on_device(counts, account) else int(counts.min()) // account.plan.program.tokens
    return [
        partial(setattr, account, "drafts", None),
        partial(setattr, account, "most", account.most - fewer),
        partial(owed.sub_, torch.where(owed >= 0, slots, 0)),
    ]


def integers(given: Any, name: str) -> Tensor:
    """A tensor of whole numbers, on the device where it was given."""
    try:
        found = given if isinstance(given, Tensor) else torch.as_tensor(given, device="cpu")
    except (TypeError, ValueError, RuntimeError, OverflowError):
        found = torch.empty(0, dtype=torch.float32)
    if found.dtype == torch.bool or found.dtype.is_floating_point or found.dtype.is_complex:
        raise ValueError(f"{name}={given!r} is not allowed: it must be an integer, or one for each sequence")
    return found.long()


def on_device(values: Tensor, account: Account) -> bool:
    """Whether looking at values given by the user would make the host wait."""
    return values.device.type != "cpu" and account.cursor.device.type != "cpu"


def _possible(account: Account, counts: Tensor) -> bool:
    """Padding sequences have no tokens and lose none, whatever is asked for them."""
    each = account.plan.program.tokens
    owed = account.cursor[0].long()  # a count beyond 32 bits must not wrap
    if waits := on_device(counts, account):
        counts = counts.to(owed.device)
    else:
        owed, counts = owed.cpu(), counts.cpu()
    right = (owed < 0) | ((counts >= 0) & (counts <= owed * each) & (counts % each == 0))
    if waits:
        torch._assert_async(right.all(), "rollback(obj, n): more tokens than can be taken back, or parts of a step")
    return waits or bool(right.all())


def _most(accounts: Sequence[Account]) -> str:
    """What can be taken back, and why it is not more."""
    available = [(a.cursor[0].clamp(min=0) * a.plan.program.tokens).cpu() for a in accounts]
    least = [x for x in available if x.shape == available[0].shape]
    most = torch.stack(least).amin(0).tolist()
    each_one = "a slot" if accounts[0].plan.slots else "a sequence"
    alike = most[0] if len(set(most)) == 1 else f"{most} (one number {each_one})"
    text = "no token can be taken back" if alike == 0 else f"between 0 and {alike} tokens can be taken back"
    each = max(a.plan.program.tokens for a in accounts)
    if each > 1:
        text += f", in steps of {each}"
    if any(a.shared or a.allocation.aliased for a in accounts):
        return f"{text}: the memory of a state can be seen from elsewhere, so that every step writes the state itself"
    tallies = [a.tally(wait=False) for a in accounts]
    if all(isinstance(t.steps, int) and t.flushes == t.folds == t.overwrites == t.rollbacks == 0 for t in tallies):
        return f"{text}: no more were stepped"
    return f"{text}: those before are folded into the state, by a flush or because something looked at it"
