"""What a graph as a whole gains: its states are only a part of what a call moves."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from kvbuffer_compile.passes.choice.predict import Prediction
from kvbuffer_compile.passes.lifted import Call


@dataclass(frozen=True)
class WholeCall:
    """What one call of a graph moves, and what it gains as a whole. bytes: of everything it touches, state_bytes: of
    the states among it. gain: predicted, over Inductor; 1.0 where all states are left to it."""

    bytes: int
    state_bytes: int
    gain: float

    @property
    def share(self) -> float:
        """How much of what is touched are states."""
        return min(self.state_bytes / self.bytes, 1.0)

    def __str__(self) -> str:
        parts = f"one call touches {in_bytes(self.bytes)}, {self.share:.0%} of it states"
        return f"{parts}; as a whole {self.gain:.2f}x predicted"


def whole_call(predictions: Iterable[Prediction | None], call: Call) -> WholeCall | None:
    """Of the predictions for the states of a graph; None where nothing is predicted."""
    seen = [prediction for prediction in predictions if prediction is not None]
    if not seen or not call.bytes:
        return None
    own = sum(p.state_bytes for p in seen)
    rest = max(call.bytes - own, 0) / seen[0].machine.speed("read", call.bytes)
    plain = rest + sum(p.plain.seconds for p in seen)
    ours = rest + sum((p.choice or p.plain).seconds for p in seen)
    return WholeCall(call.bytes, own, plain / ours)


def in_bytes(size: float) -> str:
    """A number of bytes for people, three digits."""
    for unit in ("B", "KB", "MB"):
        if abs(size) < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"
