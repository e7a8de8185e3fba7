"""What a state's values are while it is walked: versions of the state, linear images of them, and reads."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch.fx import Node

from kvbuffer_compile.passes.algebra.terms import Refusal, Term
from kvbuffer_compile.passes.reading.forms import WIDEST
from kvbuffer_compile.passes.reading.labels import Dim, Labels


@dataclass(eq=False)
class Version:
    """terms: (parent, factors), one on an ordinary chain, more where branches meet; addends: products.

    plain: nothing of the state is in it, only the addends. base: the latest version that every path to this one goes
    through; depth: its number of bases.
    """

    node: Node
    terms: tuple[tuple[Version, Term], ...] = ()
    addends: tuple[Term, ...] = ()
    plain: bool = False
    base: Version | None = field(init=False, default=None)
    depth: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        for parent, _ in self.terms:
            self.base = parent if self.base is None else common(self.base, parent)
        if self.base is not None:
            self.depth = self.base.depth + 1


def common(a: Version, b: Version) -> Version:
    """The nearest version that both go back to."""
    while a is not b:
        if a.depth < b.depth:
            a, b = b, a
        assert a.base is not None
        a = a.base
    return a


@dataclass(frozen=True)
class Lin:
    """version * product(factors), with labelled dims."""

    version: Version
    labels: Labels
    factors: Term = ()


@dataclass(frozen=True)
class ReadOut:
    """The sum over `contracted` of version * product(factors)."""

    node: Node
    version: Version
    factors: Term
    contracted: Dim
    labels: Labels


def relative(version: Version, base: Version) -> tuple[list[Term], list[Term]]:
    """version = sum(decays) * base + sum(addends)."""
    if version is base:
        return [()], []
    decays: list[Term] = []
    addends = list(version.addends)
    for parent, factors in version.terms:
        above, added = relative(parent, base)
        decays += [(*t, *factors) for t in above]
        addends += [(*t, *factors) for t in added]
    if len(decays) + len(addends) > WIDEST:
        raise Refusal(version.node, "full-rank", f"one step of the state is a sum of more than {WIDEST} terms")
    return decays, addends


def chain(after: Version) -> list[Version]:
    """From the state to its next version."""
    line = [after]
    while line[-1].base is not None:
        line.append(line[-1].base)
    return line[::-1]
