"""A function of a library that is known here: what it computes, and its arguments."""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from kvbuffer_compile.integrations.functions.adapters import most_tokens
from kvbuffer_compile.integrations.functions.arguments import Arguments, Unserved, arguments, binder


@dataclass(frozen=True)
class Known:
    """compute: from a call's arguments by our names, what the function returns, or Unserved. serves: whether a call is
    one to compute."""

    compute: Callable[[dict[str, Any]], Any]
    arguments: Arguments
    serves: Callable[[dict[str, Any]], Unserved | None]

    def adapter(self, function: types.FunctionType) -> Callable[..., Any]:
        """What to trace instead of a function: with the defaults and the order of arguments that it states."""
        bind = binder(*self.arguments.as_stated_by(function))
        serves, compute = self.serves, self.compute

        def adapter(*args: Any, **kwargs: Any) -> Any:
            given = bind(*args, **kwargs)
            if isinstance(given, Unserved):
                return given
            why_not = serves(given)
            return compute(given) if why_not is None else why_not

        return adapter


def few_on_a_state(given: dict[str, Any]) -> Unserved | None:
    """No more tokens than a buffer has slots, on a state that exists."""
    state = given["initial_state"]
    first = state[0] if isinstance(state, tuple | list) else state
    if torch.is_grad_enabled():
        return Unserved("gradients may be needed")
    if first is None:
        return Unserved("there is no state yet: a prefill")
    if given["k"].shape[1] > most_tokens():
        return Unserved("more tokens than a buffer has slots: a prefill")
    return None


def few_or_on_a_cpu(given: dict[str, Any]) -> Unserved | None:
    """The same for Triton kernels; on a CPU any call, which they cannot serve. The number of tokens is asked first: it
    is what bounds the rows of a buffer."""
    why_not = few_on_a_state(given)
    served = given["k"].device.type == "cpu" and not torch.is_grad_enabled()
    return None if served else why_not


def known(
    compute: Callable[[dict[str, Any]], Any],
    text: str,
    serves: Callable[[dict[str, Any]], Unserved | None] = few_or_on_a_cpu,
) -> Known:
    """From the arguments' text form."""
    return Known(compute, arguments(text), serves)
