"""results/gpu_pins.json: what main kernels are made of, so that worse code shows without a GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import triton

from benchmarks.static_gpu.cases import Case
from benchmarks.static_gpu.predict import steps
from benchmarks.static_gpu.trace import trace
from benchmarks.static_gpu.traffic import state_passes

OUT = Path(__file__).parents[1] / "results" / "gpu_pins.json"
COMMAND = "python -m benchmarks.static_gpu --pins"
BATCH = 128
PINNED = (
    Case("gdn", "float32", "recurrent"), Case("gdn", "float32", "buffered"), Case("gdn", "bfloat16", "verify"),
    Case("mamba2", "bfloat16", "buffered"), Case("mamba2", "float32", "verify"),
    Case("kda", "bfloat16", "recurrent"), Case("kda", "bfloat16", "buffered"), Case("kda", "float32", "verify"),
    Case("gdn", "bfloat16", "buffered", slots=True),
)  # fmt: skip
# How far a number may be from its pin, as a share of it: with the Triton that pinned it, and with another one.
ROOM = {"instructions": (0.03, 0.2), "flush_instructions": (0.03, 0.2), "registers": (0.06, 0.25),
        "loads": (0.001, 0.001), "stores": (0.001, 0.001)}  # fmt: skip


def found(case: Case) -> dict[str, Any]:
    """What a kernel is made of. instructions: of a warp in a steady step, flush_instructions: in one that flushes;
    loads, stores: bytes of the state that a steady step asks for, in states (`traffic.state_passes`); registers,
    spills: of a thread, the latter in bytes. FileNotFoundError where Triton bundles no ptxas or nvdisasm."""
    k = case.kernel(BATCH)
    steady, folding = (trace(k.code, k.branches, step) for step in steps(k))
    loads, stores = state_passes(steady, k)
    row: dict[str, Any] = dict(zip(("case", "state", "variant"), case.names, strict=True))
    row["instructions"] = len(steady)
    row |= {"flush_instructions": len(folding)} if case.variant != "recurrent" else {}
    return row | {"registers": k.registers, "spills": k.spills, "loads": round(loads, 4), "stores": round(stores, 4)}


def known() -> dict[str, Any]:
    """The file."""
    return json.loads(OUT.read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def complaints(case: Case) -> list[str]:
    """What is no longer as it was pinned; fewer instructions too, or a later loss would hide behind them."""
    pinned, now = known(), found(case)
    (pin,) = [row for row in pinned["kernels"] if (row["case"], row["state"], row["variant"]) == case.names]
    other = pinned["triton"] != triton.__version__
    said = [
        f"{name} {now[name]} instead of {pin[name]}"
        for name, room in ROOM.items()
        if name in pin and abs(now[name] - pin[name]) > room[other] * max(1, pin[name])
    ]
    return said + (
        [f"spills {now['spills']} bytes instead of {pin['spills']}"] if now["spills"] > pin["spills"] else []
    )


def renew(path: Path = OUT) -> None:
    rows = [found(case) for case in PINNED]
    head = {"command": COMMAND, "target": "sm_90", "batch": BATCH, "triton": triton.__version__}
    lines = ",\n".join("  " + json.dumps(row) for row in rows)
    opening = json.dumps(head, indent=1).removesuffix("\n}")
    path.write_text(f'{opening},\n "kernels": [\n{lines}\n ]\n}}\n', encoding="utf-8")
