"""Drafts that branch: a tree for the verify steps of a compiled graph, and the path of it that is accepted."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kvbuffer_compile.accounts.account import Account
from kvbuffer_compile.accounts.attempt import Attempt
from kvbuffer_compile.accounts.rollback import integers, on_device
from kvbuffer_compile.errors import StateError
from kvbuffer_compile.guard.guarded import plain_calls
from kvbuffer_compile.ir.plan import Plan
from kvbuffer_compile.passes.rewrite import Spliced
from kvbuffer_compile.process.at_once import at_once
from kvbuffer_compile.process.locks import under_locks
from kvbuffer_compile.process.surroundings import neutral
from kvbuffer_compile.runtime import by_hand
from kvbuffer_compile.steps import composite, ops, targets

Paths = Sequence[int] | Sequence[Sequence[int]] | Tensor


@dataclass
class Tree:
    """parents: int64 [N, T] or [1, T]. served: how many states have stepped over it."""

    parents: Tensor
    served: int = field(default=0)


# Only the with statement itself holds its tree: when an interrupt ends it anywhere, no tree is active any more.
_active: ContextVar[weakref.ref[Tree] | None] = ContextVar("draft_tree", default=None)


def active() -> Tree | None:
    """The tree that the steps run now are to take."""
    found = _active.get()
    return None if found is None else found()


@contextmanager
def draft_tree(parents: Sequence[int] | Sequence[Sequence[int]] | Tensor) -> Iterator[None]:
    """Compiled graphs of T tokens called inside verify a tree of drafts: token j follows token parents[j], which comes
    before it; -1 is the last committed token.

    parents: T numbers for all sequences, or a list of them for each; a tensor on a device is not brought to the host.
    Outputs are in the order of the tokens. Nothing is committed: `accept` says which path is kept. What the model
    itself does by position (attention masks, convolutions) is for the caller to see to. ValueError for parents that
    are none, and for a graph of another number of tokens; StateError when no state took the tree.
    """
    tree = Tree(_parents(parents))
    if active() is not None:
        raise ValueError("draft_tree(parents): another draft tree is active")
    try:
        _active.set(weakref.ref(tree))
        yield
    finally:
        _active.set(None)
    if not tree.served:
        raise StateError("draft_tree(parents): no compiled graph with a buffered state was called inside")


def _parents(given: Any) -> Tensor:
    found = integers(given, "draft_tree(parents): parents")
    found = found[None] if found.dim() == 1 else found
    if found.dim() != 2 or found.shape[1] == 0:
        raise ValueError(f"draft_tree(parents): parents has shape {tuple(found.shape)}, not [T] or [sequences, T]")
    right = ((found >= -1) & (found < torch.arange(found.shape[1], device=found.device))).all()
    if found.device.type != "cpu":
        torch._assert_async(right, "draft_tree(parents): a parent that does not come before its child")
    elif not bool(right):
        raise ValueError(f"draft_tree(parents): parents={given!r}: -1 or an earlier token must stand at each place")
    return found


# --------------------------------------------------------------------------------------------------- steps


def check_graph(tree: Tree, states: Sequence[Spliced], args: list[Any]) -> None:
    """ValueError when a graph cannot step over the tree, before anything has happened."""
    for state in states:
        if state.plan.variant != "verify" or state.plan.slots:
            raise ValueError(
                "draft_tree(parents): graphs of one token, of a block, without a buffer or on a pool take none"
            )
        if state.tokens.of(args) != tree.parents.shape[1]:
            raise ValueError(
                f"draft_tree(parents): {tree.parents.shape[1]} parents for {state.tokens.of(args)} tokens of the graph"
            )


def run(
    tree: Tree,
    compiled: Callable[[list[Any]], Any],
    args: list[Any],
    plans: list[Plan],
    accounts: list[Account],
    attempt: Attempt[Account],
) -> Any:
    """A compiled graph with the tree steps of its plans in place of their verify steps."""
    if any(tree.parents.shape[0] not in (1, a.cursor.shape[1]) for a in accounts):
        raise ValueError(f"draft_tree(parents): parents of {tree.parents.shape[0]} sequences")
    with _Redirected(plans, tree.parents, attempt.drafted):
        out = compiled(args)
    if len(attempt.drafted) < len(accounts):
        raise StateError("draft_tree(parents): a captured CUDA graph cannot take a tree: compile without them")
    tree.served += len(accounts)
    return out


class _Redirected(TorchDispatchMode):
    """Verify ops become the tree ops of the same plans. done: receives the cursors of the states that have stepped."""

    def __init__(self, plans: list[Plan], parents: Tensor, done: set[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.parents = parents
        self.done = done
        self.trees = {ops.step_op(p): (ops.step_op(_tree_plan(p)), p) for p in plans}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func not in self.trees:
            return func(*args, **(kwargs or {}))
        op, plan = self.trees[func]
        given = [*args, *(kwargs or {}).values()]
        before = 2 + plan.sides  # state, cursor, rows and shadow
        self.done.add(given[1].data_ptr())
        return op(*given[:before], self.parents.to(given[1].device, torch.int32), *given[before:])


def _tree_plan(plan: Plan) -> Plan:
    """The tree step of a state's verify plan: a kernel where that is one, built now if it is the first."""
    tree = replace(plan, variant="tree")
    return replace(tree, target=targets.build(tree))


# --------------------------------------------------------------------------------------------------- accept


def accept(obj: Any, path: Paths) -> None:
    """Commit a path of the draft tree that every buffered state in obj has just verified, and reject all other drafts.

    obj: a tensor, a cache, a module or a container. path: the accepted tokens from a child of the last committed token
    on, for all sequences; or one path for each, a tensor filled up with -1 behind shorter ones. ValueError, with
    everything as it was, when that is no path of the tree or no tree waits: any other step, read or write of a state
    since then has rejected the whole tree. A tensor on a state's own device is not brought to the host: a wrong one
    fails on the device.
    """
    with plain_calls():
        accounts = by_hand.whole_accounts(list(by_hand.tensors_in(obj)), "accept(obj, path)")
        paths = _paths(path)
        under_locks(accounts, lambda: _accept(accounts, paths))


def _accept(accounts: list[Account], paths: Tensor) -> None:
    for account in accounts:
        account.reconcile()
        _check(account, paths)
    rejected = [0 if a.drafts is None else a.drafts.shape[1] - paths.shape[1] for a in accounts]
    _keep(accounts, paths)
    for account, tokens in zip(accounts, rejected, strict=True):
        account.history.rejected(tokens)
        account.finished()


def _paths(path: Paths) -> Tensor:
    name = "accept(obj, path): path"
    if isinstance(path, Tensor):
        found = integers(path, name)
        return found[None] if found.dim() == 1 else found
    several = any(isinstance(x, Sequence | Tensor) for x in path)
    parts: Any = path if several else [path]
    each = [x.tolist() if isinstance(x, Tensor) else list(x) for x in parts]
    width = max(map(len, each), default=0)
    padded = [x + [-1] * (width - len(x)) for x in each]
    return integers(padded, name) if width else torch.empty(len(each), 0, dtype=torch.long, device="cpu")


def _check(account: Account, paths: Tensor) -> None:
    if account.drafts is None:
        raise ValueError("accept(obj, path): no draft tree waits: anything since it was verified has rejected it")
    sequences, count = account.cursor.shape[1], account.drafts.shape[1]
    if paths.dim() != 2 or paths.shape[0] not in (1, sequences) or paths.shape[1] > count:
        shape = tuple(paths.shape)
        raise ValueError(f"accept(obj, path): path has shape {shape}, the tree {count} drafts of {sequences} sequences")
    waits = on_device(paths, account)
    parents, paths = (x.to(account.cursor.device if waits else "cpu") for x in (account.drafts, paths))
    right = _is_path(parents.expand(sequences, -1), paths.expand(sequences, -1))
    if waits:
        torch._assert_async(right, "accept(obj, path): that is no path of the draft tree")
    elif not bool(right):
        raise ValueError(f"accept(obj, path): path={paths.tolist()} is no path of the tree {parents.tolist()}")


def _is_path(parents: Tensor, paths: Tensor) -> Tensor:
    """Whether each token follows the one before it, and nothing follows a -1."""
    count = parents.shape[1]
    before = torch.cat([torch.full_like(paths[:, :1], -1), paths[:, :-1]], 1)
    follows = (paths >= 0) & (paths < count) & (parents.gather(1, paths.clamp(0, count - 1)) == before)
    ended = (paths == -1).cummax(1).values if paths.shape[1] else paths == -1
    return torch.where(ended, paths == -1, follows).all()


@neutral
def _keep(accounts: Sequence[Account], paths: Tensor) -> None:
    """Move the rows of the paths to follow the owed ones, and let them be owed: in all states or in none."""
    at_once(*[write for account in accounts for write in _moves(account, paths.to(account.cursor.device))])


def _moves(account: Account, paths: Tensor) -> list[Callable[[], object]]:
    """What keeps the paths of one state. It cannot be done twice: a row may go where another one came from."""
    owed = account.cursor[0]
    paths = paths.expand(len(owed), -1)
    kept = (paths >= 0) & (owed >= 0)[:, None]
    each = torch.arange(len(owed), device=owed.device)[:, None]
    target = torch.arange(paths.shape[1], device=owed.device)
    source, first = torch.where(kept, paths, target), owed.clamp(min=0)[:, None]
    writes: list[Callable[[], object]] = [partial(setattr, account, "drafts", None)]
    for v, row in zip(account.plan.program.logged, account.rows, strict=True):
        slots = composite.by_slot(row, v.kind)
        writes.append(partial(slots.index_put_, (each, first + target), slots[each, first + source]))
    return [*writes, partial(owed.add_, kept.sum(1))]
