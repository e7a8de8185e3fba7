"""Which tensor each instruction touches: kernel arguments followed through address arithmetic and forward branches."""

from __future__ import annotations

import re

from benchmarks.static_gpu.disassembly import Code, Instruction
from benchmarks.static_gpu.machine import GLOBAL

Held = dict[str, frozenset[str]]  # register -> the arguments that its content was made of
ARGUMENTS = 0x210  # where the arguments of a kernel begin in the constant bank, on sm_90

# Instructions that write no register that an address could be made of, and those whose result is a number.
_SILENT = ("STS", "BAR", "BRA", "EXIT", "STSM", "BSSY", "BSYNC", "NOP")
_NUMBERS = ("LDS", "SHFL", "LDSM", "MUFU", "HMMA", "PRMT", "HFMA2", "S2R", "CS2R", "I2F", "POPC", "HADD2", "HMUL2")
_TWO_RESULTS = ("SHFL", "LOP3", "IADD3", "LEA")  # a predicate first
_RESULTS = ("LDG", "ATOMG", "ATOM", "LD")
_REGISTER = re.compile(r"\b(U?R\d+)\b")
_CONSTANT = re.compile(r"c\[0x0\]\[(0x[0-9a-f]+)\]")
_NOTHING: frozenset[str] = frozenset()


def follow(code: Code, offsets: dict[int, str]) -> None:
    """Set `tensor` of the instructions. offsets: tensors among the arguments, by their place in the constant bank."""
    held: Held = {}
    arriving: dict[int, Held] = {}
    ended = False  # the instruction before never falls through
    for n, i in enumerate(code.instructions):
        if n in arriving:
            held = dict(arriving[n]) if ended else _merged(held, arriving[n])
        ended = i.base in ("EXIT", "BRA") and not i.guard
        to = code.labels.get(i.target, 0) if i.base == "BRA" else 0
        if to > n:
            arriving[to] = _merged(held, arriving.get(to, {}))
        if i.base in GLOBAL:
            _touch(i, held)
        elif i.base not in _SILENT:
            _compute(i, held, offsets)


def _merged(one: Held, other: Held) -> Held:
    return {r: one.get(r, _NOTHING) | other.get(r, _NOTHING) for r in {*one, *other}}


def _touch(i: Instruction, held: Held) -> None:
    addresses = re.findall(r"\[([^\]]*)\]", i.operands)
    registers = _REGISTER.findall(addresses[-1]) if addresses else []
    i.tensor = min(_NOTHING.union(*(held.get(r, _NOTHING) for r in registers)), default="")
    if i.base in _RESULTS:
        for r in _REGISTER.findall(i.operands.split(",")[0]):
            held.update(dict.fromkeys(_spread(r, max(1, i.width // 4)), _NOTHING))


def _compute(i: Instruction, held: Held, offsets: dict[int, str]) -> None:
    constants = [int(x, 16) for x in _CONSTANT.findall(i.operands)]
    made = frozenset(offsets[c - half] for c in constants for half in (0, 4) if c - half in offsets)
    parts = i.operands.split(",")
    if re.fullmatch(r"(PT|!?U?P\d)", parts[0].strip()) and i.base in _TWO_RESULTS:
        parts = parts[1:]
    made = made.union(*(held.get(r, _NOTHING) for r in _REGISTER.findall(",".join(parts[1:]))))
    if i.base.startswith("F") or i.base in _NUMBERS:
        made = _NOTHING
    for r in _REGISTER.findall(parts[0]):
        for x in _spread(r, _wide(i)):
            held[x] = made | held.get(x, _NOTHING) if i.guard else made


def _wide(i: Instruction) -> int:
    """How many registers a result takes."""
    if i.base in ("HMMA", "LDSM"):
        return 4
    if ".WIDE" in i.op or (i.base == "CS2R" and ".32" not in i.op):
        return 2
    return i.width // 4 if i.base in ("LDC", "ULDC", "LDS") and i.width >= 8 else 1


def _spread(register: str, count: int) -> list[str]:
    head = register.rstrip("0123456789")
    return [f"{head}{int(register[len(head) :]) + n}" for n in range(count)]
