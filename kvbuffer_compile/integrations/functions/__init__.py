"""Functions of other libraries that hide a recurrence, replaced while Dynamo traces for this backend.

Goes in: a call of a chunked or fused function of transformers, flash-linear-attention or mamba_ssm. Comes out: the same
call as a `kvbuffer::sequence` of a program.
Start with substitution.py. A function is a line of fla.py or state_space.py: its arguments as text (arguments.py) and
one of the recurrences in recurrences.py and several.py. Never imports what runs steps.
"""

from kvbuffer_compile.integrations.functions.substitution import LIBRARIES, watch

__all__ = ["LIBRARIES", "watch"]
