"""The card that is modelled, and what its instructions cost.

Latencies and pipe widths are those that microbenchmarks of Ampere and Hopper agree on, rounded; `dram`, `write`, the
three memory latencies, the barrier's cost and `fixed` were fitted to results/gpu_h100.json.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Machine:
    """An H100 SXM. Cycles are of `clock` (1/s); rates are bytes a second of the whole chip, sizes those of one SM."""

    sms: int = 132
    clock: float = 1.755e9
    dram: float = 3.05e12  # what reads alone reach
    write: float = 1.16  # what a written byte costs in read bytes: recurrent steps reach 2.8e12
    l2: float = 5.5e12
    dram_latency: int = 750
    cold_latency: int = 850  # the same in a kernel of few programs: translations and instructions are not cached yet
    l2_latency: int = 300
    atomic_latency: int = 700
    port: float = 48.0  # bytes a cycle that one SM can take in
    alone: tuple[float, float] = (50.0, 60.0)  # most bytes a cycle an SM gets of DRAM and L2 when others are idle
    burst: int = 5000  # cycles by which an SM may run ahead of its share of the bandwidth: others are idle meanwhile
    barrier: int = 30  # cycles of a barrier, and for each warp
    barrier_warp: int = 3
    cta_launch: int = 150  # from the end of a program to the first instruction of the next in its place
    dispatch: int = 132  # cycles between two programs that an SM is given at the start of a kernel
    fixed: float = 2.0e-6  # seconds: launch in a graph, first instructions, last stores
    registers: int = 65536
    shared: int = 233472
    warps: int = 64
    programs: int = 32
    rows_in_l2: float = 0.5  # share of the owed rows that L2 still holds when the state passes it by


GLOBAL = ("LDG", "STG", "ATOMG", "ATOM", "RED", "LDGSTS", "LD", "ST")  # instructions that touch memory of tensors
LOADS, STORES, ATOMICS = ("LDG", "LDGSTS"), ("STG", "RED"), ("ATOMG", "ATOM")

# Cycles that an instruction of a warp occupies a pipe of its sub-partition: (opcode, pipe, cycles), the first match.
PIPES: tuple[tuple[str, str, int], ...] = (
    (r"(FFMA|FADD|FMUL|HFMA2|HADD2|HMUL2)", "fma", 1),
    (r"(HMMA|IMMA)", "tensor", 6),
    (r"(HGMMA|WGMMA)", "tensor", 32),
    (r"(IMAD|VIADD|IDP)", "imad", 2),
    (r"(MUFU|F2F|F2I|I2F|POPC|FLO|BREV)", "xu", 8),
    (r"(LDG|STG|LDS|STS|LDSM|STSM|SHFL|ATOM|RED|LDL|STL|LDGSTS|LD\b|ST\b|CCTL|MATCH|LDC\b)", "mio", 2),
    (r"(DADD|DMUL|DFMA)", "fp64", 4),
    (r"(U[A-Z0-9]+|R2UR|S2UR)", "uniform", 2),
    (r".*", "alu", 2),
)

# Cycles until a result is there, where they are not those of memory.
LATENCY = {
    "LDS": 30, "LDSM": 33, "SHFL": 25, "MUFU": 24, "STS": 22, "STSM": 24, "LDC": 45, "S2R": 30, "S2UR": 30,
    "POPC": 22, "FLO": 22, "I2F": 24, "F2I": 24, "F2F": 24, "R2UR": 14, "VOTEU": 14, "HMMA": 33,
}  # fmt: skip
OTHER_LATENCY = 30

# What is counted of a trace, by opcode.
COUNTED = {
    "fp32": r"(FFMA|FADD|FMUL|HFMA2|HADD2|HMUL2)", "tensor": r"(HMMA|HGMMA|WGMMA)", "mufu": r"MUFU", "shfl": r"SHFL",
    "shared": r"(LDS|STS|LDSM|STSM)", "global": r"(LDG|STG|LDGSTS|UTMA)", "atomic": r"(ATOM|RED)",
    "local": r"(LDL|STL)", "barrier": r"BAR\.", "imad": r"IMAD",
}  # fmt: skip


def pipe(op: str) -> tuple[str, int]:
    """The pipe of an opcode, and the cycles it is taken for."""
    return next((name, busy) for pattern, name, busy in PIPES if re.match(pattern, op))


def latency(base: str) -> int:
    return LATENCY.get(base, OTHER_LATENCY)
