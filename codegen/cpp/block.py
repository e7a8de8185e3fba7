"""The item of a block step: T tokens that all read the state as it was before the call, and the rows owed."""

from __future__ import annotations

from collections.abc import Sequence

from kvbuffer_compile.codegen.cpp.verify import VerifyItem
from kvbuffer_compile.ir.program import Kind, Var


class BlockItem(VerifyItem):
    """Prints `run_item` for a block of T tokens, T known at run time."""

    def _later_of_next(self, decays: Sequence[Var], faded: Sequence[Kind]) -> None:
        """No token fades what the next one reads."""

    def _after_token(self) -> None:
        """No token is a row to the next one."""
