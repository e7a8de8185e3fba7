"""Compile a generated Triton kernel ahead of time, for any GPU, on a machine that has none.

What comes back are the numbers that decide whether a kernel can be fast at all: registers, spills and shared memory.
The kernel is compiled for exactly the arguments that its launcher would pass.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from kvbuffer_compile.codegen.example import example
from kvbuffer_compile.codegen.triton import triton as emitter
from kvbuffer_compile.codegen.triton.launch import Config
from kvbuffer_compile.codegen.triton.load import load
from kvbuffer_compile.errors import EmitError
from kvbuffer_compile.ir.plan import Plan

TARGETS: dict[str, tuple[Any, ...]] = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
TYPES = {torch.float32: "*fp32", torch.float64: "*fp64", torch.bfloat16: "*bf16", torch.float16: "*fp16",
         torch.int32: "*i32"}  # fmt: skip


@dataclass(frozen=True)
class Usage:
    """registers: of a thread. spills: bytes of a thread that went to memory. shared: bytes of a program.

    seconds: processor time of the compilation, that of other programs it ran included.
    """

    registers: int
    spills: int
    shared: int
    seconds: float


def usage(plan: Plan, target: str, lanes: tuple[int, ...], tokens: int = 1, config: Config | None = None) -> Usage:
    """Compile the plan's kernel for a target of TARGETS. lanes: sizes of the state's lanes; tokens: of a verify."""
    started = sum(os.times()[:4])
    compiled = _compiled(plan, target, lanes, tokens, config)
    seconds = sum(os.times()[:4]) - started
    read = _nvidia if TARGETS[target][0] == "cuda" else _amd
    registers, spills = read(compiled, TARGETS[target][1])
    return Usage(registers, spills, compiled.metadata.shared, seconds)


def instructions(
    plan: Plan, target: str, lanes: tuple[int, ...], tokens: int = 1, config: Config | None = None
) -> Counter[str]:
    """How often each instruction, with its suffixes, stands in the machine code for one of NVIDIA's targets.

    FileNotFoundError where Triton bundles no nvdisasm.
    """
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(_compiled(plan, target, lanes, tokens, config).asm["cubin"])
        done = subprocess.run([str(tool), "-c", str(cubin)], capture_output=True, text=True, check=True)
    return Counter(re.findall(r"/\*[0-9a-f]{4,6}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", done.stdout))


def _compiled(plan: Plan, target: str, lanes: tuple[int, ...], tokens: int, config: Config | None) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module = load(emitter.emit(plan, config))
    kernel = module.step
    values, options = launched(module, plan, lanes, tokens)
    signature, constants, attributes = _signature(kernel.arg_names, values)
    if "PRECISION" in kernel.arg_names and TARGETS[target][0] == "hip":
        constants[(kernel.arg_names.index("PRECISION"),)] = "ieee"  # as the launcher has it there
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    before = triton.knobs.compilation.always_compile
    triton.knobs.compilation.always_compile = True
    try:
        return triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)
    finally:
        triton.knobs.compilation.always_compile = before


def launched(
    module: ModuleType, plan: Plan, lanes: tuple[int, ...], tokens: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What the launcher passes to the kernel: its arguments, and its options."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    class Recorder:
        def __getitem__(self, grid: object) -> Any:
            return lambda *args, **options: calls.append((args, options))

    kernel, vars(module)["step"] = module.step, Recorder()
    try:
        module.launch(*example(plan, lanes, tokens, "meta"))
    finally:
        vars(module)["step"] = kernel
    return calls[0]


def _signature(names: list[str], values: tuple[Any, ...]) -> tuple[dict[str, str], dict[Any, Any], dict[Any, Any]]:
    """The types, constants and known multiples of 16 among the arguments, as a launch would specialise them."""
    signature, constants, attributes = {}, {}, {}
    for n, (name, value) in enumerate(zip(names, values, strict=True)):
        if isinstance(value, torch.Tensor):
            signature[name] = TYPES[value.dtype]
            attributes[(n,)] = [["tt.divisibility", 16]]
        elif value == 1 or name.isupper() or name.startswith(("ROW_", "STATE_")):
            signature[name] = "constexpr"
            constants[(n,)] = value
        else:
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
            attributes.update({(n,): [["tt.divisibility", 16]]} if value % 16 == 0 else {})
    return signature, constants, attributes


def _nvidia(compiled: Any, arch: int) -> tuple[int, int]:
    from triton.backends.nvidia.compiler import get_ptxas

    text = compiled.asm["ptx"]
    found = re.search(r"\.target (\w+)", text)
    assert found
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder, "kernel.ptx")
        ptx.write_text(text, encoding="utf-8")
        command = [get_ptxas(arch).path, "-v", f"--gpu-name={found[1]}", str(ptx), "-o", f"{ptx}.cubin"]
        done = subprocess.run(command, capture_output=True, text=True)
    registers = re.search(r"Used (\d+) registers", done.stderr)
    if registers is None:
        raise EmitError(f"ptxas says nothing about registers: {done.stderr[-2000:]}")
    return int(registers[1]), sum(map(int, re.findall(r"(\d+) bytes spill", done.stderr)))


def _amd(compiled: Any, arch: str) -> tuple[int, int]:
    text = compiled.asm["amdgcn"]

    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        return int(found[1]) if found else 0

    # Spilled scalar registers lie in lanes of vector registers: they cost no memory as long as there is no scratch.
    return number("vgpr_count"), 4 * number("vgpr_spill_count") + number("private_segment_fixed_size")
