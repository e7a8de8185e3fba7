"""Who holds the memory of states, compared at every step: in C++, and in Python where there is no compiler."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kvbuffer_compile.codegen import build
from kvbuffer_compile.guard import sharing
from kvbuffer_compile.guard.sharing import Storage, Watch

WAYS = {
    "a view": lambda t: t[1:],
    "a view of a view": lambda t: t[1:].view(3, 1)[0],
    "NumPy": lambda t: t.numpy(),
    "the storage": lambda t: t.untyped_storage(),
    "a tensor on the storage": lambda t: torch.empty(0).set_(t.untyped_storage()),
}


@pytest.fixture(params=["C++", "Python"])
def compare(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "Python":
        monkeypatch.setattr(sharing, "_comparison", lambda: sharing._compared_here)
    elif build.compiler() is None:
        pytest.skip("no C++ compiler")
    else:
        assert sharing._comparison() is not sharing._compared_here


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("which", [0, 2])
def test_a_holder_is_noticed_until_it_is_gone(compare: None, way: str, which: int) -> None:
    states = [torch.zeros(4) for _ in range(3)]
    watch = Watch([Storage(t) for t in states])
    assert watch.unchanged() and watch.unchanged()
    held: Any = WAYS[way](states[which])
    assert not watch.unchanged()
    del held
    assert watch.unchanged()


def test_a_holder_that_goes_is_noticed(compare: None) -> None:
    state: Tensor = torch.zeros(4)
    view: Tensor | None = state[1:]
    watch = Watch([Storage(state)])
    assert watch.unchanged()
    view = None
    assert view is None and not watch.unchanged()


def test_watching_holds_nothing(compare: None) -> None:
    """Nobody seems to hold a state because it is watched, and a watch may outlive what is watched."""
    state = torch.zeros(4)
    found = Storage(state)
    before = found.users, found.held
    watch = Watch([found])
    assert (found.users, found.held) == before == (1, False)
    del state, found
    assert not watch.unchanged()
