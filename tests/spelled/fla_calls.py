"""Calls of functions of flash-linear-attention: arguments that make sense, for functions and tests.

A call is a function's name, and its arguments as words: `q:k` is an argument q with a number for each key channel.
Values are drawn by kind, with decays that keep most of a state for dozens of tokens.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, normalize

B, H, K, V, M = 2, 2, 16, 16, 16
SIZES = {"k": (K,), "v": (V,), "m": (M,), "s": (), "kv": (K, V)}


@dataclass(frozen=True)
class Call:
    """One way to call a function. words: its tensors by name; fixed: everything else; states: shapes of what the
    arguments in `keeps` hold between calls, [heads, ...] each."""

    function: str
    words: str
    fixed: dict[str, Any] = field(default_factory=dict)
    weights: str = ""  # arguments that stay the same from call to call
    states: tuple[tuple[int, ...], ...] = ((H, K, V),)
    keeps: tuple[str, ...] = ("initial_state",)
    module: str = ""  # fla.ops, unless it says another
    tokens: int = 1  # rows of k, v and beta for each token

    def look_up(self) -> Callable[..., Any]:
        return getattr(importlib.import_module(self.module or "fla.ops"), self.function)


def draw(kind: str, tokens: int, g: torch.Generator, heads: int = H) -> Tensor:
    """kind: a size (k, v, m, s), after what the values are: unit-, gate-, rate-."""
    what, _, size = kind.rpartition("-")
    shape = (B, tokens, heads, *SIZES[size])
    x = torch.randn(shape, generator=g)
    match what:
        case "unit":
            return normalize(x, dim=-1)
        case "gate":
            return logsigmoid(x + 3.0)
        case "rate":
            return torch.sigmoid(x)
    return x
