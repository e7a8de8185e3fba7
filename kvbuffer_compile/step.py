"""What runs in place of a compiled graph: hand the states' rows to the rewritten graph, settle what others read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from kvbuffer_compile import check, runtime
from kvbuffer_compile.guard import GuardedState, plain_calls
from kvbuffer_compile.passes.rewrite import Spliced
from kvbuffer_compile.runtime import Account


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
    """A rewritten graph. Its compiled form takes, behind the user's inputs, cursor and rows of each buffered state."""

    def __init__(self, compiled: Callable[..., Any], states: list[Spliced], original: GraphModule | None) -> None:
        super().__init__(compiled)
        self.states = states
        self.indices = [s.index for s in states]
        self.phases = _phases(states)
        self.original = original

    def __call__(self, args: list[Any]) -> Any:
        with plain_calls():
            self.settle(args, self.indices)
            donated = [(s.returned, args[s.index]) for s in self.states if s.returned is not None]
            accounts = [self._enter(args, s, phase) for s, phase in zip(self.states, self.phases, strict=True)]
            open_accounts = [a for a in accounts if a is not None]
            for account in open_accounts:
                account.dirty = True  # only now: opening one account settles others that overlap it
            runtime.check_aliases(open_accounts)
            if self.original is not None:
                out = check.run(self.original, self.states, self.run, args, open_accounts)
            else:
                out = self.run(args, open_accounts)
            return _with_owners(out, donated) if donated else out

    def run(self, args: list[Any], accounts: list[Account]) -> Any:
        """The compiled graph on prepared inputs; a step that fails half-way is taken back."""
        counts = [s.tokens.of(args) for s in self.states if s.plan.variant != "recurrent"]
        try:
            out = self.compiled(args)
        except BaseException:
            for account, tokens in zip(accounts, counts, strict=True):
                account.take_back_unfinished(tokens)
            raise
        for account in accounts:
            account.steps += 1
            if account.aliased or account.exposed:
                account.settle()
        return out

    def _enter(self, args: list[Any], state: Spliced, phase: int) -> Account | None:
        owner = args[state.index]
        if state.plan.variant == "recurrent":
            if type(owner) is GuardedState:
                runtime.touch(owner)
                args[state.index] = owner.as_subclass(Tensor)
            return None
        account = runtime.open_account(owner, state.plan, phase)
        args[state.index] = account.state
        args.append(account.cursor)
        args.extend(account.rows)
        return account


def _with_owners(out: Any, donated: list[tuple[int, Tensor]]) -> Any:
    """Outputs in which each returned state is the very tensor that was donated, guarded like any other."""
    owners = dict(donated)
    return type(out)(owners.get(i, x) for i, x in enumerate(out))


def _phases(states: list[Spliced]) -> list[int]:
    """For each state the number of rows at which it first flushes: spread over the period, so that no token pays
    for all layers."""
    n = max(1, len(states))
    return [s.plan.flush - (j * s.plan.flush) // n for j, s in enumerate(states)]
