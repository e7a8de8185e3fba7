"""Placeholder until the real one is merged."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import _disable_current_modes


@contextmanager
def neutral() -> Iterator[None]:
    with _disable_current_modes(), torch.inference_mode(False), torch.no_grad():
        yield
