"""Which line of the user's code a call came from."""

from __future__ import annotations

import os
import sys
import sysconfig
import warnings
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch

_OURS = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_TORCH = os.path.dirname(os.path.abspath(torch.__file__)) + os.sep
_EVAL_FRAME = os.path.join(_TORCH, "_dynamo", "eval_frame.py")
_LIBRARY = sysconfig.get_path("stdlib") + os.sep
_INSTALLED = (sysconfig.get_path("purelib") + os.sep, sysconfig.get_path("platlib") + os.sep)
_warned: dict[Any, Any] = {}  # what Python remembers of warnings that were given
_once: set[Hashable] = set()  # what was warned of once


@dataclass(frozen=True)
class Site:
    """A line of code. near: the first that is neither ours nor torch's; user: the first in no installed package."""

    near: tuple[str, int]
    user: tuple[str, int]

    @staticmethod
    def find() -> Site | None:
        """The line that called us."""
        frames = ((f.f_code.co_filename, f.f_lineno) for f in _callers() if _is_foreign(f))
        near = next(frames, None)
        if near is None:
            return None
        outside = near if not near[0].startswith(_INSTALLED) else next(
            (at for at in frames if not at[0].startswith(_INSTALLED)), near
        )  # fmt: skip
        return Site(near, outside)

    def warn(self, message: str) -> None:
        """Warn as if that line had; as often as Python's filters say, by default once for a line and a text."""
        warnings.warn_explicit(message, UserWarning, *self.user, registry=_warned)

    def __str__(self) -> str:
        near, user = (f"{file}:{line}" for file, line in (self.near, self.user))
        return near if near == user else f"{near}, called at {user}"


def warn(message: str) -> None:
    """Warn as if the user's line that called us had: a line of ours says nothing to whoever reads the warning."""
    site = Site.find()
    if site is None:
        warnings.warn(message, stacklevel=2)
    else:
        site.warn(message)


def warn_once(about: Hashable, message: str) -> None:
    """Warn at the first call with this `about` in the process."""
    if about not in _once:
        _once.add(about)
        warn(message)


def _callers() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _is_compiled(frame: FrameType) -> bool:
    """Whether a frame is code that Dynamo has made in place of a function."""
    caller = frame.f_back
    called = caller is not None and caller.f_code.co_filename == _EVAL_FRAME
    return called and frame.f_lineno == frame.f_code.co_firstlineno


def _is_foreign(frame: FrameType) -> bool:
    file = frame.f_code.co_filename
    if _is_compiled(frame):  # the line of its def says nothing of who called it
        return False
    if file.startswith("<"):  # generated, or typed in by a person
        return frame.f_globals.get("__name__") == "__main__"
    if file.startswith((_OURS, _TORCH)):
        return False
    return file.startswith(_INSTALLED) or not file.startswith(_LIBRARY)
