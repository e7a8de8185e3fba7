"""What known functions of other libraries are called with: their arguments as text, checked against a call.

    q k v g>gk beta scale=None chunk_size=64 ** A_log=None

Names in the order of the function, with their defaults; `g>gk`: what the library calls g is gk to the recurrences.
Behind `**` stand names that the function takes out of its keyword arguments, and `*` if it ignores all others. Defaults
that the function itself states go before those written here, so that a call of another version of the library means
what it means there.
"""

from __future__ import annotations

import ast
import inspect
import re
import types
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

# Arguments that say how a function computes, not what.
HARMLESS = frozenset(
    "cu_seqlens_cpu chunk_indices chunk_size safe_gate disable_recompute checkpoint_level use_graph max_num_seqs "
    "solve_tril_precision".split()
)
# Arguments of which only the default is served, and what any other value asks for.
AT_DEFAULT = {
    "cu_seqlens": "sequences of different lengths packed into one",
    "seq_idx": "sequences of different lengths packed into one",
    "return_varlen_states": "sequences of different lengths packed into one",
    "reverse": "a recurrence from the last token to the first",
    "cp_context": "a sequence that is spread over several devices",
    "return_intermediate_states": "the states between chunks",
    "state_batch_indices": "a pool of states",
    "state_dtype": "a state of another dtype",
}
CONSTANTS = {"(0,inf)": (0.0, float("inf")), "float32": torch.float32}  # defaults that are no literals


@dataclass(frozen=True)
class Unserved:
    """Why a call is left to the function that it names."""

    reason: str


@dataclass(frozen=True)
class Arguments:
    """A function's arguments. ours: their names to the recurrences. hidden: those behind `**`. lenient: others may
    follow, which change nothing, unless the function itself names them, `stated`."""

    ours: dict[str, str]
    defaults: dict[str, Any]
    hidden: frozenset[str]
    lenient: bool = False
    stated: frozenset[str] = frozenset()

    def as_stated_by(self, function: types.FunctionType) -> tuple[Arguments, tuple[str, ...]]:
        """The same with the defaults that a function states, and the order of its positional arguments."""
        parameters = inspect.signature(function).parameters.values()
        named = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        stated = {p.name: p.default for p in named if p.name in self.ours and p.default is not p.empty}
        order = tuple(p.name for p in named if p.kind is not p.KEYWORD_ONLY)
        everything = frozenset(p.name for p in named)
        return replace(self, defaults={**self.defaults, **stated}, stated=everything), order


def binder(found: Arguments, order: tuple[str, ...]) -> Callable[..., dict[str, Any] | Unserved]:
    """A function from the arguments of a call to a dict by our names, defaults filled in. order: the positional ones.

    A closure over plain values, which Dynamo traces.
    """
    ours, defaults, lenient, stated = found.ours, found.defaults, found.lenient, found.stated
    used = [(name, own) for name, own in ours.items() if name not in HARMLESS]
    fixed = [(name, defaults.get(name), why) for name, why in AT_DEFAULT.items() if name in ours]

    def bind(*args: Any, **kwargs: Any) -> dict[str, Any] | Unserved:
        if len(args) > len(order):
            return Unserved("more arguments than are known")
        given = {**dict(zip(order, args, strict=False)), **kwargs}
        for name in given:
            if name not in ours and (name in stated or not lenient):
                return Unserved(f"argument {name}, which is not known")
        values = {**defaults, **given}
        for name in ours:
            if name not in values:
                return Unserved(f"argument {name} is missing")
        for name, default, why in fixed:
            if not _same(values[name], default):
                return Unserved(f"argument {name}: {why}")
        return {own: values[name] for name, own in used}

    return bind


def _same(value: Any, default: Any) -> bool:
    return value is default or (isinstance(value, bool | int | float | str) and value == default)


def arguments(text: str) -> Arguments:
    """Arguments from their text form. ValueError for a default that is no literal."""
    ours: dict[str, str] = {}
    defaults: dict[str, Any] = {}
    shown, _, behind = text.partition("**")
    hidden = behind.split()
    for word in [*shown.split(), *(word for word in hidden if word != "*")]:
        names, given, default = word.partition("=")
        theirs, _, own = names.partition(">")
        ours[theirs] = own or theirs
        if given:
            defaults[theirs] = CONSTANTS[default] if default in CONSTANTS else ast.literal_eval(default)
    names_behind = frozenset(re.split("[>=]", word)[0] for word in hidden if word != "*")
    return Arguments(ours, defaults, names_behind, "*" in hidden)
