"""What numbers and names options may be: known without importing torch, for the command line."""

from __future__ import annotations

TARGETS = ("auto", "aten", "cpp", "triton")
# Of flush and capacity. Rows take as many bytes as the state when there are K*V/(K+V) of them, 64 for 128 x 128: a
# buffer this long pays for no state below 131,072 x 131,072, and one slot more only costs. Loops over flush lengths and
# the indices of rows were tested up to here.
LONGEST = 1 << 16
COUNT = f"an integer from 1 to {LONGEST}"


def is_count(x: object) -> bool:
    """Whether flush or capacity may be this."""
    return isinstance(x, int) and not isinstance(x, bool) and 1 <= x <= LONGEST
