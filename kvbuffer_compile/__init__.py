"""Buffered decoding for any model with linear attention: torch.compile(model, backend="kvbuffer").

The names in `public.py` are this module's; torch is imported with the first of them, so that `--help` need not wait.
"""

from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from kvbuffer_compile.public import *  # noqa: F403
else:

    def __getattr__(name):
        if name.startswith("__") and name != "__all__":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        import importlib

        public = importlib.import_module("kvbuffer_compile.public")
        globals().update({known: getattr(public, known) for known in public.__all__}, __all__=public.__all__)
        if name not in globals():
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return globals()[name]

    def __dir__():
        return [*globals(), *__getattr__("__all__")]
