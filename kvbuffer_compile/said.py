"""What a user is told of a compiled graph, as text: it is said again when the graph comes from a cache."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from kvbuffer_compile.errors import DeclinedError
from kvbuffer_compile.options import Options
from kvbuffer_compile.planning import loss_of, tell_of_loss
from kvbuffer_compile.process import callers
from kvbuffer_compile.records import GraphRecord

log = logging.getLogger("kvbuffer_compile")


@dataclass(frozen=True)
class Said:
    """on_decline: the option. plans: a line for each rewritten state. declines: a line for each matrix state that is
    not. loss: the first warning that a flush length which was asked for is predicted to lose, "" for none."""

    on_decline: str
    plans: tuple[str, ...]
    declines: tuple[str, ...]
    loss: str

    @staticmethod
    def of(record: GraphRecord, ours: Options) -> Said:
        """What is to be said of a graph."""
        plans = tuple(f"{record.name(one.state)}: {one.program.signature} {plan}" for one, plan in record.rewritten)
        seen = (record.predictions.get(one.state.name) for one, _ in record.rewritten)
        losses = [message for one in seen if one is not None and (message := loss_of(one, ours))]
        return Said(ours.on_decline, plans, tuple(map(str, record.declined)), losses[0] if losses else "")

    def say(self) -> None:
        """DeclinedError when states are declined that the user does not want to be."""
        if self.loss:
            tell_of_loss(self.loss)
        for line in self.plans:
            log.info("%s", line)
        for line in self.declines:
            log.info("declined %s", line)
            if self.on_decline == "warn":
                callers.warn(f"kvbuffer declined {line}")
        if self.declines and self.on_decline == "raise":
            raise DeclinedError("; ".join(self.declines))
