"""What is said of a choice: why a plan was taken, or why none was, with the numbers."""

from __future__ import annotations

from kvbuffer_compile.errors import Declined
from kvbuffer_compile.passes.choice.predict import Candidate, Prediction
from kvbuffer_compile.passes.choice.working_set import hint
from kvbuffer_compile.passes.lifted import Lifted


def why(prediction: Prediction, best: Candidate, asked: bool) -> str:
    """What a plan says of how it was chosen."""
    verb = f"flush={best.flush} as asked" if asked else f"{best.variant}, L={best.flush}"
    seen = "predicted" if best.measured is None else f"expected, its kernel measured at {duration(best.measured)}"
    return (
        f"{prediction.formula}; {verb}: {duration(best.seconds)} a step {seen}, Inductor "
        f"{duration(prediction.plain.seconds)} ({best.gain:.2f}x), state {prediction.state_bytes / 1e6:.3g} MB"
    )


def duration(seconds: float) -> str:
    """A time for people, three digits."""
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} us"


def no_gain(lifted: Lifted, prediction: Prediction) -> Declined:
    """The decline of a state that is left to Inductor, with the numbers."""
    best = min(prediction.candidates, key=lambda c: c.seconds)
    seen = "is predicted" if best.measured is None else "was measured"
    rows = min((c for c in prediction.candidates if c.flush > 1), key=lambda c: c.seconds, default=best)
    reason = _of_block(lifted, prediction) + (
        f"{best.variant} with L={best.flush} {seen} to take {duration(best.seconds)} a step "
        f"({prediction.target}) and Inductor {duration(prediction.plain.seconds)}: {best.gain:.2f}x, "
        f"{prediction.needed:g}x is needed{busy(prediction)}; state {prediction.state_bytes / 1e6:.3g} MB; "
        f"{prediction.formula}; options={{'flush': {max(rows.flush, 2)}}} buffers it all the same"
    )
    return Declined(lifted.state.name, "no-gain", reason, lifted.source)


def busy(prediction: Prediction) -> str:
    """That the numbers are those of a busy machine, "" where they are not."""
    advice = prediction.machine.advice
    return f" (this machine was measured {advice})" if advice else ""


def _of_block(lifted: Lifted, prediction: Prediction) -> str:
    """What is different about several tokens by one product."""
    if not lifted.block:
        return ""
    count, rows = hint(lifted.tokens), prediction.slot_bytes * hint(lifted.tokens)
    untimed = "blocks are not timed on GPUs, so one is only taken where flush is a number; "
    return (untimed if prediction.target == "triton" else "") + (
        f"the {count} tokens of a call read the state by one product and write it once already, and their rows are "
        f"{rows / 1e6:.3g} MB: "
    )
