"""What runs in place of a compiled graph: hand the states' rows to the rewritten graph, settle what others read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from kvbuffer_compile import check, drafts, runtime
from kvbuffer_compile.accounts import Account, Place, alias
from kvbuffer_compile.guard import GuardedState, plain_calls
from kvbuffer_compile.passes.lifted import Part
from kvbuffer_compile.passes.rewrite import Spliced
from kvbuffer_compile.plan import Plan


class SettleOnly:
    """A graph that was not rewritten: states it is given are settled first and passed as plain tensors."""

    def __init__(self, compiled: Callable[..., Any]) -> None:
        self._boxed_call = True  # on the instance: wrappers copy __dict__, not the class
        self.compiled = compiled
        self.tensors: list[int] | None = None  # inputs that can be states

    def __call__(self, args: list[Any]) -> Any:
        with plain_calls():
            self.settle(args)
            return self.compiled(args)

    def settle(self, args: list[Any], apart: Sequence[int] = ()) -> None:
        """Fold in the rows of every state among the inputs, except those at `apart`."""
        if self.tensors is None:  # Dynamo guards the Python types of inputs: parameters stay parameters
            self.tensors = [
                i for i, a in enumerate(args)
                if isinstance(a, Tensor) and not isinstance(a, torch.nn.Parameter) and i not in apart
            ]  # fmt: skip
        for i in self.tensors:
            if type(args[i]) is GuardedState:
                runtime.touch(args[i])
                args[i] = args[i].as_subclass(Tensor)


class Step(SettleOnly):
    """A rewritten graph. Its compiled form takes, behind the user's inputs, the slices that are states of their own,
    then cursor and rows of each buffered state."""

    def __init__(
        self,
        compiled: Callable[..., Any],
        states: list[Spliced],
        original: GraphModule | None,
        parts: Sequence[Part] = (),
        donated: Sequence[tuple[int, int]] = (),
    ) -> None:
        super().__init__(compiled)
        self.states = states
        self.indices = [s.index for s in states] + [part.index for part in parts]
        self.original = original
        self.parts = parts
        self.donated = donated  # stacks and pools: positions of an input and of the output it is returned as

    def __call__(self, args: list[Any]) -> Any:
        with plain_calls():
            tree = drafts.active()
            if tree is not None:
                drafts.check_graph(tree, self.states, args)
            self.settle(args, self.indices)
            donated = [(s.returned, args[s.index]) for s in self.states if s.returned is not None]
            donated += [(position, args[index]) for index, position in self.donated]
            accounts = self._open(args)
            for account in accounts:
                account.dirty = True  # only now: opening one account settles others that overlap it
                account.drafts = None
            runtime.check_aliases(accounts)
            self._hand_over(args, accounts)
            if self.original is not None and tree is None:
                for account in accounts:
                    account.provide()
                out = check.run(self.original, self.states, self.parts, self.donated, self.run, args, accounts)
            else:
                out = self.run(args, accounts)
            return _with_owners(out, donated) if donated else out

    def run(self, args: list[Any], accounts: list[Account]) -> Any:
        """The compiled graph on prepared inputs; a step that fails half-way is taken back."""
        states = [s for s in self.states if s.plan.variant != "recurrent"]
        counts = [s.tokens.of(args) for s in states]
        for account, tokens in zip(accounts, counts, strict=True):
            account.expect(tokens)
        out = self._run(args, counts, [s.plan for s in states], accounts)
        for state, account, tokens in zip(states, accounts, counts, strict=True):
            account.finished(state.plan, tokens)
            if account.aliased or account.exposed:
                account.settle()
        return out

    def _run(self, args: list[Any], counts: list[int], plans: list[Plan], accounts: list[Account]) -> Any:
        tree = drafts.active()
        if tree is not None:
            return drafts.run(tree, self.compiled, args, plans, accounts)
        try:
            return self.compiled(args)
        except BaseException:
            for account, tokens in zip(accounts, counts, strict=True):
                account.take_back_unfinished(tokens)
            raise

    def _open(self, args: list[Any]) -> list[Account]:
        """The accounts of the buffered states; what else the graph uses of their tensors is settled."""
        accounts = []
        plain = set(range(len(args), len(args) + len(self.parts)))
        for state in self.states:
            owner, place = self._where(args, state.index)
            if state.plan.variant == "recurrent":
                plain.add(state.index)
                runtime.mark_rowless(owner)
            else:
                accounts.append(runtime.open_account(owner, state.plan, place))
                plain.discard(state.index)
        for index in plain:
            owner, place = self._where(args, index)
            runtime.touch(owner if place is None else alias(owner, place))
        return accounts

    def _where(self, args: list[Any], index: int) -> tuple[Tensor, Place | None]:
        """The user's tensor that an input of the rewritten graph lies in, and the slice of it."""
        whole = len(args)
        if index < whole:
            return args[index], None
        part = self.parts[index - whole]
        return args[part.index], part.place

    def _hand_over(self, args: list[Any], accounts: list[Account]) -> None:
        """Append slices, cursors and rows; states become plain tensors."""
        kept = {s.index for s in self.states if s.plan.variant != "recurrent"}
        whole = len(args)
        args += [None if whole + i in kept else alias(args[p.index], p.place) for i, p in enumerate(self.parts)]
        opened = iter(accounts)
        for state in self.states:
            if state.plan.variant == "recurrent":
                if type(args[state.index]) is GuardedState:
                    args[state.index] = args[state.index].as_subclass(Tensor)
            else:
                account = next(opened)
                args[state.index] = account.state
                args += [account.cursor, *account.rows]


def _with_owners(out: Any, donated: list[tuple[int, Tensor]]) -> Any:
    """Outputs in which each returned state is the very tensor that was donated, guarded like any other."""
    owners = dict(donated)
    return type(out)(owners.get(i, x) for i, x in enumerate(out))
