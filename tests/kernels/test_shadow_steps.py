"""Steps that read a shadow of their state: exactly on numbers that fit in it, by the oracle on all others."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kvbuffer_compile.codegen import build
from kvbuffer_compile.ir.program import Read
from kvbuffer_compile.steps import ops
from tests.support.programs import NAMED
from tests.support.sessions import Session, make_plan

SHADOWED = ("gdn", "kda", "gla", "mamba2", "rwkv7", "deltaproduct2")
TARGETS = ("aten", "cpp")


def played(plan, target, steps=11, **options):
    """A session that was played; how many of its steps could be compared."""
    plan = replace(plan, target=target)
    op = ops.step_op(plan)
    if target == "cpp":
        if build.compiler() is None:
            pytest.skip("needs a C++ compiler")
        ops.use_cpp(plan)
    session = Session(plan, op, **options)
    while session.steps < steps and session.step():
        pass
    return session


def read_something(session):
    """Whether some sequence has a shadow by now, which the last step could read."""
    return bool((session.shadow[1] > 0).any())


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", SHADOWED)
def test_buffered(name, target):
    for inner in ("value", "key"):
        plan = make_plan(NAMED[name], sizes=(20, 37), inner=inner, read=torch.float16)
        if not any("exp" in str(op) for op in plan.program.ops):
            assert played(plan, target, limits=(2, 3, 3)).steps > 3
            assert read_something(played(plan, target, limits=(4, 2, 3), padded=(1,), strided=True))
        assert read_something(played(plan, target, exact=False, limits=(4, 3, 1)))
        assert read_something(played(plan, target, exact=False, bare=True, strided=True))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ["gdn", "gla", "rwkv7"])
def test_verify(name, target):
    plan = make_plan(NAMED[name], "verify", sizes=(20, 37), capacity=7, read=torch.float16)
    if not any("exp" in str(op) for op in plan.program.ops):
        assert played(plan, target, limits=(2, 3, 3)).steps > 2
    assert read_something(played(plan, target, exact=False, limits=(4, 3, 1)))
    assert read_something(played(plan, target, exact=False, bare=True))


@pytest.mark.parametrize("target", TARGETS)
def test_bfloat16(target):
    plan = make_plan(NAMED["gdn"], sizes=(20, 37), read=torch.bfloat16)
    assert played(plan, target, limits=(2, 3, 3)).steps > 3
    assert read_something(played(plan, target, exact=False, limits=(4, 3, 1)))


def test_every_recurrence_here_has_reads():
    assert all(any(isinstance(op, Read) for op in NAMED[name].ops) for name in SHADOWED)
