"""What was measured on a CPU as tables and a picture, from the files in benchmarks/results.

    python -m benchmarks.cpu_report     prints the tables of the README and draws benchmarks/results/cpu.png

The files are written by benchmarks.cpu_kernels (cpu_kernels.json) and benchmarks.cpu (cpu_models.json).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

RESULTS = Path(__file__).resolve().parent / "results"
NAMES = {"gdn": "Gated DeltaNet", "kda": "KDA", "mamba2": "Mamba-2", "gla": "GLA", "rwkv7": "RWKV-7"}
COLOURS = {"inductor": "#8a5a00", "recurrent": "#7fb8d0", "buffered": "#0b6e99", "kvbuffer": "#0b6e99"}


def main() -> None:
    kernels, models = stored("cpu_kernels"), stored("cpu_models")
    print("\n\n".join(tables(kernels, models)))
    draw(kernels, models, RESULTS / "cpu.png")


def stored(name: str) -> dict[str, Any]:
    """One file of results."""
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


# ------------------------------------------------------------------------------------------------ tables


def tables(kernels: dict[str, Any], models: dict[str, Any]) -> Iterator[str]:
    """The tables of the README, in order."""
    head = ["one step, ms", "batch", "Inductor", "recurrent", "buffered", "gain", "buffered / read", "recurrent / copy"]
    yield table(head, [kernel_row(case) for case in kernels["cases"]])
    head = ["model", "batch", "Inductor, ms a token", "kvbuffer, ms a token", "gain", "p99 / median"]
    yield table(head, [model_row(case) for case in models["cases"]])


def kernel_row(case: dict[str, Any]) -> list[str]:
    best = {name: x["best"] for name, x in case.items() if isinstance(x, dict)}
    gain = best["inductor"] / min(best["recurrent"], best["buffered"])
    times = [f"{best[name]:.2f}" for name in ("inductor", "recurrent", "buffered")]
    floors = [f"{best['buffered'] / best['read']:.2f}", f"{best['recurrent'] / best['copy']:.2f}"]
    return [NAMES[case["case"]], str(case["batch"]), *times, f"{gain:.1f}x", *floors]


def model_row(case: dict[str, Any]) -> list[str]:
    plain = f"{case['inductor']['median_ms']:.0f}" if "inductor" in case else "-"
    gain = f"{case['gain_of_medians']:.2f}x" if "inductor" in case else "-"
    ours = case["kvbuffer"]
    return [
        f"{case['layers']} layers", str(case["batch"]), plain, f"{ours['median_ms']:.0f}", gain,
        f"{ours['p99_over_median']:.2f}",
    ]  # fmt: skip


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


# --------------------------------------------------------------------------------------------------- plot


def draw(kernels: dict[str, Any], models: dict[str, Any], path: Path) -> None:
    """Steps on the left, models on the right: less is better in both."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[5, 3])
    large = [case for case in kernels["cases"] if case["batch"] == max(c["batch"] for c in kernels["cases"])]
    sides = ("inductor", "recurrent", "buffered")
    bars(left, sides, [[case[side]["best"] for side in sides] for case in large])
    floor = sum(case["read"]["best"] for case in large) / len(large)
    left.axhline(floor, color="#444444", linestyle=":", linewidth=1)
    left.annotate("reading the state once", (len(large) - 0.5, floor), (0, 3), textcoords="offset points", ha="right")
    left.set_xticks(range(len(large)), [NAMES[case["case"]] for case in large])
    left.set(ylabel="ms a step", title=f"one layer, batch {large[0]['batch']}, state of {large[0]['MB']:.0f} MB")
    both = [case for case in models["cases"] if "inductor" in case]
    bars(right, ("inductor", "kvbuffer"), [[case[s]["median_ms"] for s in ("inductor", "kvbuffer")] for case in both])
    right.set_xticks(range(len(both)), [f"batch {case['batch']}" for case in both])
    right.set(ylabel="ms a token", title=f"Qwen3.5-style model, {both[0]['layers']} layers")
    figure.savefig(path, dpi=110)


def bars(axes: Any, sides: Sequence[str], groups: Sequence[Sequence[float]]) -> None:
    """Groups of bars with their numbers above."""
    width = 0.8 / len(sides)
    for n, side in enumerate(sides):
        places = [i + (n - (len(sides) - 1) / 2) * width for i in range(len(groups))]
        drawn = axes.bar(places, [g[n] for g in groups], width, color=COLOURS[side], label=side)
        axes.bar_label(drawn, fmt=lambda x: f"{x:.1f}" if x < 10 else f"{x:.0f}", fontsize=7, padding=1)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main()
