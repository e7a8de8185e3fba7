"""Registers, spills and shared memory of the generated Triton kernels, compiled ahead of time; needs no GPU.

    python -m benchmarks.triton_aot [--targets sm_90 ...] [--only gdn ...] [--variants verify ...] [--seconds 170]
                                    [--out benchmarks/results/triton_aot]

Writes OUT.json and, as a table, OUT.md. Kernels that OUT.json already knows by their text and launch are not compiled
again, so a run that was cut short goes on where it stopped. Fails when a kernel spills.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import triton

from kvbuffer_compile.codegen.schedule import schedule
from kvbuffer_compile.codegen.standalone.aot import TARGETS, usage
from kvbuffer_compile.codegen.triton.launch import Config, configure
from kvbuffer_compile.codegen.triton.triton import emit
from kvbuffer_compile.commands.recurrences import RECURRENCES
from kvbuffer_compile.ir.plan import Layout, Plan
from kvbuffer_compile.ir.program import Program

OUT = Path(__file__).parent / "results" / "triton_aot"


@dataclass(frozen=True)
class Shape:
    """The state of a real model. contiguous: the axis that is innermost in memory."""

    name: str
    program: Program
    sizes: tuple[int, int]
    heads: int
    contiguous: str = "value"

    def plan(self, variant: str, flush: int, tokens: int, dtype: torch.dtype) -> Plan:
        """rows in bfloat16, but gates and other scalars in float32."""
        k, v = self.sizes
        value_last = self.contiguous == "value"
        dims = ((None,), (self.heads,), (k,), (v,)) if value_last else ((None,), (self.heads,), (v,), (k,))
        layout = Layout(dims, (0, 1, 2, 3) if value_last else (0, 1, 3, 2))
        decays = {e.factor for e in self.program.events if not hasattr(e, "left")}
        rows = tuple(
            torch.float32 if x.kind == "scalar" or x in decays else torch.bfloat16 for x in self.program.logged
        )
        capacity = flush + (tokens if variant == "verify" else 0)
        return Plan(self.program, layout, variant, self.sizes, flush, capacity, dtype, rows)  # type: ignore[arg-type]


SHAPES = (
    Shape("gdn", RECURRENCES["gdn"].program, (128, 128), 32),
    Shape("kda", RECURRENCES["kda"].program, (128, 128), 32),
    Shape("mamba2-64x128", RECURRENCES["mamba2"].program, (128, 64), 64, "key"),
    Shape("mamba2-64x256", RECURRENCES["mamba2"].program, (256, 64), 64, "key"),
    Shape("gla", RECURRENCES["gla"].program, (256, 512), 4),
    Shape("rwkv7", RECURRENCES["rwkv7"].program, (64, 64), 64),
    Shape("mlstm", RECURRENCES["mlstm"].program, (256, 512), 4),
)
VARIANTS = ("recurrent", "buffered", "verify")
# variant, flush length, tokens
STEPS = (
    ("recurrent", 1, 1),
    *(("buffered", flush, 1) for flush in (8, 16, 32)),
    *(("verify", flush, tokens) for flush in (8, 16, 32) for tokens in (4, 8)),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--only", nargs="+", default=[s.name for s in SHAPES], choices=[s.name for s in SHAPES])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no compilation after this time")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    end = time.monotonic() + args.seconds
    file = args.out.with_suffix(".json")
    known = {row["key"]: row for row in (json.loads(file.read_text(encoding="utf-8")) if file.exists() else [])}
    missing, every = 0, list(kernels(SHAPES))  # each finds its key once
    for kernel in every:
        if kernel.key in known or not _wanted(kernel, args):
            continue
        if time.monotonic() > end:
            missing += 1
            continue
        known[kernel.key] = row = kernel.measured()
        print(" ".join(f"{key}={value}" for key, value in row.items()), flush=True)
        _write(file, [known[k.key] for k in every if k.key in known])
    rows = [known[k.key] for k in every if k.key in known]
    _write(file, rows)
    args.out.with_suffix(".md").write_text(markdown(rows), encoding="utf-8")
    spilled = sum(row["spills"] > 0 for row in rows)
    print(f"{len(rows)} kernels in the table, {missing} of those asked for still missing, {spilled} spill")
    raise SystemExit(1 if spilled else 0)


def _wanted(kernel: Kernel, args: argparse.Namespace) -> bool:
    chosen = kernel.shape.name in args.only and kernel.target in args.targets
    return chosen and kernel.plan.variant in args.variants


def _write(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n", encoding="utf-8")


@dataclass(frozen=True)
class Kernel:
    """One compilation."""

    shape: Shape
    plan: Plan
    tokens: int
    target: str

    @cached_property
    def config(self) -> Config:
        return configure(self.plan, schedule(self.plan.program, in_place=self.plan.variant != "buffered"))

    @cached_property
    def key(self) -> str:
        """What decides the numbers: the text with its launch, the target, the compiler, and where they are read."""
        parts = (emit(self.plan, self.config), self.target, str(self.tokens), triton.__version__, "machine code")
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]

    def measured(self) -> dict[str, Any]:
        plan, config = self.plan, self.config
        found = usage(plan, self.target, (8, self.shape.heads), self.tokens, config)
        return {
            "key": self.key, "case": self.shape.name, "state": str(plan.state_dtype).removeprefix("torch."),
            "variant": plan.variant, "L": plan.flush, "T": self.tokens, "block": config.block, "warps": config.warps,
            "target": self.target, **asdict(found), "seconds": round(found.seconds, 2),
        }  # fmt: skip


def kernels(shapes: Iterable[Shape], targets: Iterable[str] = tuple(TARGETS)) -> Iterator[Kernel]:
    """All compilations of the table."""
    for shape in shapes:
        for dtype in (torch.float32, torch.bfloat16):
            for variant, flush, tokens in STEPS:
                plan = shape.plan(variant, flush, tokens, dtype)
                yield from (Kernel(shape, plan, tokens, target) for target in targets)


def measured(name: str, target: str) -> list[dict[str, Any]]:
    """One row a kernel: what all steps of a recurrence take on a target."""
    return [k.measured() for k in kernels([s for s in SHAPES if s.name == name], [target])]


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table with one line a kernel and the targets side by side: registers / spills / shared bytes."""
    targets = list(dict.fromkeys(row["target"] for row in rows))
    kernels: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for row in rows:
        key = tuple(row[x] for x in ("case", "state", "variant", "L", "T", "block", "warps"))
        kernels.setdefault(key, {})[row["target"]] = row
    spills = sum(row["spills"] > 0 for row in rows)
    lines = [
        "# Generated Triton kernels, compiled ahead of time",
        "",
        "`python -m benchmarks.triton_aot`: registers of a thread / spills / shared memory of a program in bytes, and",
        f"processor seconds of the longest compilation. {len(rows)} compilations, {spills} with spills.",
        "",
        f"| case | state | variant | L | T | block | warps | {' | '.join(targets)} | seconds |",
        "|" + "---|" * (8 + len(targets)),
    ]
    for key, found in kernels.items():
        known = [found.get(t) for t in targets]
        cells = [f"{r['registers']} / {r['spills']} / {r['shared']}" if r else "-" for r in known]
        seconds = max(r["seconds"] for r in found.values())
        lines.append(f"| {' | '.join(map(str, key))} | {' | '.join(cells)} | {seconds} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
