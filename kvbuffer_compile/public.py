"""The public names, imported when the first of them is asked for (`__init__.py`)."""

from kvbuffer_compile.backend import kvbuffer
from kvbuffer_compile.errors import Declined, DeclinedError, EmitError, IRError, StateError
from kvbuffer_compile.explanation import explain
from kvbuffer_compile.options import Options
from kvbuffer_compile.report.report import Report, StateReport
from kvbuffer_compile.runtime.by_hand import materialize, rollback
from kvbuffer_compile.runtime.drafts import accept, draft_tree
from kvbuffer_compile.runtime.entry import keep_out
from kvbuffer_compile.runtime.stats import StateStats, Stats, stats

keep_out(accept, explain, materialize, rollback, stats)

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
