"""A machine that does at random what users do to states, beside ordinary tensors to which the same is done.

An example is a seed. Each of its operations draws from a generator of its own, so that one can be left out and the
others stay as they were. `python -m tests.stress.machine SEED TARGET [WITHOUT ...]` plays one again, without rules,
ways or kinds of states of these names, and leaves out what does not matter to its failure.
"""

from __future__ import annotations

import random
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tests.stress import graphs
from tests.support.equality import equal
from tests.support.owing import owed

OPERATIONS = 18  # of an example
MOST = 2.0**22  # beyond that float32 would round sums of whole numbers


@dataclass(eq=False)
class Held:
    """Something that lies in the memory of a state, and its twin."""

    name: str
    real: Any
    twin: Any


@dataclass(eq=False)
class Place:
    """A state and its twin, an ordinary tensor.

    steps: names of the graphs that may step it. holder: what contains it, if anything. history: the twin before each
    of the tokens that nothing but steps have followed. exported: its memory was handed out at some time, so that
    the runtime may refuse for ever to owe anything there.
    """

    kind: str
    real: Tensor
    twin: Tensor
    steps: tuple[str, ...]
    holder: Any = None
    held: list[Held] = field(default_factory=list)
    history: list[Tensor] = field(default_factory=list)
    tokens: int = 0
    inference: bool = False
    exported: bool = False

    def each(self, do: Callable[[Tensor], Any]) -> tuple[Any, Any]:
        """The same done to both."""
        return do(self.real), do(self.twin)


class Compiled:
    """Everything that is compiled once."""

    def __init__(self, target: str) -> None:
        self.target = target
        self.steps = graphs.steps(target)
        self.readers = graphs.readers()
        self.writers = graphs.writers()


class World:
    """One example: the states there are, what was done, and how often something worth counting happened."""

    def __init__(self, compiled: Compiled, seed: int, without: Iterable[str] = ()) -> None:
        self.compiled = compiled
        self.seed = seed
        self.without = frozenset(without)
        self.places: list[Place] = []
        self.trace: list[str] = []
        self.counts: Counter[str] = Counter()

    def generator(self, dice: random.Random) -> torch.Generator:
        return torch.Generator().manual_seed(dice.getrandbits(40))

    def draw(self, dice: random.Random) -> Place:
        """A new state of some kind."""
        from tests.stress import places

        return places.draw(dice, self.generator(dice), self.without)

    def note(self, text: str) -> None:
        """What the operation that is going on does, for the trace; also what is counted."""
        self.trace[-1] += f" | {text}"

    def same(self, got: Any, want: Any, what: str) -> None:
        assert equal(got, want), f"{what} differs{_where(got, want)}"

    def read(self, place: Place, name: str, read: Callable[[Tensor], Any]) -> None:
        """Compare what a way of reading gives."""
        self.counts["reads of owed rows"] += owed(place.real) > 0
        self.note(f"{name} of {place.kind}")
        self.same(*place.each(read), f"{name} of {place.kind}")
        self.touched(place)

    def touched(self, place: Place) -> None:
        """Somebody has looked at a state or changed it: what was owed before cannot be taken back."""
        place.history.clear()
        assert float(place.twin.abs().max()) < MOST, "the example left the numbers that are exact"


def _where(got: Any, want: Any) -> str:
    if not isinstance(got, Tensor) or not isinstance(want, Tensor) or got.shape != want.shape:
        return ""
    wrong = (got != want).nonzero().tolist()
    return f" at {len(wrong)} of {got.numel()} elements, first {wrong[0]}: {got[*wrong[0]]}, not {want[*wrong[0]]}"


Rule = Callable[[World, Place, random.Random], None]
RULES: dict[str, tuple[float, Rule]] = {}


def rule(name: str, weight: float) -> Callable[[Rule], Rule]:
    """Register something that is done to a place, with how often it is drawn."""

    def register(do: Rule) -> Rule:
        RULES[name] = weight, do
        return do

    return register


def play(compiled: Compiled, seed: int, skipped: Iterable[int] = (), without: Iterable[str] = ()) -> Counter[str]:
    """Run an example; AssertionError with its trace when anything is stale or lost. Returns what was counted."""
    world = World(compiled, seed, without)
    try:
        with torch.no_grad():
            dice = random.Random(f"{seed}")
            world.trace.append("begin")
            world.places = [world.draw(dice) for _ in range(dice.randint(1, 3))]
            for i in sorted(set(range(OPERATIONS)) - set(skipped)):
                operate(world, i)
            finish(world)
    except Exception as e:
        lines = "\n".join(f"  {line}" for line in world.trace)
        told = f"{type(e).__name__}: {e}\nseed {seed}, target {compiled.target}, operations:\n{lines}"
        raise AssertionError(told) from e
    return world.counts


def operate(world: World, i: int) -> None:
    from tests.stress import rules

    dice = random.Random(f"{world.seed} {i}")
    names = [name for name in RULES if name not in world.without]
    (name,) = dice.choices(names, [RULES[n][0] for n in names])
    world.trace.append(f"{i}: {name}")
    if not world.places:
        world.places.append(world.draw(dice))
    place = dice.choice(world.places)
    world.note(place.kind)
    RULES[name][1](world, place, dice)
    world.counts[name] += 1
    if dice.random() < 0.4 and world.places:
        rules.read_somehow(world, dice.choice(world.places), dice)


def finish(world: World) -> None:
    """At the end everything is looked at."""
    world.trace.append("end")
    for place in world.places:
        for held in place.held:
            world.same(held.real, held.twin, f"{held.name} of {place.kind}, held")
        world.read(place, "clone", torch.clone)


# -------------------------------------------------------------------------------------------------- replay


def fails(compiled: Compiled, seed: int, skipped: Iterable[int], without: Iterable[str]) -> str:
    """The failure's text, or nothing."""
    try:
        play(compiled, seed, skipped, without)
    except AssertionError as e:
        return str(e)
    return ""


def shrink(compiled: Compiled, seed: int, without: Iterable[str] = ()) -> str:
    """The text of a failing example without the operations that can be left out."""
    skipped: set[int] = set()
    text = fails(compiled, seed, skipped, without)
    for i in reversed(range(OPERATIONS if text else 0)):
        if shorter := fails(compiled, seed, skipped | {i}, without):
            skipped, text = skipped | {i}, shorter
    return text


if __name__ == "__main__":
    from tests.stress import (
        machine,  # the module with the rules, not this copy of it
        threads,  # noqa: F401
    )

    print(machine.shrink(machine.Compiled(sys.argv[2]), int(sys.argv[1]), sys.argv[3:]) or "passes")
