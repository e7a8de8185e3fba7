"""Speculative decoding for transformers models with recurrent states.

Goes in: a model. Comes out: the same model, whose cache can take tokens back, so that `generate` accepts drafts.
Start with speculation.py, then recorded.py. Never imports the backend.
"""

from kvbuffer_compile.integrations.transformers.speculation import (
    disable_speculation,
    enable_speculation,
    speculation_of,
)

__all__ = ["disable_speculation", "enable_speculation", "speculation_of"]
