"""The arguments with which torch tests its own operators, with a state in place of each tensor that it fits."""

from __future__ import annotations

import itertools
import sys
import types
import unittest
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tests.support.callables import SHAPES, STATE, Call, constant

SAMPLES = 6  # of an operator that are looked at


def samples() -> Iterator[Call]:
    """One call for each operator and place of a state: the first sample that takes it."""
    for info in _operators():
        found: set[Any] = set()
        for sample in itertools.islice(_samples(info), SAMPLES):
            for call in _with_states(info, sample):
                where = (call.args.index(STATE) if STATE in call.args else None, *call.kwargs)
                if where not in found and call.works():
                    found.add(where)
                    yield call


def _operators() -> list[Any]:
    if "expecttest" not in sys.modules:  # torch's tests want this package for a base class that is not used here
        empty = types.ModuleType("expecttest")
        empty.TestCase = unittest.TestCase  # type: ignore[attr-defined]
        sys.modules["expecttest"] = empty
    from torch.testing._internal.common_methods_invocations import op_db

    return [info for info in op_db if torch.float32 in info.dtypes and "empty" not in info.name]


def _samples(info: Any) -> Iterator[Any]:
    try:
        yield from info.sample_inputs("cpu", torch.float32, requires_grad=False)
    except (RuntimeError, ImportError, AttributeError):  # what needs other hardware or packages
        return


def _with_states(info: Any, sample: Any) -> Iterator[Call]:
    args = (sample.input, *sample.args)
    kept = {k: constant(v) for k, v in sample.kwargs.items()}
    for at, shape in itertools.product(range(len(args)), SHAPES):
        if isinstance(args[at], Tensor) and args[at].dtype == torch.float32:
            given = tuple(STATE if n == at else _copied(a) for n, a in enumerate(args))
            yield Call(f"{info.full_name}({at})", info.op, shape, given, kept)


def _copied(arg: Any) -> Any:
    """An argument that is new at every call, so that none sees what another has written."""
    return lambda shape: arg.clone() if isinstance(arg, Tensor) else arg
