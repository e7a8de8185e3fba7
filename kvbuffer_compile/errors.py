"""The three ways a rewrite can end other than well (design: a declined graph is a value, not an exception)."""

from __future__ import annotations

from dataclasses import dataclass

from torch._dynamo.exc import ShortenTraceback


@dataclass(frozen=True)
class Declined:
    """Why one state, or one graph, was left as it is.

    node: the state, by its user's name where that is known ("" for a whole graph). Inside the passes the graph node at
    which the rule failed.
    rule: short identifier of the rule, stable enough to test for, e.g. "nonlinear".
    reason: one sentence a model author can act on.
    source: "file:line" of the model code that made the node, "" when unknown.
    """

    node: str
    rule: str
    reason: str
    source: str = ""

    def __str__(self) -> str:
        where = f" ({self.source})" if self.source else ""
        return f"{self.node or 'a graph'}: {self.rule}: {self.reason}{where}"


class _ForTheUser(ShortenTraceback):
    """Dynamo wraps what a backend raises in an error of its own; these reach the caller as they are."""

    def __init__(self, message: str) -> None:
        super().__init__(message, first_useful_frame=None)


class DeclinedError(_ForTheUser):
    """Raised instead of returning a Declined when the user asked for `on_decline="raise"`."""


class OptionError(_ForTheUser, ValueError):
    """An option that is unknown, has a value that is not allowed, or cannot be obeyed on this device."""


class IRError(AssertionError):
    """A Program that breaks the rules of the IR: a bug of ours. Carries the program text."""


class EmitError(RuntimeError):
    """A code generator could not print or build a Program: a bug of ours, or a missing tool. Carries the text."""


class StateError(RuntimeError):
    """A state cannot be served without risking a wrong number: says which access and what to do instead."""
