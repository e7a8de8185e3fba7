"""Registers, spills and shared memory of the generated Triton kernels, compiled ahead of time; needs no GPU.

    python -m benchmarks.triton_aot [--targets sm_90 ...] [--only gdn ...] [--out benchmarks/results/triton_aot]

Writes OUT.json and, as a table, OUT.md. Fails when a kernel spills.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.recurrences import RECURRENCES
from kvbuffer_compile.codegen.aot import TARGETS, usage
from kvbuffer_compile.codegen.launch import configure
from kvbuffer_compile.codegen.schedule import schedule
from kvbuffer_compile.ir import Program
from kvbuffer_compile.plan import Layout, Plan
from kvbuffer_compile.text import parse

OUT = Path(__file__).parent / "results" / "triton_aot"
MLSTM = parse("""program over b h tokens 1
  input q: key(b h)
  input k: key(b h)
  input v: value(b h)
  input f: scalar(b h)
  input i: scalar(b h)
  ki = aten.mul.Tensor(k, i)
  decay f
  update ki, v
  o = read q
  return o""")


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
    Shape("mlstm", MLSTM, (256, 512), 4),
)
# variant, flush length, tokens
STEPS = (
    ("recurrent", 1, 1),
    *(("buffered", flush, 1) for flush in (8, 16, 32)),
    *(("verify", flush, tokens) for flush in (8, 16, 32) for tokens in (4, 8)),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--only", nargs="+", default=[s.name for s in SHAPES])
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    rows: list[dict[str, Any]] = []
    for name in args.only:
        for target in args.targets:
            rows += measured(name, target)
            args.out.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    args.out.with_suffix(".md").write_text(markdown(rows), encoding="utf-8")
    spilled = sum(row["spills"] > 0 for row in rows)
    raise SystemExit(f"{spilled} kernels spill" if spilled else 0)


def measured(name: str, target: str) -> list[dict[str, Any]]:
    """One row a kernel: what all steps of a recurrence take on a target."""
    shape = next(s for s in SHAPES if s.name == name)
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for variant, flush, tokens in STEPS:
            plan = shape.plan(variant, flush, tokens, dtype)
            config = configure(plan, schedule(plan.program, in_place=variant != "buffered").split)
            found = usage(plan, target, (8, shape.heads), tokens, config)
            rows.append({
                "case": name, "state": str(dtype).removeprefix("torch."), "variant": variant, "L": flush, "T": tokens,
                "block": config.block, "warps": config.warps, "target": target,
                **asdict(found), "seconds": round(found.seconds, 2),
            })  # fmt: skip
            print(" ".join(f"{key}={value}" for key, value in rows[-1].items()), flush=True)
    return rows


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
        cells = [f"{r['registers']} / {r['spills']} / {r['shared']}" for t in targets if (r := found.get(t))]
        seconds = max(r["seconds"] for r in found.values())
        lines.append(f"| {' | '.join(map(str, key))} | {' | '.join(cells)} | {seconds} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
