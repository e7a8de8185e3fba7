"""The command `emit`: the step of a named recurrence as one file that needs nothing of ours."""

from __future__ import annotations

import argparse

import torch

from kvbuffer_compile.codegen.standalone.standalone import standalone
from kvbuffer_compile.commands.arguments import LAYOUTS
from kvbuffer_compile.commands.recurrences import DRAWN, RECURRENCES
from kvbuffer_compile.ir.plan import Layout, Plan
from kvbuffer_compile.ir.program import Decay


def emit(arguments: argparse.Namespace) -> str:
    """The text of the file that was asked for on the command line (arguments.py)."""
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
    row = getattr(torch, wanted.row_dtype)
    rows = tuple(torch.float32 if v.kind == "scalar" or v in gates else row for v in program.logged)
    flush = 1 if variant == "recurrent" else wanted.flush
    capacity = flush + (wanted.drafts if variant == "verify" else 0)
    state = getattr(torch, wanted.dtype)
    read = getattr(torch, wanted.read_dtype) if wanted.read_dtype else None
    if read is not None and (variant == "recurrent" or state != torch.float32):
        raise ValueError("--read-dtype is for the variants buffered and verify of a float32 state (--dtype float32)")
    return Plan(program, layout, variant, sizes, flush, capacity, state, rows, target=wanted.target, read_dtype=read)
