"""Bytes and predicted time per step against the flush length, the choice marked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvbuffer_compile.passes.choice.predict import Prediction

MOST = 4  # kinds of state in one plot
LABEL = 44  # characters of a label
BUFFERED, PLAIN = "#0b6e99", "#8a5a00"


def draw(curves: Sequence[tuple[str, Prediction]], path: str | Path, title: str) -> None:
    """Draw a row of two panels for each of the first (label, prediction) pairs. See Report.plot for the errors."""
    if not curves:
        raise ValueError("there is nothing to plot: no state of this report has a prediction")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Report.plot needs matplotlib: pip install 'kvbuffer_compile[plot]'") from error
    shown = curves[:MOST]
    figure = Figure(figsize=(10, 3.4 * len(shown)), layout="constrained")
    for (label, prediction), (left, right) in zip(shown, figure.subplots(len(shown), 2, squeeze=False), strict=True):
        _panel(left, prediction, "bytes", "MB moved per step", 1e-6)
        _panel(right, prediction, "seconds", *_time_unit(prediction.plain.seconds))
        for panel, what in ((left, "bytes"), (right, "time")):
            panel.set_title(f"{what} a step: {_short(label)} ({prediction.target})", loc="left", fontsize=9)
    figure.suptitle(title, x=0.01, ha="left", fontsize=10, wrap=True)
    figure.savefig(path, dpi=150)


def _short(label: str) -> str:
    """A label that leaves room for the title of the panel beside it."""
    return label if len(label) <= LABEL else f"{label[: LABEL // 2]}...{label[-LABEL // 2 :]}"


def _time_unit(seconds: float) -> tuple[str, float]:
    return ("predicted ms per step", 1e3) if seconds >= 1e-3 else ("predicted \u00b5s per step", 1e6)


def _panel(axes: Any, prediction: Prediction, what: str, unit: str, scale: float) -> None:
    flushes = [c.flush for c in prediction.candidates]
    plain = getattr(prediction.plain, what) * scale
    axes.plot(flushes, [getattr(c, what) * scale for c in prediction.candidates], "o-", color=BUFFERED, markersize=4)
    axes.axhline(plain, color=PLAIN, linestyle="--", linewidth=1)
    _note(axes, "Inductor", (flushes[-1], plain), 4, PLAIN, "right")
    axes.axvline(prediction.best_flush, color="#999999", linestyle=":", linewidth=1)
    choice = prediction.choice
    if choice is not None:
        at = (choice.flush, getattr(choice, what) * scale)
        axes.plot(*at, "o", color=BUFFERED, markersize=11, fillstyle="none", markeredgewidth=2)
        _note(axes, f"L = {choice.flush}", at, 12, BUFFERED, "center")
    axes.set_xscale("log", base=2)
    ticks = [2**i for i in range(max(flushes).bit_length())]
    axes.set_xticks(ticks, ["1\nrecurrent", *map(str, ticks[1:])])
    axes.set_ylim(0, 1.12 * max(plain, *(getattr(c, what) * scale for c in prediction.candidates)))
    axes.set(xlabel=f"flush length L (tokens), L* = {prediction.best_flush:.1f}", ylabel=unit)
    axes.grid(axis="y", linewidth=0.4)
    axes.spines[["top", "right"]].set_visible(False)


def _note(axes: Any, text: str, at: tuple[float, float], above: int, color: str, align: str) -> None:
    axes.annotate(text, at, xytext=(0, above), textcoords="offset points", ha=align, color=color)
