"""Draw the figures of how-it-works.md, cost-model.md and architecture.md:  python docs/figures/draw.py

The same Python and matplotlib give the same files: ids are salted with a constant, and no date is written.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, Rectangle

FOLDER = Path(__file__).parent
STATE, ROW, FRESH, FREE, INK = "#b2dfdb", "#ffe0b2", "#ffb74d", "#ffffff", "#263238"
SLOTS = 6  # of the buffer that is drawn


def main(folder: Path = FOLDER) -> None:
    """Write step.svg, flush.svg, verify.svg, bytes.svg and stages.svg into the folder."""
    plt.rcParams.update({"svg.hashsalt": "kvbuffer", "font.family": "DejaVu Sans", "font.size": 11})
    for name, draw in {"step": step, "flush": flush, "verify": verify, "bytes": traffic, "stages": stages}.items():
        figure = draw()
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None}, bbox_inches="tight")
        plt.close(figure)


def step() -> Any:
    figure, axes = canvas()
    box(axes, 0.2, 0.6, 2.2, 2.4, STATE, "base $B$\nK × V\n\nread, not written")
    buffer(axes, 3.6, owed=3, fresh=1, title="rows $k_i, u_i, a_i$")
    box(axes, 6.9, 1.5, 1.4, 0.8, FREE, "output $o$")
    arrow(axes, (2.4, 1.8), (3.5, 1.8), "$B^T(Aq)$")
    arrow(axes, (5.7, 1.9), (6.8, 1.9), "$+\\;w_i(k_i·q)\\,u_i$")
    note(axes, 4.6, 0.1, "this token's row is appended, the cursor moves by one")
    return figure


def flush() -> Any:
    figure, axes = canvas()
    buffer(axes, 0.2, owed=SLOTS, fresh=0, title="L rows owed")
    box(axes, 3.8, 0.6, 2.2, 2.4, STATE, "base $B$\nread and written\nonce in L tokens")
    buffer(axes, 6.6, owed=0, fresh=1, title="one row: this token")
    arrow(axes, (2.3, 1.8), (3.7, 1.8), "fold in")
    note(axes, 4.9, 0.1, "$B \\leftarrow A\\,B + \\sum_i w_i\\,k_i u_i^T$")
    return figure


def verify() -> Any:
    figure, axes = canvas()
    box(axes, 0.2, 0.6, 1.9, 2.4, STATE, "base $B$\none pass for\nall drafts")
    buffer(axes, 2.7, owed=2, fresh=3, title="2 rows owed, 3 drafts")
    triangle(axes, 5.3, 1.05)
    buffer(axes, 6.9, owed=3, fresh=0, title="1 draft accepted")
    note(axes, 4.6, 0.1, "rejected drafts: the cursor goes back, nothing is copied")
    return figure


def traffic() -> Any:
    """Bytes of a buffered step over those of reading and writing the state, K = V = 128."""
    figure, axes = plt.subplots(figsize=(7, 3.2))
    lengths = list(range(1, 65))
    for name, state, row in (("state and rows of one dtype", 4, 4), ("float32 state, bfloat16 rows", 4, 2)):
        axes.plot(lengths, [step_bytes(n, state, row) / (2 * state * 128 * 128) for n in lengths], label=name)
    axes.axhline(1.0, color=INK, linewidth=0.8, linestyle="--")
    axes.set(xlabel="L, tokens between two flushes", ylabel="bytes, over plain", ylim=(0.45, 1.25))
    axes.legend(frameon=False)
    return figure


def step_bytes(length: int, state: int, row: int, size: int = 128) -> float:
    """Mean bytes of a delta rule's step: one read, one write in L steps, a row appended, half of L read on average."""
    slot = 2 * size * row + 4  # key, value, gate
    return state * size * size * (1 + 1 / length) + slot * ((length - 1) / 2 + 1)


# Folder or file, what it does, and what it hands to the next.
COMPILING = (
    ("backend.py", "the pipeline in one function", ""),
    ("capture/", "loops written out, gradients refused", "FX graph (ATen, functionalised)"),
    ("passes/reading/, algebra/", "nodes to forms and labels; factors", ""),
    ("passes/walk/, tokens/, storage/", "forwards from a state; tokens; pools", ""),
    ("passes/lift/", "the whole way", "Lifted, or Declined with a reason"),
    ("passes/choice/", "cost model, flush length", "Plan"),
    ("passes/proof/", "graph and program in float64", "Plan"),
    ("codegen/, steps/", "a kernel, registered as a step op", "op"),
    ("passes/rewrite.py", "one op a state", "graph with step ops"),
    ("Inductor", "compiles the rest", ""),
)
CALLING = (
    ("runtime/entry.py, step.py", "the call; states by their aliases", "state"),
    ("accounts/", "rows, cursor, which steps count", "state, cursor, rows"),
    ("steps/", "the op reads the state, appends a row", ""),
)
LOOKING = (
    ("guard/", "who else looks at a state", "any other access"),
    ("runtime/access.py", "settles first", "rows are folded in"),
    ("accounts/", "", ""),
)


def stages() -> Any:
    """The folders in the order in which a graph, a call and somebody's look at a state go through them."""
    figure, axes = plt.subplots(figsize=(8.2, 9.2))
    axes.set(xlim=(0, 8.2), ylim=(-8.75, 0.5))
    axes.axis("off")
    chain(axes, 0.0, 0.0, "when a graph is compiled", COMPILING)
    chain(axes, 4.3, 0.0, "when it is called", CALLING)
    chain(axes, 4.3, -4.0, "when somebody else looks at a state", LOOKING)
    return figure


# ------------------------------------------------------------------------------------------------- parts


def chain(axes: Any, x: float, top: float, title: str, links: tuple[tuple[str, str, str], ...]) -> None:
    """Boxes one below the other, with what goes from each to the next beside the arrow."""
    axes.text(x + 1.9, top + 0.2, title, ha="center", color=INK, fontweight="bold")
    for place, (name, what, hands_on) in enumerate(links):
        y = top - 0.9 * place
        box(axes, x, y - 0.55, 3.8, 0.55, STATE if name != "Inductor" else FREE)
        axes.text(
            x + 1.9,
            y - (0.16 if what else 0.27),
            name,
            ha="center",
            va="center",
            color=INK,
            family="monospace",
            fontsize=10,
        )
        axes.text(x + 1.9, y - 0.39, what, ha="center", va="center", color=INK, fontsize=9.5)
        if place < len(links) - 1:
            axes.add_patch(
                FancyArrowPatch((x + 0.6, y - 0.55), (x + 0.6, y - 0.9), arrowstyle="-|>", mutation_scale=12, color=INK)
            )
            axes.text(x + 0.8, y - 0.72, hands_on, va="center", color=INK, fontsize=9, style="italic")


def canvas() -> tuple[Any, Any]:
    figure, axes = plt.subplots(figsize=(8.6, 3.3))
    axes.set(xlim=(0, 9), ylim=(0, 3.5))
    axes.axis("off")
    return figure, axes


def box(axes: Any, x: float, y: float, width: float, height: float, color: str, text: str = "") -> None:
    axes.add_patch(Rectangle((x, y), width, height, facecolor=color, edgecolor=INK))
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", color=INK)


def buffer(axes: Any, x: float, owed: int, fresh: int, title: str) -> None:
    """Slots from the top: owed rows, new rows, free ones; the cursor stands behind the last."""
    height = 2.4 / SLOTS
    for slot in range(SLOTS):
        color = ROW if slot < owed else FRESH if slot < owed + fresh else FREE
        box(axes, x, 3.0 - (slot + 1) * height, 2.0, height, color)
    axes.text(x + 1.0, 3.15, title, ha="center", va="bottom", color=INK)
    at = 3.0 - (owed + fresh) * height
    axes.plot([x - 0.12, x + 2.12], [at, at], color="#d84315", linewidth=2)


def triangle(axes: Any, x: float, y: float) -> None:
    """What a draft sees of the others."""
    for row in range(3):
        for column in range(3):
            box(axes, x + column * 0.4, y + (2 - row) * 0.4, 0.4, 0.4, FRESH if column <= row else FREE)
    axes.text(x + 0.6, y + 1.35, "sees", ha="center", color=INK)


def arrow(axes: Any, start: tuple[float, float], end: tuple[float, float], text: str) -> None:
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=14, color=INK))
    axes.text((start[0] + end[0]) / 2, start[1] + 0.15, text, ha="center", color=INK, fontsize=9)


def note(axes: Any, x: float, y: float, text: str) -> None:
    axes.text(x, y, text, ha="center", color=INK)


if __name__ == "__main__":
    main()
