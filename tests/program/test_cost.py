"""The cost model: every number of the field comes out of one formula, and the formula out of running programs."""

from __future__ import annotations

from math import sqrt

import pytest
import sympy

from kvbuffer_compile.ir.program import Program
from kvbuffer_compile.ir.text import parse
from kvbuffer_compile.passes.choice import cost
from kvbuffer_compile.passes.choice.cost import K, L, T, V, b, n, s, w
from tests.support import programs
from tests.support.programs import GLA

B, H, r, d = sympy.symbols("B H r d", positive=True)


def gated_deltanet(keys: str = "B H r") -> Program:
    return programs.gated_deltanet("B H r", keys)


MAMBA2 = parse("""
    program over B H tokens 1
      input g: scalar(B H)
      input B_: key(B)
      input x: value(B H)
      input C: key(B)
      decay g
      update B_, x
      o = read C
      return o
""")
CHAINED = parse("""
    program over B tokens 1
      input k: key(B)
      input v: value(B)
      y = read k
      z = read y
      t = read z
      update k, v
      return t
""")
WRITE_ONLY = parse("""
    program over B tokens 1
      input k: key(B)
      input v: value(B)
      update k, v
      return
""")


def flush_length(program: Program, separate: bool = False, **widths: float) -> float:
    """L* with d = 128 and the given widths."""
    known = {K: 128, V: 128, T: 1} | {sympy.Symbol(k, positive=True): x for k, x in widths.items()}
    return float(cost.best_flush(cost.buffered(program, separate=separate)).subs(known))


@pytest.mark.parametrize(
    ("widths", "separate", "expected"),
    [
        ({"s": 4, "b": 2, "r": 1}, False, 16.0),  # float32 state, bf16 rows: the default of the serving engines
        ({"s": 2, "b": 2, "r": 1}, False, 11.3),  # bf16 state
        ({"s": 1, "b": 2, "r": 1}, False, 8.0),  # fp8 state
        ({"s": 4, "b": 2, "r": 2}, False, 18.5),  # two value heads share a key
        ({"s": 4, "b": 2, "r": 1}, True, 22.6),  # the flush as a launch of its own: 2 sqrt(d), KVBuffer
    ],
)
def test_flush_lengths_of_the_field(widths: dict[str, float], separate: bool, expected: float) -> None:
    program = gated_deltanet("B H")
    assert flush_length(program, separate, w=0, **widths) == pytest.approx(expected, abs=0.05)
    assert flush_length(program, separate, w=4, **widths) == pytest.approx(expected, rel=0.01)  # gates hardly matter


def test_one_formula() -> None:
    """L* = sqrt(s d / (b g)) with g = (1/r + 1)/2, and sqrt(2) more for a separate flush, as expressions."""
    square = {K: d, V: d, T: 1, w: 0}
    g = (1 / r + 1) / 2
    fused = cost.best_flush(cost.buffered(gated_deltanet("B H"))).subs(square)
    separate = cost.best_flush(cost.buffered(gated_deltanet("B H"), separate=True)).subs(square)
    assert sympy.simplify(fused**2 - s * d / (b * g)) == 0
    assert sympy.simplify(separate**2 - 2 * fused**2) == 0


def test_speedup_formula() -> None:
    g = (1 / r + 1) / 2
    expected = 2 / (1 + 1 / L + b * L * g / (s * d))
    found = cost.speedup(gated_deltanet("B H")).subs({K: d, V: d, T: 1, w: 0})
    assert sympy.simplify(found - expected) == 0


def test_buffer_only_break_even() -> None:
    """Rows of n tokens weigh as much as the state at n = K V / (K + V), counted in elements."""
    found = cost.break_even(gated_deltanet()).subs({w: 0, s: 1, b: 1})
    assert sympy.simplify(found - K * V / (K + V)) == 0
    only = cost.buffer_only(gated_deltanet())
    assert only.state_read == 0
    assert only.rows_read == cost.step(gated_deltanet()).rows_read


def test_bytes_of_a_recurrent_step() -> None:
    found = cost.recurrent(gated_deltanet())
    state = B * H * r * K * V * s
    assert (found.state_read, found.state_written) == (state, state)
    assert found.rows_read == found.rows_written == 0


def test_bytes_of_a_buffered_step() -> None:
    """One pass serves both reads; a slot holds k, u and the gate, k once per group."""
    found = cost.step(gated_deltanet("B H"))
    size = B * H * K * b + B * H * r * V * b + B * H * r * w
    assert sympy.expand(found.state_read - B * H * r * K * V * s) == 0
    assert found.state_written == 0
    assert sympy.expand(found.rows_read - n * size) == 0
    assert sympy.expand(found.rows_written - T * size) == 0


def test_the_mean_is_that_of_the_steps() -> None:
    """Add up a period by hand: 1, 2, ... L - 1 rows owed, and a step that folds L."""
    program, length = gated_deltanet(), 5
    row, ordinary = cost.slot(program).size, cost.step(program).map(lambda e: e.subs(T, 1))
    rows = sum(i * row for i in range(1, length)) + length * row
    state = B * H * r * K * V * s
    found = cost.buffered(program).map(lambda e: e.subs({T: 1, L: length}))
    assert sympy.simplify(found.rows_read - rows / length) == 0
    assert sympy.simplify(found.state_read + found.state_written - state * (1 + sympy.Rational(1, length))) == 0
    assert sympy.simplify(found.operands - ordinary.operands) == 0
    assert found.launches == 1


def test_a_separate_flush_costs_a_pass_and_a_launch() -> None:
    fused, separate = (cost.buffered(gated_deltanet(), separate=x) for x in (False, True))
    assert sympy.simplify(separate.state_read - fused.state_read - B * H * r * K * V * s * T / L) == 0
    assert sympy.simplify(separate.launches - 1 - T / L) == 0


def test_verified_drafts_share_one_pass() -> None:
    one, four = (cost.step(gated_deltanet()).map(lambda e, t=t: e.subs({T: t, n: 8})) for t in (1, 4))
    assert four.state_read == one.state_read
    assert sympy.simplify(four.rows_written - 4 * one.rows_written) == 0
    assert sympy.simplify(four.operations - 4 * one.operations) == 0
    assert (
        sympy.simplify(four.row_operations - 4 * one.row_operations).subs({H: 1, r: 1, B: 1, K: 8, V: 8}) > 0
    )  # triangle


def test_vector_decays_are_logged() -> None:
    with_key_gate = cost.slot(GLA).size
    assert sympy.expand(with_key_gate - B * H * (K * w + K * b + V * b)) == 0
    assert flush_length(GLA, s=4, b=2, w=4) == pytest.approx(sqrt(2 * 4 * 128 / (4 + 2 + 2)), rel=1e-6)


def test_shared_keys_are_counted_once() -> None:
    """Mamba-2: B varies along the batch only. A float32 state with bf16 rows then allows L near 22."""
    assert sympy.expand(cost.slot(MAMBA2).size - (B * K * b + B * H * V * b + B * H * w)) == 0
    assert flush_length(MAMBA2, s=4, b=2, w=4, H=64) == pytest.approx(sqrt(2 * 4 * 128 / 2), rel=0.03)


def test_rows_vary_along_the_sequences_even_where_values_do_not() -> None:
    retnet = parse("""
        program over B H tokens 1
          input g: scalar(H)
          input k: key(B H)
          input v: value(B H)
          decay g
          update k, v
          return
    """)
    assert sympy.expand(cost.slot(retnet).size - B * H * (w + K * b + V * b)) == 0
    assert sympy.expand(cost.slot(retnet, sequence=False).size - (H * w + B * H * (K * b + V * b))) == 0


def test_keys_that_depend_on_reads_cost_passes() -> None:
    state = B * K * V * s
    assert sympy.simplify(cost.step(CHAINED).state_read - 3 * state) == 0
    assert sympy.simplify(cost.recurrent(CHAINED).state_read - 3 * state) == 0


def test_an_update_that_needs_a_read_meets_the_state_twice() -> None:
    """Both reads of GDN are of what the state was, in one pass; the update waits for one of them."""
    gdn = programs.gated_deltanet()
    assert [cost.meetings(p) for p in (GLA, gdn, CHAINED)] == [1, 2, 3]
    assert cost.recurrent(gdn).passes == 1


def test_a_program_without_reads_reads_only_to_flush() -> None:
    found = cost.buffered(WRITE_ONLY)
    assert sympy.simplify(found.state_read - B * K * V * s * T / L) == 0
    assert sympy.simplify(found.rows_read - cost.slot(WRITE_ONLY).size * T) == 0  # each row once, when it is folded


def test_widths_by_value() -> None:
    program = gated_deltanet()
    assert [v.name for v in program.logged] == ["g", "k", "u"]
    assert cost.slot(program).gates == (True, False, False)
    size = cost.slot(program, True, (4, 2, 8)).size
    assert sympy.expand(size - B * H * r * (4 + 2 * K + 8 * V)) == 0


def test_operations_of_a_recurrent_step() -> None:
    """Decay 1, two reads 2 each, update 2 operations an element; two maps over values."""
    found = cost.recurrent(gated_deltanet()).operations
    assert sympy.expand(found - T * B * H * r * (7 * K * V + 2 * V)) == 0


def test_bytes_of_a_step_that_reads_a_shadow() -> None:
    """Per element of a float32 state, L = 16, a float16 shadow: 15 of 16 steps read it, one reads and writes both."""
    program = gated_deltanet()
    cells = cost.lanes_product(program.lanes) * cost.K * cost.V
    known = {cost.s: 4, cost.h: 2, cost.L: 16, cost.T: 1}
    shadow, plain = (cost.buffered(program, shadow=x) for x in (True, False))

    def state(found: cost.Cost) -> float:
        return float(sympy.simplify((found.state_read + found.state_written).subs(known) / cells))

    assert (state(shadow), state(plain)) == (2 + 8 / 16, 4 + 4 / 16)
    assert shadow.rows_read == plain.rows_read
    best = [cost.best_flush(x).subs({cost.s: 4, cost.h: 2, cost.T: 1}) for x in (shadow, plain)]
    assert sympy.simplify(best[0] / best[1]) == sympy.sqrt(2), "a flush costs 2 s instead of s"
