"""What runs in place of a compiled graph: hand the states' rows to the rewritten graph, settle what others read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import is_
from typing import Any

from torch import Tensor
from torch.fx import GraphModule

from kvbuffer_compile.accounts.account import Account
from kvbuffer_compile.accounts.attempt import Again, Attempt
from kvbuffer_compile.accounts.ledger import LEDGER
from kvbuffer_compile.accounts.opening import open_account
from kvbuffer_compile.guard.aliases import Place, alias, is_alias, owner_of, plain
from kvbuffer_compile.guard.guarded import GuardedState, may_be_state, plain_calls
from kvbuffer_compile.guard.sharing import Watch
from kvbuffer_compile.passes.lifted import Part
from kvbuffer_compile.passes.rewrite import Spliced
from kvbuffer_compile.process.locks import RLock, under_locks
from kvbuffer_compile.runtime import check, drafts
from kvbuffer_compile.runtime.access import stepped_within, touch
from kvbuffer_compile.runtime.by_hand import mark_rowless
from kvbuffer_compile.runtime.calm import Calm
from kvbuffer_compile.runtime.drafts import Tree


class Step:
    """A rewritten graph. Its compiled form takes, behind the user's inputs, the slices that are states of their own,
    then cursor and rows of each buffered state.

    Its inputs are ordinary tensors: the user's own, or the aliases of those that are guarded (entry.py).
    whole: how many of them are the user's.
    """

    def __init__(
        self,
        compiled: Callable[..., Any],
        states: list[Spliced],
        original: GraphModule | None,
        whole: int,
        parts: Sequence[Part] = (),
        donated: Sequence[tuple[int, int]] = (),
    ) -> None:
        self._boxed_call = True  # on the instance: wrappers copy __dict__, not the class
        self.compiled = compiled
        self.buffered = [s for s in states if s.plan.variant != "recurrent"]
        self.states = states
        self.whole = whole
        self.indices = {s.index for s in states} | {part.index for part in parts}
        self.own = [i for i in sorted(self.indices) if i < whole]
        self.rowless = [s.index for s in states if s.plan.variant == "recurrent"]
        kept = {s.index for s in states}
        self.settled = [whole + i for i in range(len(parts)) if whole + i not in kept]
        self.unused = {s.index for s in self.buffered}  # inputs that the account's own tensor takes the place of
        self.original = original
        self.parts = parts
        # positions of an input and of the output it is returned as: states, then stacks and pools
        self.donated = [(s.index, s.returned) for s in states if s.returned is not None] + list(donated)
        known = [s.tokens.size for s in self.buffered if s.tokens.size is not None]
        self.counts = known if len(known) == len(self.buffered) else None
        self.stored = tuple(donated)
        self.others: list[int] | None = None  # further inputs that can be states
        # inputs that the buffered states lie in; none where a call must look at more than these
        inside = [s.index for s in self.buffered if s.index >= whole]
        simple = self.counts is not None and original is None and len(inside) == len(parts)
        holders = {s.index if s.index < whole else parts[s.index - whole].index for s in self.buffered}
        self.holders = sorted(holders) if simple else []
        self.last: Attempt[Account] | None = None
        self.calm: Calm | None = None
        # only states that are stepped without rows, each an input that is written in place
        self.may_be_calm = not (self.buffered or parts or self.donated or original)

    def __call__(self, args: list[Any]) -> Any:
        if self.calm is not None and self.calm.holds(args) and drafts.active() is None:
            stepped_within()
            return self.compiled(args)
        with plain_calls():
            tree = drafts.active()
            if tree is not None:
                drafts.check_graph(tree, self.states, args)
            self._settle_others(args)
            owners = {position: owner_of(args[index]) for index, position in self.donated}
            LEDGER.bury()  # who holds a memory is told from counts
            out = self._once_more(args) if tree is None else None
            if out is None:
                accounts = self._open(args)
                self._settle_rowless(args)
                self.calm = Calm.of(args, self.rowless, self.others or []) if self.may_be_calm else None
                stepped_within()  # before the step: behind it, an interrupt could come first
                out = under_locks(accounts, lambda: self._stepped(args, accounts, tree))
            return type(out)(owners.get(i, x) for i, x in enumerate(out)) if owners else out

    def _once_more(self, args: list[Any]) -> Any:
        """One more call like the last one, if it is: of the same states, when nobody has looked at one of them since.
        None, and nothing has happened, otherwise."""
        attempt = self.last
        again = None if attempt is None else attempt.again
        if attempt is None or again is None or not all(map(is_, [args[i] for i in self.holders], again.given)):
            return None
        self._settle_rowless(args)
        stepped_within()
        with again.lock:
            if attempt.again is not again or attempt.begun != attempt.done:  # for another thread, or it failed
                return None
            args += again.tail
            attempt.begun += 1
            out = self.compiled(args)
            if not again.watch.unchanged():
                for account in again.accounts:
                    account.finished()
                again.watch = _watch(again.accounts)
            attempt.done = attempt.begun
            return out

    def _settle_others(self, args: list[Any]) -> None:
        """Fold in the rows of every state that is an input and not stepped here."""
        if self.others is None:
            self.others = [i for i, a in enumerate(args) if may_be_state(a) and i not in self.indices]
        for i in self.others:
            x = args[i]
            if type(x) is GuardedState or is_alias(x):
                touch(x)
                args[i] = plain(x)

    def _open(self, args: list[Any]) -> list[Account]:
        """The accounts of the buffered states."""
        accounts: list[Account] = []
        lock: RLock = None
        known = LEDGER.by_alias
        for state in self.buffered:
            account = known.get(id(args[state.index])) if state.index < self.whole else None
            if account is None or account.plan is not state.plan or account.rivals:
                owner, place = self._where(args, state.index)
                account = open_account(owner, state.plan, place, lock)
            lock = account.lock
            accounts.append(account)
        return accounts

    def _settle_rowless(self, args: list[Any]) -> None:
        """What else the graph uses of the tensors that states lie in."""
        for index in self.rowless:
            owner, place = self._where(args, index)
            mark_rowless(owner)
            touch(owner if place is None else alias(owner, place))
        for index in self.settled:
            owner, place = self._where(args, index)
            touch(alias(owner, place))

    def _where(self, args: list[Any], index: int) -> tuple[Tensor, Place | None]:
        """The user's tensor that an input of the rewritten graph lies in, and the slice of it."""
        if index < self.whole:
            return owner_of(args[index]), None
        part = self.parts[index - self.whole]
        return owner_of(args[part.index]), part.place

    # ------------------------------------------------------------------------------------- with the locks

    def _stepped(self, args: list[Any], accounts: list[Account], tree: Tree | None) -> Any:
        counts = self.counts or [s.tokens.of(args) for s in self.buffered]
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
        attempt: Attempt[Account] = Attempt(None if tree is None else tree.parents)
        for account, tokens in zip(accounts, counts, strict=True):
            account.attempt(attempt, tokens)
        given, tail = [args[i] for i in self.holders], args[self.whole :]
        if tree is None:
            out = self.compiled(args)
        else:
            out = drafts.run(tree, self.compiled, args, [s.plan for s in self.buffered], accounts, attempt)
        for account in accounts:
            account.finished()
        lock = accounts[0].lock if accounts else None
        again = None
        if tree is None and given and all(map(is_alias, given)) and all(a.may_go_on(lock) for a in accounts):
            again = Again(accounts, given, lock, tail, _watch(accounts))
        attempt.done = attempt.begun
        attempt.again, self.last = again, attempt
        return out

    def _hand_over(self, args: list[Any], accounts: list[Account]) -> None:
        """Append slices, cursors and rows."""
        for i in self.own:
            if type(args[i]) is GuardedState:
                args[i] = plain(args[i])
        for i, part in enumerate(self.parts):
            args.append(None if self.whole + i in self.unused else alias(args[part.index], part.place))
        for state, account in zip(self.buffered, accounts, strict=True):
            args[state.index] = account.state
            args += account.arguments


def _watch(accounts: Sequence[Account]) -> Watch:
    return Watch(list({id(a.allocation): a.allocation.storage for a in accounts}.values()))
