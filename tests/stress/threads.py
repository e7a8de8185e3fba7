"""Rules of the stress machine with something going on at the same time: other threads, interrupts."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch._guards import CompileContext

import kvbuffer_compile
from kvbuffer_compile import codegen, passes
from tests.stress.graphs import operands
from tests.stress.machine import Place, World, rule
from tests.stress.rules import step
from tests.stress.ways import READS
from tests.support.equality import equal

# Interrupts come in the package.
SOURCES = tuple(str(Path(m.__file__).parent) for m in (kvbuffer_compile, passes, codegen) if m.__file__)


def _beside(main: Callable[[], Any], other: Callable[[], Any]) -> None:
    """Both at once, switching as often as can be; what goes wrong in either is raised."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            with torch.no_grad():
                other()
        except BaseException as e:
            raised.append(e)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    thread = threading.Thread(target=run)
    thread.start()
    try:
        main()
    finally:
        thread.join()
        sys.setswitchinterval(before)
    if raised:
        raise raised[0]


@rule("a thread reads what another steps", 2)
def read_beside(world: World, place: Place, dice: random.Random) -> None:
    """What it reads was true at some moment, and reading harms nothing."""
    if place.kind not in ("own", "zero", "cache"):
        return
    graph, seen, truths = world.compiled.steps["decode"], [], [place.twin.clone()]
    inputs = [operands(graph, len(place.twin), world.generator(dice)) for _ in range(4)]
    for x in inputs:
        graph.plain(place.twin, *x)
        truths.append(place.twin.clone())
    _beside(
        lambda: [graph.compiled(place.real, *x) for x in inputs],
        lambda: seen.extend(place.real.clone() for _ in range(3)),
    )
    place.history.clear()
    for x in seen:
        assert any(equal(x, truth) for truth in truths), "a thread read what was never true"


@rule("two threads step two states", 2)
def step_beside(world: World, place: Place, dice: random.Random) -> None:
    others = [p for p in world.places if p is not place and "delta" in p.steps]
    if "delta" not in place.steps or not others:
        return
    other, graph = dice.choice(others), world.compiled.steps["decode"]
    given = [[operands(graph, len(p.twin), world.generator(dice)) for _ in range(4)] for p in (place, other)]
    _beside(
        lambda: [step(world, place, "decode", x) for x in given[0]],
        lambda: [step(world, other, "decode", x) for x in given[1]],
    )


# -------------------------------------------------------------------------------------------------- interrupts


class _Interrupt:
    """Raises KeyboardInterrupt at the n-th place in the package where Python would: a function of ours begins, or
    something that it called in C has returned. (At a line is no such place: between `with` and its `__exit__` Python
    does not look for signals.)"""

    def __init__(self, n: int) -> None:
        self.left = n

    def __enter__(self) -> _Interrupt:
        sys.setprofile(self.event)
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> bool:
        sys.setprofile(None)
        # Python 3.11 makes a TypeError of what a profiler raises while generators are running.
        lost = kind is TypeError and str(error[0]) == "'traceback' object is not callable"
        return kind is KeyboardInterrupt or lost

    def event(self, frame: FrameType, event: str, arg: Any) -> None:
        if CompileContext.try_get() is not None:  # Dynamo turns what is raised while it works into errors of its own
            return
        if event in ("call", "c_return") and frame.f_code.co_filename.startswith(SOURCES):
            self.left -= 1
            if self.left == 0:
                sys.setprofile(None)
                raise KeyboardInterrupt


@rule("interrupt reads", 1.5)
def interrupt_reads(world: World, place: Place, dice: random.Random) -> None:
    """One read after another, each interrupted some calls later than the one before, until one gets through."""
    stride = dice.randint(1, 3)
    n = dice.randint(1, stride)
    world.note(f"at call {n} and every {stride} calls later")
    while True:
        with _Interrupt(n) as interrupt:
            READS["clone"](place.real)
        if interrupt.left > 0:
            break
        world.counts["interrupts"] += 1
        n += stride
    place.history.clear()
    world.read(place, "clone", torch.clone)


@rule("interrupt a step", 3)
def interrupt_step(world: World, place: Place, dice: random.Random) -> None:
    """It has been done or it has not, for all sequences."""
    if "decode" not in place.steps or place.inference:
        return
    graph, n = world.compiled.steps["decode"], dice.randint(1, 250)
    inputs = operands(graph, len(place.twin), world.generator(dice))
    world.note(f"at call {n}")
    with _Interrupt(n) as interrupt:
        graph.compiled(place.real, *inputs)
    done: Tensor = place.twin.clone()
    graph.plain(done, *inputs)
    got = place.real.clone()
    world.counts["interrupts"] += interrupt.left == 0
    assert equal(got, done) or (interrupt.left == 0 and equal(got, place.twin)), "a step was done by halves"
    place.twin.copy_(got)
    place.history.clear()
