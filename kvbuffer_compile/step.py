"""What runs in place of a compiled graph: hand the states' rows to the rewritten graph, settle what others read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from kvbuffer_compile import check, drafts
from kvbuffer_compile.access import touch
from kvbuffer_compile.accounts import Account, Attempt, RLock, under_locks
from kvbuffer_compile.aliases import Place, alias, is_alias, owner_of, plain
from kvbuffer_compile.drafts import Tree
from kvbuffer_compile.guard import GuardedState, plain_calls
from kvbuffer_compile.opening import open_account
from kvbuffer_compile.passes.lifted import Part
from kvbuffer_compile.passes.rewrite import Spliced
from kvbuffer_compile.runtime import mark_rowless


class Step:
    """A rewritten graph. Its compiled form takes, behind the user's inputs, the slices that are states of their own,
    then cursor and rows of each buffered state.

    Its inputs are ordinary tensors: the user's own, or the aliases of those that are guarded (entry.py).
    """

    def __init__(
        self,
        compiled: Callable[..., Any],
        states: list[Spliced],
        original: GraphModule | None,
        parts: Sequence[Part] = (),
        donated: Sequence[tuple[int, int]] = (),
    ) -> None:
        self._boxed_call = True  # on the instance: wrappers copy __dict__, not the class
        self.compiled = compiled
        self.buffered = [s for s in states if s.plan.variant != "recurrent"]
        self.states = states
        self.indices = {s.index for s in states} | {part.index for part in parts}
        self.original = original
        self.parts = parts
        # positions of an input and of the output it is returned as: states, then stacks and pools
        self.donated = [(s.index, s.returned) for s in states if s.returned is not None] + list(donated)
        self.stored = tuple(donated)
        self.others: list[int] | None = None  # further inputs that can be states

    def __call__(self, args: list[Any]) -> Any:
        with plain_calls():
            tree = drafts.active()
            if tree is not None:
                drafts.check_graph(tree, self.states, args)
            self._settle_others(args)
            owners = {i: owner_of(args[i]) for i in self.indices if i < len(args)}
            accounts = self._open(owners, len(args))
            out = under_locks(accounts, lambda: self._stepped(args, accounts, tree))
            if self.donated:
                given = {position: owners[index] for index, position in self.donated}
                return type(out)(given.get(i, x) for i, x in enumerate(out))
            return out

    def _settle_others(self, args: list[Any]) -> None:
        """Fold in the rows of every state that is an input and not stepped here."""
        if self.others is None:
            self.others = [
                i for i, a in enumerate(args)
                if isinstance(a, Tensor) and not isinstance(a, torch.nn.Parameter) and i not in self.indices
            ]  # fmt: skip
        for i in self.others:
            if is_alias(args[i]) or type(args[i]) is GuardedState:
                touch(args[i])
                args[i] = plain(args[i])

    def _open(self, owners: dict[int, Tensor], whole: int) -> list[Account]:
        """The accounts of the buffered states; what else the graph uses of their tensors is settled."""
        accounts: list[Account] = []
        lock: RLock = None
        plain_ones = set(range(whole, whole + len(self.parts)))
        for state in self.states:
            owner, place = self._where(owners, whole, state.index)
            if state.plan.variant == "recurrent":
                plain_ones.add(state.index)
                mark_rowless(owner)
                continue
            account = open_account(owner, state.plan, place, lock)
            lock = account.lock
            accounts.append(account)
            plain_ones.discard(state.index)
        for index in plain_ones:
            owner, place = self._where(owners, whole, index)
            touch(owner if place is None else alias(owner, place))
        return accounts

    def _where(self, owners: dict[int, Tensor], whole: int, index: int) -> tuple[Tensor, Place | None]:
        """The user's tensor that an input of the rewritten graph lies in, and the slice of it. whole: how many inputs
        are no slices."""
        if index < whole:
            return owners[index], None
        part = self.parts[index - whole]
        return owners[part.index], part.place

    # ------------------------------------------------------------------------------------- with the locks

    def _stepped(self, args: list[Any], accounts: list[Account], tree: Tree | None) -> Any:
        counts = [s.tokens.of(args) for s in self.buffered]
        self._hand_over(args, accounts)
        if self.original is None or tree is not None:
            return self.run(args, accounts, counts, tree)
        for account in accounts:
            account.provide()

        def step(given: list[Any]) -> Any:
            return self.run(given, accounts, counts, tree)

        return check.run(self.original, self.states, self.parts, self.stored, step, args, accounts)

    def run(self, args: list[Any], accounts: list[Account], counts: list[int], tree: Tree | None) -> Any:
        """The compiled graph on prepared inputs. When it fails, or is interrupted at any point before the attempt is
        done, whoever looks at a state next takes back what it had stepped."""
        attempt = Attempt(None if tree is None else tree.parents)
        for account, tokens in zip(accounts, counts, strict=True):
            account.attempt(attempt, tokens)
        if tree is None:
            out = self.compiled(args)
        else:
            out = drafts.run(tree, self.compiled, args, [s.plan for s in self.buffered], accounts, attempt)
        for account in accounts:
            account.finished()
        attempt.done = True
        return out

    def _hand_over(self, args: list[Any], accounts: list[Account]) -> None:
        """Append slices, cursors and rows."""
        kept = {s.index for s in self.buffered}
        whole = len(args)
        args += [None if whole + i in kept else alias(args[p.index], p.place) for i, p in enumerate(self.parts)]
        for i in self.indices:
            if i < whole and type(args[i]) is GuardedState:
                args[i] = plain(args[i])
        for state, account in zip(self.buffered, accounts, strict=True):
            args[state.index] = account.state
            args += account.arguments
