"""The command `emit`: the step of a named recurrence as one file that needs nothing of ours."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch

from kvbuffer_compile.codegen.standalone.standalone import standalone
from kvbuffer_compile.commands.recurrences import DRAWN, RECURRENCES
from kvbuffer_compile.ir.plan import Layout, Plan
from kvbuffer_compile.ir.program import Decay

VARIANTS = ("recurrent", "buffered", "verify")
TARGETS = ("triton", "cpp")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
NARROW = ("float16", "bfloat16")
LAYOUTS = {"kv": (0, 1, 2, 3), "vk": (0, 1, 3, 2)}


def add_arguments(parser: argparse.ArgumentParser, count: Callable[[str], int]) -> None:
    """The command's arguments; `count` reads a number that is at least 1."""
    parser.add_argument("--recurrence", choices=RECURRENCES, required=True)
    parser.add_argument("--variant", choices=VARIANTS, required=True)
    parser.add_argument("--target", choices=TARGETS, required=True)
    parser.add_argument("--k", type=count, help="key rows of the state (those of a typical layer)")
    parser.add_argument("--v", type=count, help="value columns of the state (those of a typical layer)")
    parser.add_argument("--flush", type=count, default=16, help="tokens between two flushes (16)")
    parser.add_argument("--drafts", type=count, default=4, help="tokens that fit in a verify step beside them (4)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the state (float32)")
    parser.add_argument("--row-dtype", choices=DTYPES, default="bfloat16", help="of keys and values in rows (bfloat16)")
    parser.add_argument("--read-dtype", choices=NARROW, help="of a shadow that steps read in a float32 state's place")
    parser.add_argument(
        "--layout", choices=LAYOUTS, default="kv", help="the state is [b, h, K, V] (kv) or [b, h, V, K]"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write it there, not to the standard output")


def emit(arguments: argparse.Namespace) -> str:
    """The text of the file that was asked for by `add_arguments`."""
    plan = _plan(arguments)
    title = f"{arguments.recurrence}_{plan.variant}"
    return standalone(plan, DRAWN, arguments.drafts if plan.variant == "verify" else 1, title)


def _plan(wanted: argparse.Namespace) -> Plan:
    found = RECURRENCES[wanted.recurrence]
    program, variant = found.program, wanted.variant
    sizes = (wanted.k or found.sizes[0], wanted.v or found.sizes[1])
    order = LAYOUTS[wanted.layout]
    layout = Layout(((None,), (None,), *((sizes[i - 2],) for i in order[2:])), order)
    gates = {e.factor for e in program.events if isinstance(e, Decay)}
    row = DTYPES[wanted.row_dtype]
    rows = tuple(torch.float32 if v.kind == "scalar" or v in gates else row for v in program.logged)
    flush = 1 if variant == "recurrent" else wanted.flush
    capacity = flush + (wanted.drafts if variant == "verify" else 0)
    state, read = DTYPES[wanted.dtype], DTYPES.get(wanted.read_dtype)
    if read is not None and (variant == "recurrent" or state != torch.float32):
        raise ValueError("--read-dtype is for the variants buffered and verify of a float32 state (--dtype float32)")
    return Plan(program, layout, variant, sizes, flush, capacity, state, rows, target=wanted.target, read_dtype=read)
