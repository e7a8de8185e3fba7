"""Why the walk of a state ends, in words that say what to write instead."""

from __future__ import annotations

VECTOR = "the state has no second axis: it is a vector, not a matrix memory"
RESHAPED = "the state is reshaped across its axes in a way that cannot be followed: keep a dim for each axis"
WIDER = "a sum runs over an axis of the state and one of another tensor at once: read by one key at a time"
COUPLED = (
    "what another state{} becomes depends on this one element by element, as with momentum, or two states rotated into "
    "each other: states may feed each other by what is read from them, and each must be updated by products of keys "
    "and values"
)
TWICE = "the state is stored twice in one call: store what it is in the end"
RETURNED = "the state itself is returned from the graph, which needs it in memory: return what is read"
ALL_RETURNED = "the states of several tokens are returned from the graph: return the last one and what is read"
TRANSPOSED = "the next state is stored with its axes in another order: transpose what is read instead"
FULL_DECAY = (
    "the decay varies along both axes of the state, so each element forgets at a rate of its own (as in Mamba-1): it "
    "must be one factor a head, a row or a column, or a product of these; else no few rows can stand for what is owed, "
    "and there is nothing to be done"
)
MIXED = (
    "the state is added to itself with heads, rows or columns mixed, as by a mean over them: each element may only be "
    "scaled, mix what is read instead"
)
