"""Buffered decoding for any model with linear attention: torch.compile(model, backend="kvbuffer").

torch is imported with the first of the public names that is asked for: `python -m kvbuffer_compile --help` need not
wait for it.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvbuffer_compile.public import *  # noqa: F403

__version__ = "0.1.0"
__all__ = [  # noqa: F405
    "Declined",
    "DeclinedError",
    "EmitError",
    "IRError",
    "OptionError",
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
    "read_slots",
    "rollback",
    "stats",
    "write_slots",
]

if not TYPE_CHECKING:

    def __getattr__(name):
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        public = importlib.import_module("kvbuffer_compile.public")
        globals().update({known: getattr(public, known) for known in __all__})
        return globals()[name]

    def __dir__():
        return sorted({*globals(), *__all__})
