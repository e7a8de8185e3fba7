"""Which cases of a matrix the default run holds; the rest is nightly (make nightly).

A selection is made here and nowhere else, in one of three ways: by name, the first of each kind, or the diagonal of a
product of axes. Each gives one pytest parameter for every case, so that none is lost.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Hashable, Iterable
from typing import Any

import pytest
from _pytest.mark.structures import ParameterSet

Row = ParameterSet


def row(case: Any, daily: bool, id: str | None = None) -> Row:
    """A parameter, or a tuple of several, that is nightly unless it is daily."""
    return pytest.param(
        *(case if isinstance(case, tuple) else (case,)), marks=() if daily else pytest.mark.nightly, id=id
    )


def chosen(cases: Iterable[Any], daily: Collection[str], name: Callable[[Any], str] = str) -> list[Row]:
    """By name: those of `daily`, each of which must be there."""
    cases = list(cases)
    assert (missing := set(daily) - set(map(name, cases))) == set(), f"no case is called {missing}"
    return [row(case, name(case) in daily, name(case)) for case in cases]


def first_of_each(cases: Iterable[Any], kind: Callable[[Any], Hashable], name: Callable[[Any], str] = str) -> list[Row]:
    """The first case of each kind."""
    seen: set[Hashable] = set()
    return [row(case, kind(case) not in seen and not seen.add(kind(case)), name(case)) for case in cases]


def diagonal(*axes: Iterable[Any]) -> list[Row]:
    """Every combination of values of the axes. Daily are as many as the longest axis is long, in which each value of
    each axis is taken in turn."""
    lists = [list(axis) for axis in axes]
    daily = {tuple(n % len(axis) for axis in lists) for n in range(max(map(len, lists)))}
    places = itertools.product(*(range(len(axis)) for axis in lists))
    return [row(tuple(axis[n] for axis, n in zip(lists, at, strict=True)), at in daily) for at in places]
