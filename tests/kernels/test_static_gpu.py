"""The static model of GPU kernels: what main kernels are made of is pinned, and the model's parts do what they say."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from benchmarks.static_gpu import pins
from benchmarks.static_gpu.branches import Branches, Step
from benchmarks.static_gpu.cases import Case
from benchmarks.static_gpu.disassembly import parse
from benchmarks.static_gpu.machine import Machine
from benchmarks.static_gpu.multiprocessor import Multiprocessor
from benchmarks.static_gpu.pointers import follow
from benchmarks.static_gpu.trace import trace
from benchmarks.static_gpu.traffic import Traffic
from tests.kernels.test_triton import elsewhere  # noqa: F401


@pytest.mark.parametrize("case", pins.PINNED, ids=lambda c: "-".join(c.names))
def test_kernels_are_made_of_what_they_were(case: Case, elsewhere) -> None:  # noqa: F811
    """Instructions of a warp, bytes of the state, registers and spills, from the machine code for an H100."""
    try:
        said = elsewhere.submit(pins.complaints, case).result()
    except FileNotFoundError as error:
        pytest.skip(f"this build of Triton bundles no {error.filename}")
    assert not said, f"{'; '.join(said)}. If that is meant: {pins.COMMAND}"


# A loop that reads a tensor in three rounds of 512 bytes, then a store under a condition. Two instructions a line.
TEXT = """
def step(a, b):
    for n in range(3):
        load(a)
    if flush:
        store(b)
"""
CODE = """
        //## File "/x/kernel.py", line 4
        /*0000*/                   IMAD.WIDE R2, R1, 0x4, c[0x0][0x210] ;   /* 0x0 */
                                                                            /* 0x000fe40000000000 */
.L_x_1:
        //## File "/x/kernel.py", line 4
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;         /* 0x0 */
                                                                            /* 0x000e240000000000 */
        /*0020*/                   FADD R8, R4, R5 ;                        /* 0x0 */
                                                                            /* 0x001fe40000000000 */
        /*0030*/              @!P0 BRA `(.L_x_1) ;                          /* 0x0 */
                                                                            /* 0x000fea0000000000 */
        //## File "/x/kernel.py", line 6
        /*0040*/                   IMAD.WIDE R2, R1, 0x4, c[0x0][0x218] ;   /* 0x0 */
                                                                            /* 0x000fe40000000000 */
        /*0050*/                   STG.E desc[UR4][R2.64], R8 ;             /* 0x0 */
                                                                            /* 0x000fe40000000000 */
.L_x_2:
        //## File "/x/kernel.py", line 4
        /*0060*/                   EXIT ;                                   /* 0x0 */
                                                                            /* 0x000fea0000000000 */
"""


def traced(flush: bool):
    code = parse(CODE, "/elsewhere/kernel.py")
    follow(code, {0x210: "a", 0x218: "b"})
    return trace(code, Branches(TEXT), Step(8, 16, flush, 1, {}))


def test_a_trace_goes_round_loops_and_leaves_out_what_does_not_run():
    steady = Counter(i.base for i in traced(flush=False))
    assert steady == {"IMAD": 1, "LDG": 3, "FADD": 3, "BRA": 3, "EXIT": 1}
    assert Counter(i.base for i in traced(flush=True)) == {**steady, "IMAD": 2, "STG": 1}


def test_loads_and_stores_know_their_tensor():
    assert [(i.base, i.tensor) for i in traced(flush=True) if i.tensor] == [("LDG", "a")] * 3 + [("STG", "b")]


def test_a_warp_waits_for_the_scoreboard_of_its_load():
    """Three loads, each used before the next one: three latencies, and not three when nothing is far."""

    def seconds(far: bool) -> float:
        m = Machine()
        met = {"a": Traffic(dram=float(far), far=far)}
        return Multiprocessor(traced(flush=False), 1, 1, 1, m, met, cold=False).run().seconds - m.fixed

    m = Machine()
    assert 3 * m.dram_latency < seconds(far=True) * m.clock < 3 * m.dram_latency + 200
    assert 3 * m.l2_latency < seconds(far=False) * m.clock < 3 * m.l2_latency + 200


def test_many_programs_take_as_long_as_their_bytes():
    m, programs, warps = Machine(burst=0), 132 * 1000, 4
    found = Multiprocessor(traced(flush=False), warps, 8, programs, m, {}, cold=False).run()
    assert found.dram_bytes == programs * warps * 3 * 32 * 16
    assert found.seconds - m.fixed == pytest.approx(found.dram_bytes / m.dram, rel=0.05)


def test_worse_code_is_told(monkeypatch):
    case = pins.PINNED[0]
    (pin,) = [r for r in pins.known()["kernels"] if (r["case"], r["state"], r["variant"]) == case.names]
    for name, worse in (("instructions", 1.5), ("loads", 2.0), ("registers", 1.5)):
        monkeypatch.setattr(pins, "found", lambda _, n=name, w=worse: {**pin, n: pin[n] * w})
        assert [s.split()[0] for s in pins.complaints(case)] == [name]
    monkeypatch.setattr(pins, "found", lambda _: {**pin, "spills": 8})
    assert pins.complaints(case) == ["spills 8 bytes instead of 0"]
    monkeypatch.setattr(pins, "found", lambda _: pin)
    assert not pins.complaints(case)


def test_the_cases_are_the_plans_that_a_gpu_times():
    plan = Case("gdn", "bfloat16", "verify").plan
    assert (plan.flush, plan.capacity, plan.state_dtype, plan.sizes) == (16, 24, torch.bfloat16, (128, 128))
