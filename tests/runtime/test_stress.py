"""Never stale, never lost: a random machine does to states what users do, beside ordinary tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

import pytest
import torch
from torch._dynamo.utils import counters

from kvbuffer_compile.codegen import build
from tests.stress import (
    threads,  # noqa: F401  (they register the rules)
)
from tests.stress.machine import RULES, Compiled, fails, play
from tests.stress.mutants import MUTANTS

TARGETS = ["aten", pytest.param("cpp", marks=pytest.mark.skipif(build.compiler() is None, reason="no compiler"))]
EXAMPLES = 200


@pytest.fixture(autouse=True)
def roomy() -> Iterator[None]:
    """How many graphs there are is asked elsewhere."""
    with torch._dynamo.config.patch(recompile_limit=256, accumulated_recompile_limit=2048):
        yield


def run(target: str, seeds: range) -> Counter[str]:
    compiled, counts = Compiled(target), Counter[str]()
    counters["graph_break"].clear()
    for seed in seeds:
        counts += play(compiled, seed)
    assert not counters["graph_break"], "every step is one graph"
    return counts


@pytest.mark.parametrize("target", TARGETS)
def test_whatever_happens_no_token_is_stale_or_lost(target: str) -> None:
    counts = run(target, range(EXAMPLES))
    assert counts["reads of owed rows"] > EXAMPLES, counts
    for what in ("tokens taken back", "drafts rejected", "trees accepted", "interrupts"):
        assert counts[what] > EXAMPLES / 20, counts
    assert not [name for name, (weight, _) in RULES.items() if weight >= 1 and not counts[name]]


@pytest.mark.parametrize("seed", [10320])
def test_examples_that_failed_once(seed: int) -> None:
    """10320: a first step is interrupted when its state is guarded, on memory that another library holds."""
    run("aten", range(seed, seed + 1))


@pytest.mark.nightly
@pytest.mark.parametrize("part", range(10))
@pytest.mark.parametrize("target", TARGETS)
def test_many_examples(target: str, part: int) -> None:
    run(target, range(1000 * (part + 1), 1000 * (part + 2)))


TIMING = [name for name in RULES if "thread" in name or "interrupt" in name]


def caught(compiled: Compiled, apply: Callable[[pytest.MonkeyPatch], None]) -> int | None:
    """The first example that fails with a mutant and not without it."""
    for seed in range(EXAMPLES):
        with pytest.MonkeyPatch.context() as patch:
            apply(patch)
            wrong = fails(compiled, seed, (), TIMING)
        if wrong and not fails(compiled, seed, (), TIMING):
            return seed
    return None


def test_broken_runtimes_are_noticed() -> None:
    compiled = Compiled("cpp" if build.compiler() else "aten")
    found = {name: caught(compiled, apply) for name, apply in MUTANTS.items()}
    assert None not in found.values(), found
