"""Functions with a code object of their own.

Dynamo keeps what it compiled on the code object, stops at `recompile_limit` graphs of one, and remembers by its name
which sizes changed. Functions that share their code, such as the decorated forward of every transformers model, share
all of that.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any


def afresh(fn: Callable[..., Any], name: str | None = None) -> Callable[..., Any]:
    """The same function on a copy of its code, of another name if one is given. What is no plain function stays."""
    if isinstance(fn, types.MethodType):
        return types.MethodType(afresh(fn.__func__, name), fn.__self__)
    if not isinstance(fn, types.FunctionType) or hasattr(fn, "_torchdynamo_orig_callable"):
        return fn
    code = fn.__code__.replace(co_name=name or fn.__code__.co_name)
    copied = types.FunctionType(code, fn.__globals__, fn.__name__, fn.__defaults__, fn.__closure__)
    copied.__kwdefaults__ = fn.__kwdefaults__
    return copied
