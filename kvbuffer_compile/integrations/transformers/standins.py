"""Attributes of one instance in place of those it has, which its copies do not get.

They are ordinary instance attributes, with a mark beside them that holds what the instance had itself. `copy`, `pickle`
and `torch.save` ask `__getstate__` what there is to copy: that is one of them.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterable
from typing import Any

MARK = "_kvbuffer_own"
STATE = "__getstate__"


def put(instance: Any, standins: dict[str, Any]) -> None:
    """Set these attributes until `take_off`, beside those that others have put. Functions become methods."""
    own, ours = vars(instance).get(MARK, ({}, {}))
    made = {**({} if STATE in ours else {STATE: _state}), **standins}
    own = own | {name: vars(instance)[name] for name in made if name in vars(instance)}
    for name, value in made.items():
        setattr(instance, name, types.MethodType(value, instance) if isinstance(value, types.FunctionType) else value)
    setattr(instance, MARK, (own, ours | {name: vars(instance)[name] for name in made}))


def take_off(instance: Any, names: Iterable[str]) -> None:
    """Undo `put` of these names. What somebody has set in the meantime stays."""
    own, ours = vars(instance).get(MARK, ({}, {}))
    going = set(names) & ours.keys()
    if ours.keys() - going == {STATE}:
        going.add(STATE)
    for name in going:
        if vars(instance).get(name) is ours.pop(name):
            delattr(instance, name)
            if name in own:
                setattr(instance, name, own.pop(name))
    if not ours:
        vars(instance).pop(MARK, None)


def original(instance: Any, name: str) -> Any:
    """What the attribute is without its stand-in."""
    own, _ = vars(instance).get(MARK, ({}, {}))
    if name in own:
        return own[name]
    found = inspect.getattr_static(type(instance), name, None)
    return found.__get__(instance, type(instance)) if hasattr(found, "__get__") else found


def go_under(instance: Any, name: str) -> None:
    """What somebody has set in place of a stand-in is the original from now on, and the stand-in is back."""
    own, ours = vars(instance)[MARK]
    present = getattr(instance, name)
    if present is not ours[name]:
        own.pop(name, None)
        if name in vars(instance) and present is not None:
            own[name] = present
        setattr(instance, name, ours[name])


def _state(instance: Any) -> Any:
    """What a copy of the instance has: all but stand-ins and their mark."""
    own, ours = vars(instance)[MARK]
    state = original(instance, STATE)()
    if not isinstance(state, dict):
        return state
    theirs = {name: value for name, value in state.items() if name not in ours or value is not ours[name]}
    theirs.pop(MARK)
    return {name: value for name, value in own.items() if name in state} | theirs
