"""Who implements the steps: generated kernels where they can be built, plain ATen everywhere."""

from __future__ import annotations

import functools
import logging
import os
from typing import Any

import torch

from kvbuffer_compile.errors import EmitError, OptionError
from kvbuffer_compile.ir.plan import Plan
from kvbuffer_compile.process import callers, fleeting, progress
from kvbuffer_compile.steps import ops

log = logging.getLogger("kvbuffer_compile")
_said: set[str] = set()  # the first lines of warnings


def resolve(wanted: str, device: torch.device) -> str:
    """The target to plan for: what was asked, or the best that this device and machine offer."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if (wanted == "triton" and device.type != "cuda" and not interpreted) or (wanted == "cpp" and device.type != "cpu"):
        raise OptionError(
            f"kvbuffer option target={wanted!r} cannot serve a state on {device.type}; use 'auto' or 'aten'"
        )
    if wanted != "auto":
        return wanted
    if device.type == "cpu" and _has_compiler():
        return "cpp"
    return "triton" if device.type == "cuda" else "aten"


def _has_compiler() -> bool:
    from kvbuffer_compile.codegen import build

    problem = build.no_compiler()
    if problem:
        _warn_once(problem)
    return not problem


def build(plan: Plan) -> str:
    """Register the plan's op and build its kernel; returns the target that will run ("aten" after a failed build)."""
    if plan.target != "aten" and not _built(plan):
        fleeting.mark()
        return "aten"
    return plan.target


@functools.cache
def _built(plan: Plan) -> bool:
    ops.step_op(plan)
    progress.stage(f"building the {plan.target} kernel of {plan.program.signature} {plan.variant} steps")
    try:
        if plan.target == "triton":
            ops.use_triton(plan, interpret=os.environ.get("TRITON_INTERPRET") == "1")
        else:
            ops.use_cpp(plan)
    except EmitError as error:
        _warn_once(str(error))
        return False
    return True


def source(plan: Plan) -> tuple[str, str] | None:
    """The suffix and the text of the file that implements a plan's step; None for composite steps."""
    from kvbuffer_compile.codegen import cut
    from kvbuffer_compile.codegen.cpp import cpp
    from kvbuffer_compile.codegen.triton import triton

    match plan.target:
        case "cpp":
            return ".cpp", cpp.emit(cut.built_as(plan))
        case "triton":
            return ".py", triton.emit(plan)
    return None


def _warn_once(message: str) -> None:
    """Warn of the first of all problems that begin with the same line: what follows is of one kernel of many."""
    fleeting.mark()
    line = message.splitlines()[0]
    log.info("composite steps: %s", message)
    if line in _said:
        return
    _said.add(line)
    callers.warn(f"kvbuffer runs its slower composite steps: {message}")


def step_op(plan: Plan) -> Any:
    """The op of a plan that was built."""
    return ops.step_op(plan)
