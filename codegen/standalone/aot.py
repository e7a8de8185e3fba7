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
         torch.int32: "*i32", torch.int64: "*i64"}  # fmt: skip


@dataclass(frozen=True)
class Usage:
    """registers: of a thread. spills: bytes of a thread's stack, where registers went. shared: bytes of a program.

    seconds: processor time of the compilation, that of other programs it ran included.
    """

    registers: int
    spills: int
    shared: int
    seconds: float


@dataclass(frozen=True)
class Built:
    """A kernel compiled for one target, for exactly one launch.

    compiled: what Triton returns. text: of the module; file: the name its lines go by in the machine code. arguments:
    by name, tensors on the meta device; signature: their types as Triton spells them, "constexpr" for what the
    compiler knew, which `constants` has. programs: how many the launch has; options: as Triton takes them.
    """

    compiled: Any
    target: str
    text: str
    file: str
    arguments: dict[str, Any]
    signature: dict[str, str]
    constants: dict[str, Any]
    programs: int
    options: dict[str, Any]
    seconds: float

    def usage(self) -> Usage:
        registers, spills = (_nvidia if TARGETS[self.target][0] == "cuda" else _amd)(self.compiled)
        return Usage(registers, spills, self.compiled.metadata.shared, self.seconds)

    def disassembly(self, *options: str) -> str:
        """nvdisasm's text of the machine code, of a target of NVIDIA's. FileNotFoundError where Triton bundles none."""
        return _tool("nvdisasm", self.compiled.asm["cubin"], "-c", *options)


def usage(plan: Plan, target: str, lanes: tuple[int, ...], tokens: int = 1, config: Config | None = None) -> Usage:
    """Compile the plan's kernel for a target of TARGETS. lanes: sizes of the state's lanes; tokens: of a verify."""
    return build(plan, target, lanes, tokens, config).usage()


def instructions(
    plan: Plan, target: str, lanes: tuple[int, ...], tokens: int = 1, config: Config | None = None
) -> Counter[str]:
    """How often each instruction, with its suffixes, stands in the machine code for one of NVIDIA's targets.

    FileNotFoundError where Triton bundles no nvdisasm.
    """
    text = build(plan, target, lanes, tokens, config).disassembly()
    return Counter(re.findall(r"/\*[0-9a-f]{4,6}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", text))


def build(
    plan: Plan, target: str, lanes: tuple[int, ...], tokens: int = 1, config: Config | None = None,
    vectors: torch.dtype | None = None,
) -> Built:  # fmt: skip
    """Compile the plan's kernel for a target of TARGETS. vectors: dtype of operands that are no scalars, the plan's
    compute dtype unless given."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    started = sum(os.times()[:4])
    text = emitter.emit(plan, config)
    module = load(text)
    grid, values, options = _recorded(module, plan, lanes, tokens, vectors)
    names = module.step.arg_names
    signature, constants, attributes = _signature(module.step, values)
    if "PRECISION" in names and TARGETS[target][0] == "hip":
        constants[(names.index("PRECISION"),)] = "ieee"  # as the launcher has it there
    source = ASTSource(module.step, signature, constexprs=constants, attrs=attributes)
    before = triton.knobs.compilation.always_compile
    triton.knobs.compilation.always_compile = True
    try:
        compiled = triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)
    finally:
        triton.knobs.compilation.always_compile = before
    known = {names[n]: value for (n,), value in constants.items()}
    given = dict(zip(names, values, strict=True))
    seconds = sum(os.times()[:4]) - started
    return Built(compiled, target, text, str(module.__file__), given, signature, known, grid[0], options, seconds)


def launched(
    module: ModuleType, plan: Plan, lanes: tuple[int, ...], tokens: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What the launcher passes to the kernel: its arguments, and its options."""
    return _recorded(module, plan, lanes, tokens, None)[1:]


def _recorded(
    module: ModuleType, plan: Plan, lanes: tuple[int, ...], tokens: int, vectors: torch.dtype | None
) -> tuple[tuple[int, ...], tuple[Any, ...], dict[str, Any]]:
    """One launch: its grid, arguments and options."""
    calls: list[tuple[tuple[int, ...], tuple[Any, ...], dict[str, Any]]] = []

    class Recorder:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *args, **options: calls.append((grid, args, options))

    state, cursor, tickets, rows, operands, *slots = example(plan, lanes, tokens, "meta")
    if vectors is not None:
        inputs = zip(plan.program.inputs, operands, strict=True)
        operands = [x if v.kind == "scalar" else x.to(vectors) for v, x in inputs]
    kernel, vars(module)["step"] = module.step, Recorder()
    try:
        module.launch(state, cursor, tickets, rows, operands, *slots)
    finally:
        vars(module)["step"] = kernel
    return calls[0]


def _signature(kernel: Any, values: tuple[Any, ...]) -> tuple[dict[str, str], dict[Any, Any], dict[Any, Any]]:
    """The types, constants and known multiples of 16 among the arguments, as a launch would specialise them."""
    signature, constants, attributes = {}, {}, {}
    for n, (parameter, value) in enumerate(zip(kernel.params, values, strict=True)):
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = TYPES[value.dtype]
            attributes[(n,)] = [["tt.divisibility", 16]]
        elif value == 1 or parameter.is_constexpr:
            signature[parameter.name] = "constexpr"
            constants[(n,)] = value
        else:
            signature[parameter.name] = "i32" if abs(value) < 2**31 else "i64"
            attributes.update({(n,): [["tt.divisibility", 16]]} if value % 16 == 0 else {})
    return signature, constants, attributes


def _nvidia(compiled: Any) -> tuple[int, int]:
    """As the machine code itself says: ptxas run once more, without Triton's options, had told of no spills (GDN,
    verify) where the code that runs has a stack of 16 to 48 bytes."""
    text = _tool("cuobjdump", compiled.asm["cubin"], "-res-usage")
    registers, stack = re.search(r"\bREG:(\d+)", text), re.search(r"\bSTACK:(\d+)", text)
    if registers is None or stack is None:
        raise EmitError(f"cuobjdump says nothing about registers: {text[-2000:]}")
    return int(registers[1]), int(stack[1])


def _tool(name: str, cubin: bytes, *options: str) -> str:
    """What one of NVIDIA's tools that Triton bundles says. FileNotFoundError where it does not."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(cubin)
        return subprocess.run([str(tool), *options, str(file)], capture_output=True, text=True, check=True).stdout


def _amd(compiled: Any) -> tuple[int, int]:
    text = compiled.asm["amdgcn"]

    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        return int(found[1]) if found else 0

    # Spilled scalar registers lie in lanes of vector registers: they cost no memory as long as there is no scratch.
    return number("vgpr_count"), 4 * number("vgpr_spill_count") + number("private_segment_fixed_size")
