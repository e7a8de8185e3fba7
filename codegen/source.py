"""A builder of indented source text."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class Source:
    """Lines of C-like source. `block` opens a brace, indents what is added inside, and closes it."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._depth = 0

    def line(self, text: str = "") -> None:
        """Add one line at the current depth."""
        self._lines.append("  " * self._depth + text if text else "")

    def lines(self, text: str) -> None:
        """Add every line of a text at the current depth."""
        for part in text.splitlines():
            self.line(part)

    def comment(self, text: str) -> None:
        """Add a text as `//` comments."""
        for part in text.splitlines():
            self.line(f"// {part}".rstrip())

    @contextmanager
    def block(self, head: str = "", tail: str = "") -> Iterator[None]:
        """`head { ... }tail`, with what is added meanwhile inside the braces."""
        self.line(f"{head} {{".lstrip())
        self._depth += 1
        yield
        self._depth -= 1
        self.line("}" + tail)

    def __str__(self) -> str:
        return "\n".join(self._lines) + "\n"
