"""A generated kernel as the model sees it: compiled ahead of time for sm_90."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch

from benchmarks.static_gpu.branches import Branches
from benchmarks.static_gpu.disassembly import Code, parse
from benchmarks.static_gpu.machine import Machine
from benchmarks.static_gpu.pointers import ARGUMENTS, follow
from kvbuffer_compile.codegen.standalone import aot
from kvbuffer_compile.codegen.triton.launch import Config
from kvbuffer_compile.ir.plan import Plan

TARGET = "sm_90"
OPERANDS = torch.bfloat16  # dtype of vectors among the operands, as models have them; scalars are float32


@dataclass(frozen=True)
class Kernel:
    """programs, sizes: of the launch, and the bytes of the tensors among its arguments. constants: that the kernel
    knows by name. registers, spills: of a thread, the latter in bytes; shared: bytes of a program."""

    plan: Plan
    tokens: int
    code: Code
    text: str
    constants: dict[str, object]
    warps: int
    registers: int
    spills: int
    shared: int
    programs: int
    sizes: dict[str, int]

    @cached_property
    def branches(self) -> Branches:
        return Branches(self.text)

    def resident(self, m: Machine) -> int:
        """Programs that fit on a multiprocessor at once."""
        by_registers = m.registers // (-(-self.registers // 8) * 8 * 32 * self.warps)
        by_shared = m.shared // (self.shared + 1024)
        return max(1, min(by_registers, by_shared, m.warps // self.warps, m.programs))

    def of_batch(self, batch: int, new: int) -> Kernel:
        """The same kernel for another batch, if the launcher's constants do not depend on it."""
        sizes = {name: size // batch * new for name, size in self.sizes.items()}
        return replace(self, programs=self.programs // batch * new, sizes=sizes)


def compiled(plan: Plan, lanes: tuple[int, ...], tokens: int = 1, config: Config | None = None) -> Kernel:
    """Compile a plan's kernel. lanes: sizes of the state's lanes, the batch first. FileNotFoundError where Triton
    bundles no ptxas or nvdisasm."""
    built = aot.build(plan, TARGET, lanes, tokens, config, OPERANDS)
    used = built.usage()
    code = parse(built.disassembly("-gi", "-hex"), built.file)
    follow(code, _offsets(built))
    tensors = {name: x for name, x in built.arguments.items() if isinstance(x, torch.Tensor)}
    numbers = {name: x for name, x in built.arguments.items() if isinstance(x, int)}
    return Kernel(
        plan, tokens, code, built.text, {**numbers, **built.constants}, built.options["num_warps"],
        used.registers, used.spills, used.shared, built.programs, {name: x.nbytes for name, x in tensors.items()},
    )  # fmt: skip


def _offsets(built: aot.Built) -> dict[int, str]:
    """The tensors among the arguments by their place in the constant bank: constants are not passed."""
    found, at = {}, ARGUMENTS
    for name, kind in built.signature.items():
        if kind == "constexpr":
            continue
        size = 4 if kind == "i32" else 8
        at = -(-at // size) * size
        if kind.startswith("*"):
            found[at] = name
        at += size
    return found
