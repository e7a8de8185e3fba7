"""Who owes what to which state. Rows belong to the state tensor, never to a graph or a module.

An `Account` is opened when a rewritten graph first meets a state tensor and goes with the tensor. `settle` folds its
rows into the state. Everything that reads a state elsewhere settles first (guard.py).
"""

from __future__ import annotations

import os
import sys
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from kvbuffer_compile import composite, ops
from kvbuffer_compile.guard import GuardedState, on_touch, plain_calls
from kvbuffer_compile.plan import Plan

_accounts: dict[int, Account] = {}  # by id of the user's tensor
_on_storage: dict[int, list[Account]] = {}  # by storage address: several states may share one allocation


class Account:
    """The rows owed to one state.

    state: an ordinary alias of the user's tensor, what compiled code and flushes get. phase: the number of rows at
    which the first flush after settling comes, so that the layers of a model do not all flush at one step.
    aliased: the storage is visible through something that is not guarded: settle after every step. exposed: it always
    will be, because its memory was handed out or its class cannot be guarded.
    """

    def __init__(self, owner: Tensor, plan: Plan, phase: int) -> None:
        self.plan = plan
        self.phase = phase
        self.state = _alias(owner)
        key = id(owner)
        self.owner = weakref.ref(owner, lambda _: _owner_died(key))
        self.base = owner._base if owner._is_view() else None
        self.address = self.state.data_ptr()
        self.storage = self.state.untyped_storage().data_ptr()
        self.aliased = False
        self.exposed = False
        self.dirty = False
        self.steps = 0
        with torch.inference_mode(False):
            self.cursor, self.rows = _allocate(self.state, plan)
        self.cursor[1].fill_(phase)

    @property
    def row_bytes(self) -> int:
        """Memory the account holds besides the state."""
        return sum(t.untyped_storage().nbytes() for t in (self.cursor, *self.rows))

    def matches(self, owner: Tensor, plan: Plan) -> bool:
        """Whether this account can go on serving `owner` under `plan`."""
        return (
            self.owner() is owner
            and self.plan.shares_rows(plan)
            and self.address == owner.data_ptr()
            and self.state.shape == owner.shape
            and self.state.stride() == owner.stride()
        )

    def settle(self) -> None:
        """Fold every owed row into the state."""
        if self.dirty:
            # whoever looks may be a tracer: what is folded in are the real tensors
            with _disable_current_modes(), torch.inference_mode(False), torch.no_grad(), plain_calls():
                composite.flush(self.plan, self.state, self.cursor, self.rows, self.cursor[0] > 0)
                self.cursor[1].fill_(self.phase)
            self.dirty = False  # not before: a flush that ran out of memory is still owed

    def drop(self) -> None:
        """Forget the owed rows: the state is about to be overwritten as a whole."""
        self.dirty = False
        self.cursor[3].zero_()
        self.cursor[0].clamp_(max=0)
        self.cursor[1].fill_(self.phase)

    def take_back_unfinished(self, tokens: int) -> None:
        """After an exception in the middle of a step of so many tokens: if this state had stepped, undo it."""
        stepped = self.cursor[2] - self.steps
        self.cursor[0] -= torch.where(self.cursor[0] > 0, stepped * tokens, 0)
        self.cursor[2] -= stepped


def _alias(owner: Tensor) -> Tensor:
    """An ordinary tensor on the same memory; not a view, which would keep its base, the owner, alive."""
    with torch.inference_mode(False), torch.no_grad():
        alias = torch.empty(0, dtype=owner.dtype, device=owner.device)
        return alias.set_(owner.untyped_storage(), owner.storage_offset(), owner.shape, owner.stride())


def _allocate(state: Tensor, plan: Plan) -> tuple[Tensor, list[Tensor]]:
    lanes = tuple(plan.layout.canonical(state).shape[:-2])
    cursor = ops.new_cursor(plan, lanes, state.device)
    rows = [
        torch.empty(plan.row_shape(v, lanes), dtype=dtype, device=state.device)
        for v, dtype in zip(plan.program.logged, plan.row_dtypes, strict=True)
    ]
    if os.environ.get("KVBUFFER_STRICT") == "1":  # unused slots must never be read
        for row in rows:
            row.fill_(float("nan"))
    return cursor, rows


def open_account(owner: Tensor, plan: Plan, phase: int) -> Account:
    """The account of a state tensor, made if there is none; rows of another plan or alias are settled first."""
    account = _accounts.get(id(owner))
    if account is not None and account.matches(owner, plan):
        if len(_on_storage[account.storage]) > 1:
            _settle_overlapping(account)
        return account
    if account is not None:
        close(account)
    account = Account(owner, plan, phase)
    _accounts[id(owner)] = account
    _on_storage.setdefault(account.storage, []).append(account)
    _settle_overlapping(account)
    account.exposed = not guard(owner) or (account.base is not None and not guard(account.base))
    return account


def guard(owner: Tensor) -> bool:
    """Make every later access to this tensor settle first. False for a class of tensors where that cannot be done."""
    # AOTAutograd's one-time check of custom ops gives up on tensor classes it does not know, with an error, whenever
    # a graph of any backend gets such a tensor.
    if getattr(torch._functorch.config, "check_custom_op_aliasing", False):
        torch._functorch.config.check_custom_op_aliasing = False
    if type(owner) in (Tensor, torch.nn.Buffer):
        owner.__class__ = GuardedState
    return type(owner) is GuardedState


def check_aliases(accounts: Sequence[Account]) -> None:
    """Find states whose storage someone else holds now: a tensor made before the state was guarded, a NumPy array, a
    view that another compiled graph returned."""
    for storage in {a.storage for a in accounts}:
        holders = _on_storage[storage]
        bases = {id(a.base) for a in holders if a.base is not None} - {id(a.owner()) for a in holders}
        known = 2 * len(holders) + len(bases)
        handle = holders[0].state.untyped_storage()
        unknown = torch._C._storage_Use_Count(handle._cdata) - 1 - known
        for account in holders:
            account.aliased = unknown > 0


def close(account: Account) -> None:
    """Settle and forget an account."""
    account.settle()
    for key, other in list(_accounts.items()):
        if other is account:
            del _accounts[key]
    _forget_storage(account)


def _forget_storage(account: Account) -> None:
    holders = _on_storage.get(account.storage, [])
    if account in holders:
        holders.remove(account)
    if not holders:
        _on_storage.pop(account.storage, None)


def _owner_died(key: int) -> None:
    """The user's tensor is going: free its rows, folding them in first if its storage lives on in another tensor."""
    account = _accounts.pop(key, None)
    if account is None or sys.is_finalizing():
        return
    handle = account.state.untyped_storage()
    ours = 3  # the dying owner, our alias, this handle; a tensor that it was a view of may be the user's as well
    if torch._C._storage_Use_Count(handle._cdata) > ours:
        account.settle()
    _forget_storage(account)


def _span(t: Tensor) -> tuple[int, int]:
    """First and one past the last byte a tensor can touch within its storage."""
    start = int(t.storage_offset()) * t.element_size()
    if t.numel() == 0:
        return start, start
    reach = sum((n - 1) * int(s) for n, s in zip(t.shape, t.stride(), strict=True))
    return start, start + (reach + 1) * t.element_size()


def _overlapping(t: Tensor) -> Iterator[Account]:
    holders = _on_storage.get(t.untyped_storage().data_ptr(), ())
    if not holders:
        return
    low, high = _span(t)
    for account in tuple(holders):
        start, end = _span(account.state)
        if start < high and low < end:
            yield account


def _settle_overlapping(account: Account) -> None:
    for other in _overlapping(account.state):
        if other is not account:
            other.settle()


def touch(tensor: Tensor, overwritten: bool = False, exposed: bool = False) -> list[Callable[[], None]]:
    """Called before a state's values are read or changed by anything but a rewritten graph.

    overwritten: as a whole. exposed: its memory is handed out. Returns what to call when the access has succeeded: rows
    are dropped only then.
    """
    later: list[Callable[[], None]] = []
    for account in _overlapping(tensor) if _on_storage else ():
        account.exposed |= exposed
        if overwritten and account.owner() is tensor:
            later.append(account.drop)
        else:
            account.settle()
    return later


on_touch(touch)


# ----------------------------------------------------------------------------------------- public calls


def materialize(obj: Any) -> None:
    """Fold the rows owed to a tensor, or to every state found in a cache, module or container, into the state now."""
    with plain_calls():
        for tensor in tensors_in(obj):
            touch(tensor)


def tensors_in(obj: Any) -> Iterator[Tensor]:
    """Every tensor reachable through containers and attributes, each object visited once."""
    seen: set[int] = set()
    stack = [obj]
    while stack:
        x = stack.pop()
        if id(x) in seen or isinstance(x, str | bytes | int | float | type):
            continue
        seen.add(id(x))
        if isinstance(x, Tensor):
            yield x
        elif isinstance(x, dict):
            stack.extend(x.values())
        elif isinstance(x, list | tuple | set | frozenset | deque):
            stack.extend(x)
        elif isinstance(x, ModuleType):
            continue
        elif hasattr(x, "__dict__") and not callable(getattr(x, "__code__", None)):
            stack.extend(vars(x).values())
        stack.extend(getattr(x, name) for name in getattr(type(x), "__slots__", ()) if hasattr(x, name))


def accounts_of(obj: Any) -> list[Account]:
    """The accounts of the states reachable from obj (a tensor, cache, module or container)."""
    with plain_calls():
        found = [a for t in tensors_in(obj) for a in _overlapping(t)]
    return list(dict.fromkeys(found))


def rollback(obj: Any, n: int | Sequence[int] | Tensor) -> None:
    """Take back the last n tokens of every buffered state in obj, as if they had never been.

    obj: a tensor, a cache, a module or a container. n: one count, or one per sequence; a tensor on the state's device
    is not copied to the host and not checked. ValueError when a count is negative or more than can be taken back, or
    when obj holds no buffered state.
    """
    accounts = accounts_of(obj)
    if not accounts:
        raise ValueError("rollback(obj, n): obj holds no state with buffered tokens")
    for account in accounts:
        _check_rollback(account, n)
    for account in accounts:
        count = torch.as_tensor(n, dtype=torch.int32, device=account.cursor.device)
        account.cursor[0] -= torch.where(account.cursor[0] >= 0, count, 0)


def _check_rollback(account: Account, n: int | Sequence[int] | Tensor) -> None:
    owed = account.cursor[0]
    if isinstance(n, Tensor) and n.device.type != "cpu":
        return
    count = torch.as_tensor(n)
    if count.dtype == torch.bool or count.dtype.is_floating_point or count.dtype.is_complex:
        raise ValueError(f"rollback(obj, n): n={n!r} is not allowed: it must be an integer, or one for each sequence")
    if count.dim() > 1 or (count.dim() == 1 and count.shape[0] != owed.shape[0]):
        raise ValueError(f"rollback(obj, n): n has shape {tuple(count.shape)}, the state has {owed.shape[0]} sequences")
    available = owed.cpu().clamp(min=0)
    if bool((count < 0).any()) or bool((count > available).any()):
        raise ValueError(
            f"rollback(obj, n): n={count.tolist()} but between 0 and {available.tolist()} tokens can be taken back"
        )
