"""Speculative decoding and continuous batching for transformers models with recurrent states.

Goes in: a model. Comes out: the same model, whose cache can take tokens back, so that `generate` accepts drafts; or
whose states have slots beside the engine's pages, so that it is served. Start with speculation.py, then recorded.py;
with serving.py, then packed.py. Never imports the backend.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

try:
    import transformers  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"{__name__} needs transformers 5.17 or later ({error}): pip install 'kvbuffer_compile[transformers]', or "
        "pip install '.[transformers]' in a checkout"
    ) from error

from kvbuffer_compile.integrations.transformers.speculation import (
    disable_speculation,
    enable_speculation,
    speculation_of,
)

if TYPE_CHECKING:
    from kvbuffer_compile.integrations.transformers.serving import (
        disable_continuous_batching,
        enable_continuous_batching,
    )

__all__ = [
    "disable_continuous_batching",
    "disable_speculation",
    "enable_continuous_batching",
    "enable_speculation",
    "speculation_of",
]


def __getattr__(name: str) -> Any:
    """The engine is imported when it is asked for: other versions of transformers have another one, or none."""
    if name in ("disable_continuous_batching", "enable_continuous_batching"):
        from kvbuffer_compile.integrations.transformers import serving

        return getattr(serving, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
