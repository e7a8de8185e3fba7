"""Buffered decoding for any model with linear attention: torch.compile(model, backend="kvbuffer")."""

from kvbuffer_compile.backend import kvbuffer
from kvbuffer_compile.drafts import accept, draft_tree
from kvbuffer_compile.entry import keep_out
from kvbuffer_compile.errors import Declined, DeclinedError, EmitError, IRError, StateError
from kvbuffer_compile.explain import explain
from kvbuffer_compile.options import Options
from kvbuffer_compile.report import Report, StateReport
from kvbuffer_compile.runtime import materialize, rollback

keep_out(accept, explain, materialize, rollback)

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
    "accept",
    "draft_tree",
    "explain",
    "kvbuffer",
    "materialize",
    "rollback",
]
