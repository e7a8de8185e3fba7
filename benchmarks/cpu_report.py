"""What was measured on a CPU as tables and a picture, from the files in benchmarks/results.

    python -m benchmarks.cpu_report     prints the tables of the README and draws benchmarks/results/cpu.png

The files are written by benchmarks.cpu_kernels (cpu_kernels.json) and benchmarks.cpu (cpu_models*.json, one for each
run); each holds its command.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.cpu_kernels import fastest

RESULTS = Path(__file__).resolve().parent / "results"
NAMES = {"gdn": "Gated DeltaNet", "kda": "KDA", "mamba2": "Mamba-2", "gla": "GLA", "rwkv7": "RWKV-7", "mlstm": "mLSTM"}
Case = dict[str, Any]
COLOURS = {"inductor": "#8a5a00", "recurrent": "#7fb8d0", "buffered": "#0b6e99", "kvbuffer": "#0b6e99"}


def main() -> None:
    kernels, models = cases("cpu_kernels"), cases("cpu_models*")
    print("\n\n".join([sweeps(), *tables(kernels, models)]))
    draw(kernels, models, RESULTS / "cpu.png")


def cases(pattern: str) -> list[Case]:
    """What was measured, of all files of this name; each case with the processor it was measured on."""
    stored = (json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob(f"{pattern}.json")))
    return [case | {"processor": processor(found["machine"])} for found in stored for case in found["cases"]]


def processor(machine: dict[str, Any]) -> str:
    """Short, with the instructions that kernels are built of."""
    name = next((known for known in ("Xeon", "EPYC") if known in machine["cpu"]), machine["cpu"])
    return f"{name}, {machine.get('capability', 'AVX512').replace('AVX512', 'AVX-512')}"


# ------------------------------------------------------------------------------------------------ tables


STEPS = ("states", "of", "Inductor, ms", "recurrent, ms", "buffered, ms", "L", "gain", "buffered / read",
         "recurrent / copy", "4 drafts", "buffer only")  # fmt: skip
MODELS = ("model", "processor", "batch", "Inductor, ms a token", "kvbuffer, ms a token", "gain")


def tables(kernels: list[Case], models: list[Case]) -> Iterator[str]:
    """The tables of the README, in order."""
    yield table(STEPS, map(kernel_row, kernels))
    yield table(MODELS, map(model_row, compared(models)))


SWEEPS = ("processor", "slowest, of Inductor's time", "median", "left to Inductor", "own plans in the predicted order")


def sweeps() -> str:
    """What all stored sweeps of all cases came to."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("sweep_*_81.json"))]
    return table(SWEEPS, map(sweep_row, found))


def sweep_row(found: dict[str, Any]) -> list[str]:
    told = found["summary"]
    ordered, pairs = told["pairs in the predicted order"].split(" of ")
    share = f"{ordered} of {pairs} pairs ({100 * int(ordered) / int(pairs):.0f} %)"
    numbers = [f"{told[name]:.2f}" for name in ("slowest over Inductor", "median over Inductor")]
    return [processor(found["machine"]), *numbers, f"{told['declined']} of {told['cases']}", share]


def compared(models: list[Case]) -> list[Case]:
    """The cases that have both sides."""
    return [case for case in models if "inductor" in case]


def kernel_row(case: Case) -> list[str]:
    best = fastest(case)
    plain = best["recurrent"]
    times = [f"{best[name]:.3g}" for name in ("inductor", "recurrent", "buffered")] + [str(best["flush"])]
    gain = best["inductor"] / min(plain, best["buffered"])
    floors = [f"{best['buffered'] / best['read']:.2f}", f"{plain / best['copy']:.2f}"]
    others = [f"{4 * plain / best['verify 4']:.1f}x", f"{plain / best['bare at 32']:.1f}x"]
    return [f"{case['states']} x {case['MB']:.3g} MB", NAMES[case["case"]], *times, f"{gain:.1f}x", *floors, *others]


def model_row(case: Case) -> list[str]:
    plain, ours = (f"{case[side]['median_ms']:.0f}" for side in ("inductor", "kvbuffer"))
    head = [f"{case['layers']} layers", case["processor"], str(case["batch"])]
    return [*head, plain, ours, f"{case['gain_of_medians']:.2f}x"]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


# --------------------------------------------------------------------------------------------------- plot


def draw(kernels: list[Case], models: list[Case], path: Path) -> None:
    """Steps on the left, models on the right: less is better in both."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[5, 3])
    large = [case for case in kernels if case["states"] == max(c["states"] for c in kernels)]
    sides = ("inductor", "recurrent", "buffered")
    bars(left, sides, [[fastest(case)[side] for side in sides] for case in large])
    floor = sum(case["read"]["best"] for case in large) / len(large)
    left.axhline(floor, color="#444444", linestyle=":", linewidth=1, label="reading the state once")
    left.set_xticks(range(len(large)), [NAMES[case["case"]] for case in large])
    left.set(ylabel="ms a step", title=f"{large[0]['states']} states of {large[0]['MB']:.0f} MB in turn")
    newest = models[-1]["processor"]
    both = [case for case in compared(models) if case["processor"] == newest]
    bars(right, ("inductor", "kvbuffer"), [[case[s]["median_ms"] for s in ("inductor", "kvbuffer")] for case in both])
    right.set_xticks(range(len(both)), [f"batch {case['batch']}" for case in both])
    right.set(ylabel="ms a token", title=f"Qwen3.5-style model, {both[0]['layers']} layers")
    left.set_ylim(top=1.3 * left.get_ylim()[1])
    left.legend(frameon=False, loc="upper center", ncols=2)
    right.legend(frameon=False, loc="upper left")
    figure.savefig(path, dpi=110)


def bars(axes: Any, sides: Sequence[str], groups: Sequence[Sequence[float]]) -> None:
    """Groups of bars with their numbers above."""
    width = 0.8 / len(sides)
    for n, side in enumerate(sides):
        places = [i + (n - (len(sides) - 1) / 2) * width for i in range(len(groups))]
        drawn = axes.bar(places, [g[n] for g in groups], width, color=COLOURS[side], label=side)
        axes.bar_label(drawn, fmt=lambda x: f"{x:.2f}" if x < 10 else f"{x:.0f}", fontsize=7, padding=1)
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main()
