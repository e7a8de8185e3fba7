"""Functions of other libraries that hide a recurrence, replaced while Dynamo traces for this backend.

Goes in: a call of a chunked or fused function of transformers, flash-linear-attention or mamba_ssm. Comes out: the same
call as a `kvbuffer::sequence` of a program.
Start with substitution.py, add functions in chunked.py and fused.py. Never imports what runs steps.
"""

from kvbuffer_compile.integrations.functions.substitution import LIBRARIES, watch

__all__ = ["LIBRARIES", "watch"]
