"""What runs in place of a compiled graph, and what happens on every other access.

Goes in: the call of a compiled graph, or anything else that touches a state. Comes out: the outputs, with accounts
opened, stepped, settled or taken back.
Start with step.py, then access.py. Never imports the backend, or passes but for their results.
"""

from kvbuffer_compile.runtime.by_hand import accounts_of, materialize, rollback, zero_state

__all__ = ["accounts_of", "materialize", "rollback", "zero_state"]
