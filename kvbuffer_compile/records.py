"""What was decided about each graph, and who is told."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from torch.fx import Node

from kvbuffer_compile.errors import Declined
from kvbuffer_compile.ir.plan import Plan
from kvbuffer_compile.passes.choice.predict import Prediction
from kvbuffer_compile.passes.lifted import ALONE, Call, Lifted, Refused

MENTIONED = re.compile(r" \(`([^`]+)`\)")  # an input of the graph within a reason


@dataclass(frozen=True)
class GraphRecord:
    """What was decided about one graph: for reports and tests.

    states: every lifted state with its plan or reason. refused: what else is written. why_not: why the whole graph was
    left alone. names: the user's names of the graph's inputs, by placeholder. pools: of placeholders that stood for
    rows of a pool, that of the pool. call: what one call of the graph touches. predictions: what the cost model says of
    a state, by its placeholder.
    """

    states: tuple[tuple[Lifted, Plan | Declined], ...] = ()
    refused: tuple[Refused, ...] = ()
    why_not: Declined | None = None
    names: Mapping[str, str] = field(default_factory=dict)
    pools: Mapping[str, Node] = field(default_factory=dict)
    call: Call = ALONE
    predictions: Mapping[str, Prediction] = field(default_factory=dict)

    def name(self, state: Node) -> str:
        """What the user calls an input, e.g. "cache.layers[0].recurrent_states[0]"."""
        return self.names.get(state.name, state.name)

    def told(self, reason: str) -> str:
        """A reason with the user's names of the inputs that it mentions; those that have none are left out."""
        known = lambda match: f" (`{self.names[match[1]]}`)" if match[1] in self.names else ""  # noqa: E731
        return MENTIONED.sub(known, reason)

    @property
    def rewritten(self) -> list[tuple[Lifted, Plan]]:
        return [(lifted, plan) for lifted, plan in self.states if isinstance(plan, Plan)]

    @property
    def declined(self) -> list[Declined]:
        """Why matrix states are not rewritten, each by the user's name of it. What is no matrix state is not among
        them: it is kept."""
        found = [(one.state, why) for one, why in self.states if isinstance(why, Declined)]
        found += [(one.state, one.why) for one in self.refused if not one.kept]
        return [replace(why, node=self.name(state), reason=self.told(why.reason)) for state, why in found]


@dataclass
class Observers:
    """Who is told about every graph the backend decides on (explain, tests)."""

    listeners: list[Callable[[GraphRecord], None]] = field(default_factory=list)

    @contextmanager
    def also(self, listener: Callable[[GraphRecord], None]) -> Iterator[None]:
        """With one more listener."""
        self.listeners.append(listener)
        try:
            yield
        finally:
            self.listeners.remove(listener)

    def tell(self, record: GraphRecord) -> None:
        for listener in self.listeners:
            listener(record)


observers = Observers()
