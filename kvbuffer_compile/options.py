"""What a user may ask of the backend, checked when it is asked."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from kvbuffer_compile.errors import OptionError
from kvbuffer_compile.limits import COUNT, TARGETS, is_count

ON_DECLINE = ("ignore", "warn", "raise")
READ_DTYPES = ("auto", None, torch.float16, torch.bfloat16)
INNER = ("inductor", "eager")


@dataclass(frozen=True)
class Options:
    """Options of `torch.compile(..., backend="kvbuffer", options={...})`.

    flush: tokens between two writes of a state; "auto" takes the cost model's choice, 1 is the plain recurrence, and
        LONGEST is the most.
    inner: who compiles the rewritten graph: "inductor", "eager" (run it as it is) or a callable(gm, inputs).
    donate: states passed in and returned by the function may be overwritten, the caller will not look at the old ones.
    row_dtype: dtype of buffered keys and values; None takes that of the operands.
    read_dtype: float16 or bfloat16: steps read a float32 state from a copy of it in that dtype, made anew at every
        flush; the state itself stays exact. None: they read the state. "auto": float16 where all that goes in and out
        of the recurrence are 16-bit values, and where it pays.
    on_decline: what to do with a state that looks like a recurrence but cannot be served.
    dump: folder that receives programs, plans, graphs and generated source; None keeps nothing, unless the environment
        variable KVBUFFER_DUMP names one.
    check: run every rewritten step beside the original and raise when they differ (slow, for debugging).
    target: who implements the steps; "auto" takes generated kernels where they can be built.
    capacity: slots a buffer has at least; drafts of speculative decoding need room beyond the flush length.
    cache: keep what is made of a graph on disk, so that the next process need not trace and look at it again. None:
        only with KVBUFFER_CACHE=1 in the environment, where 0 forbids it whatever is asked.
    tune: time the plans of every state while compiling instead of trusting the cost model; what was measured is kept
        on disk. On GPUs they are timed in any case. mode="max-autotune" asks for it too. Seconds for each kind of
        state, the first time.
    """

    flush: str | int = "auto"
    inner: str | Callable[..., Any] = "inductor"
    donate: bool = False
    row_dtype: torch.dtype | None = None
    read_dtype: str | torch.dtype | None = None
    on_decline: str = "ignore"
    dump: str | Path | None = None
    check: bool = False
    target: str = "auto"
    capacity: int | None = None
    cache: bool | None = None
    tune: bool = False

    def __post_init__(self) -> None:
        _check(self.flush == "auto" or is_count(self.flush), "flush", self.flush, f'"auto" or {COUNT}')
        _check(self.inner in INNER or callable(self.inner), "inner", self.inner, f"one of {INNER} or a callable")
        _check(isinstance(self.donate, bool), "donate", self.donate, "True or False")
        _check(
            self.row_dtype is None or (isinstance(self.row_dtype, torch.dtype) and self.row_dtype.is_floating_point),
            "row_dtype", self.row_dtype, "None or a floating point torch.dtype",
        )  # fmt: skip
        _check(self.read_dtype in READ_DTYPES, "read_dtype", self.read_dtype, f"one of {READ_DTYPES}")
        _check(self.on_decline in ON_DECLINE, "on_decline", self.on_decline, f"one of {ON_DECLINE}")
        _check(self.dump is None or isinstance(self.dump, str | Path), "dump", self.dump, "None or a path")
        _check(isinstance(self.check, bool), "check", self.check, "True or False")
        _check(self.cache is None or isinstance(self.cache, bool), "cache", self.cache, "None, True or False")
        _check(isinstance(self.tune, bool), "tune", self.tune, "True or False")
        _check(self.target in TARGETS, "target", self.target, f"one of {TARGETS}")
        _check(self.capacity is None or is_count(self.capacity), "capacity", self.capacity, f"None or {COUNT}")


def _check(ok: object, name: str, value: object, allowed: str) -> None:
    if not ok:
        raise OptionError(f"kvbuffer option {name}={value!r} is not allowed: it must be {allowed}")


OURS = tuple(f.name for f in fields(Options))


def split(options: Mapping[str, Any] | None) -> tuple[Options, dict[str, Any]]:
    """Our options, and the ones that go on to Inductor (names of torch._inductor.config).

    OptionError, a ValueError, for a name that neither knows, or a value that ours does not allow.
    """
    ours: dict[str, Any] = {}
    inductor: dict[str, Any] = {}
    for name, value in (options or {}).items():
        key = str(name).replace("-", "_")
        (ours if key in OURS else inductor)[key] = value
    _check_inductor(inductor)
    return Options(**ours), inductor


def _check_inductor(options: Mapping[str, Any]) -> None:
    if not options:
        return
    from torch._inductor import config

    known = config.get_config_copy()
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, [*OURS, *known], 3)
            hint = f" Did you mean {' or '.join(near)}?" if near else ""
            raise OptionError(
                f"unknown option {name!r} for backend kvbuffer.{hint} Allowed: {', '.join(OURS)}, "
                "and the options of torch._inductor.config"
            )
