"""One allocation of memory, and the states that lie in it."""

from __future__ import annotations

from typing import Any, Generic, Protocol, TypeVar

from torch import Tensor

from kvbuffer_compile.guard.aliases import known_alias
from kvbuffer_compile.guard.sharing import Storage


class Resident(Protocol):
    """The account of a state that lies in an allocation."""

    serial: int
    state: Tensor
    base: Tensor | None
    owner: Any  # gives the user's tensor, None when it is gone


R = TypeVar("R", bound=Resident)


class Allocation(Generic[R]):
    """One allocation, and the accounts of the states in it. aliased: somebody else holds it for now."""

    def __init__(self, state: Tensor) -> None:
        self.storage = Storage(state)
        self._accounts: dict[int, R] = {}  # by serial number
        self.aliased = False
        self._known = 0

    @property
    def accounts(self) -> list[R]:
        """Of the states in this memory."""
        return list(self._accounts.values())

    def add(self, account: R) -> None:
        """Another state lies here."""
        self._accounts[account.serial] = account
        self._known = -1  # as many tensors may be held by others

    def remove(self, account: R) -> None:
        """A state is gone."""
        self._accounts.pop(account.serial, None)
        self._known = -1

    def __contains__(self, account: R) -> bool:
        return account.serial in self._accounts

    def check(self) -> bool:
        """Whether someone else holds the storage now: a tensor made before the state was guarded, a NumPy array, a view
        that another compiled graph returned, a storage object."""
        users = self.storage.users
        if users != self._known:
            self._known = self._count()
        self.aliased = users > self._known or self.storage.held
        return self.aliased

    def _count(self) -> int:
        """The tensors on the storage that are guarded or ours."""
        holders = self.accounts
        owners = [owner for a in holders if (owner := a.owner()) is not None]
        known = [*owners, *(a.state for a in holders), *(a.base for a in holders), *map(known_alias, owners)]
        return len({id(t) for t in known if t is not None})

    def outlives(self, dying: bool) -> bool:
        """Whether the memory of states whose owners died lives on in tensors of others. dying: an owner is still one
        of them."""
        ours = {id(a.state) for a in self.accounts if a.owner() is None}
        return self.storage.users > len(ours) + dying
