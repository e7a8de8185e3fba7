"""Speculative decoding for transformers models with recurrent states.

Goes in: a model. Comes out: the same model, whose cache can take tokens back, so that `generate` accepts drafts.
Start with speculation.py, then recorded.py. Never imports the backend.
"""

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

__all__ = ["disable_speculation", "enable_speculation", "speculation_of"]
