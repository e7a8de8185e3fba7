"""The algebra, proved exactly: a buffered memory is a dense one, whatever the program; integers, no tolerance."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvbuffer_compile.ir.memory import Buffered, Dense, Fade, Row, Zero
from kvbuffer_compile.ir.program import Program, run
from tests.support.programs import NAMED, random_programs

K, V = 3, 4
LANE_SIZES = {"b": 2, "h": 3, "g": 2}
TAILS = {"scalar": (), "key": (K,), "value": (V,)}


def integers(shape, generator):
    return torch.randint(-3, 4, shape, generator=generator)


def draw_inputs(program: Program, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Small integers, size 1 along the lanes where a value does not vary."""
    return {
        v.name: integers([LANE_SIZES[n] if n in v.lanes else 1 for n in program.lanes] + [*TAILS[v.kind]], generator)
        for v in program.inputs
    }


def lane_sizes(program: Program) -> list[int]:
    return [LANE_SIZES[n] for n in program.lanes]


def compare(program: Program, memory_class: type[Buffered], seed: int, steps: int = 4) -> bool:
    """Run both memories for some steps with a flush in between; whether all values and the states are equal."""
    generator = torch.Generator().manual_seed(seed)
    state = integers((*lane_sizes(program), K, V), generator)
    dense, buffered = Dense(state), memory_class(Dense(state), (K, V))
    for t in range(steps):
        inputs = draw_inputs(program, generator)
        want, got = run(program, dense, inputs), run(program, buffered, inputs)
        if any(not torch.equal(*torch.broadcast_tensors(got[v.name], want[v.name])) for v in program.outputs):
            return False
        flushed = buffered.flushed(buffered.base.state)
        if not torch.equal(flushed, dense.state):
            return False
        if t == steps // 2:
            buffered = memory_class(Dense(flushed), (K, V))
    return True


@settings(deadline=None, max_examples=150)
@given(program=random_programs(events=8), seed=st.integers(0, 2**20))
def test_random_programs_are_equal_on_both_memories(program, seed):
    assert compare(program, Buffered, seed)


@pytest.mark.parametrize("name", NAMED)
def test_named_recurrences_are_equal_on_both_memories(name):
    program = NAMED[name]
    integer_ops = all(op.fn.split(".")[1] in ("sub", "mul", "add", "sum") for op in program.ops if hasattr(op, "fn"))
    if integer_ops:
        assert compare(program, Buffered, seed=1)
    else:  # exp has no integers: the float64 form of the same comparison
        generator = torch.Generator().manual_seed(1)
        state = torch.randn(*lane_sizes(program), K, V, dtype=torch.float64, generator=generator)
        dense, buffered = Dense(state), Buffered(Dense(state), (K, V))
        for _ in range(4):
            inputs = {n: 0.25 * x.double() for n, x in draw_inputs(program, generator).items()}
            want, got = run(program, dense, inputs), run(program, buffered, inputs)
            for v in program.outputs:
                torch.testing.assert_close(got[v.name].expand_as(want[v.name]), want[v.name], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(buffered.flushed(state), dense.state, rtol=1e-12, atol=1e-12)


# ------------------------------------------------------------------------------ the three lemmas, op by op


def some_log(draw: st.DrawFn, generator: torch.Generator) -> list[Fade | Row]:
    """A log of up to six decays and updates."""
    log: list[Fade | Row] = []
    for kind in draw(st.lists(st.sampled_from(["scalar", "key", "value", "row"]), max_size=6)):
        if kind == "row":
            log.append(Row(integers((2, K), generator), integers((2, V), generator)))
        else:
            log.append(Fade(integers((2, *TAILS[kind]), generator), kind))
    return log


@settings(deadline=None, max_examples=100)
@given(data=st.data(), kind=st.sampled_from(["scalar", "key", "value"]), seed=st.integers(0, 2**20))
def test_lemma_decay(data, kind, seed):
    generator = torch.Generator().manual_seed(seed)
    base, factor = integers((2, K, V), generator), integers((2, *TAILS[kind]), generator)
    buffered = Buffered(Dense(base), (K, V), some_log(data.draw, generator))
    dense = Dense(buffered.flushed(base))
    dense.decay(factor, kind)
    buffered.decay(factor, kind)
    assert torch.equal(buffered.flushed(base), dense.state)


@settings(deadline=None, max_examples=100)
@given(data=st.data(), kind=st.sampled_from(["key", "value"]), seed=st.integers(0, 2**20))
def test_lemma_read(data, kind, seed):
    generator = torch.Generator().manual_seed(seed)
    base, x = integers((2, K, V), generator), integers((2, *TAILS[kind]), generator)
    buffered = Buffered(Dense(base), (K, V), some_log(data.draw, generator))
    assert torch.equal(buffered.read(x, kind), Dense(buffered.flushed(base)).read(x, kind))


@settings(deadline=None, max_examples=100)
@given(
    data=st.data(),
    kinds=st.sampled_from([("key", "value"), ("scalar", "value"), ("key", "scalar"), ("scalar", "scalar")]),
    seed=st.integers(0, 2**20),
)
def test_lemma_update(data, kinds, seed):
    generator = torch.Generator().manual_seed(seed)
    base = integers((2, K, V), generator)
    left, right = (integers((2, *TAILS[kind]), generator) for kind in kinds)
    buffered = Buffered(Dense(base), (K, V), some_log(data.draw, generator))
    dense = Dense(buffered.flushed(base))
    dense.update(left, right, kinds)
    buffered.update(left, right, kinds)
    assert torch.equal(buffered.flushed(base), dense.state)


def test_a_state_that_holds_nothing_reads_as_zero():
    generator = torch.Generator().manual_seed(0)
    program = NAMED["gdn"]
    empty, zero = Buffered(Zero((K, V)), (K, V)), Dense(torch.zeros(*lane_sizes(program), K, V, dtype=torch.int64))
    for _ in range(3):
        inputs = draw_inputs(program, generator)
        want, got = run(program, zero, inputs), run(program, empty, inputs)
        assert torch.equal(got["o"], want["o"])


# ------------------------------------------------------------------------- mutants that must not survive


class RowsNotDecayed(Buffered):
    """Forgets that a decay also reaches the rows already owed."""

    def decay(self, factor, kind):
        self.log.insert(0, Fade(factor, kind))


class FlushWithoutScale(Buffered):
    """Folds the rows into an undecayed base."""

    def flushed(self, base):
        decayed = super().flushed(base) - super().flushed(torch.zeros_like(base))
        return super().flushed(base) - decayed + base


class ForgetsFreshRow(Buffered):
    """A read that does not see the newest update."""

    def read(self, x, kind):
        newest = max((i for i, entry in enumerate(self.log) if isinstance(entry, Row)), default=None)
        log = [entry for i, entry in enumerate(self.log) if i != newest]
        return Buffered(self.base, self.sizes, log).read(x, kind)


class ReadsOverTheWrongDecay(Buffered):
    """Applies a decay to rows that are younger than it."""

    def read(self, x, kind):
        fades = [entry for entry in self.log if isinstance(entry, Fade)]
        rows = [entry for entry in self.log if isinstance(entry, Row)]
        return Buffered(self.base, self.sizes, [*rows, *fades]).read(x, kind)


@pytest.mark.parametrize("mutant", [RowsNotDecayed, FlushWithoutScale, ForgetsFreshRow, ReadsOverTheWrongDecay])
@pytest.mark.parametrize("name", ["gdn", "kda", "gla", "oja", "deltaproduct2"])
def test_mutants_are_caught(mutant, name):
    assert compare(NAMED[name], Buffered, seed=3)
    assert not compare(NAMED[name], mutant, seed=3)
