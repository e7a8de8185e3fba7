"""Buffered decoding for any model with linear attention: torch.compile(model, backend="kvbuffer")."""

from kvbuffer_compile.backend import kvbuffer
from kvbuffer_compile.errors import Declined, DeclinedError, EmitError, IRError, StateError
from kvbuffer_compile.explain import explain
from kvbuffer_compile.options import Options
from kvbuffer_compile.report.report import Report, StateReport
from kvbuffer_compile.runtime.by_hand import materialize, rollback
from kvbuffer_compile.runtime.drafts import accept, draft_tree
from kvbuffer_compile.runtime.entry import keep_out
from kvbuffer_compile.runtime.stats import StateStats, Stats, stats

keep_out(accept, explain, materialize, rollback, stats)

__version__ = "0.1.0"
__all__ = [
    "Declined",
    "DeclinedError",
    "EmitError",
    "IRError",
    "Options",
    "Report",
    "StateError",
    "StateReport",
    "StateStats",
    "Stats",
    "accept",
    "draft_tree",
    "explain",
    "kvbuffer",
    "materialize",
    "rollback",
    "stats",
]
