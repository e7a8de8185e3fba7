"""Programs: the verifier, the text form, canonical names, runs that go wrong."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import given, settings

from kvbuffer_compile.errors import IRError
from kvbuffer_compile.ir.program import Decay, Map, Program, Read, Update, Var, rename, verify
from kvbuffer_compile.ir.text import parse
from tests.support.programs import NAMED, random_programs

Q, KEY, VAL, G = (Var(n, kind, ("b",)) for n, kind in (("q", "key"), ("k", "key"), ("v", "value"), ("g", "scalar")))
OUT = Var("o", "value", ("b",))


def program(*ops, inputs=(Q, KEY, VAL, G), outputs=(OUT,), lanes=("b",), tokens=1):
    return Program(lanes, inputs, ops, outputs, tokens)


GOOD = program(Decay(G), Update(KEY, VAL), Read(OUT, Q))


def test_a_good_program_passes():
    assert verify(GOOD) is GOOD and GOOD.signature == "DUR"
    assert GOOD.logged == (G, KEY, VAL)


BAD = {
    "used before it is defined": program(Update(KEY, OUT), Read(OUT, Q)),
    "defined twice": program(Read(OUT, Q), Read(OUT, KEY)),
    "axes swapped": program(Update(VAL, KEY), Read(OUT, Q)),
    "read of scalar": program(Read(OUT, G)),
    "runs along": program(Read(Var("o", "key", ("b",)), Q), outputs=()),
    "depends on a read": program(Read(OUT, Q), Decay(OUT)),
    "mixes": program(Map(OUT, "aten.mul.Tensor", (KEY, VAL))),
    "must reduce": program(Map(OUT, "aten.sum.dim_IntList", (VAL,))),
    "has kind": program(Map(OUT, "aten.neg.default", (KEY,))),
    "not defined": program(Update(KEY, VAL)),
    "unknown lanes": program(Read(OUT, Q), inputs=(replace(Q, lanes=("b", "x")), KEY, VAL, G)),
    "at least one token": program(Read(OUT, Q), tokens=0),
    "one name": program(Read(OUT, Q), lanes=("b", "b")),
}


@pytest.mark.parametrize("message", BAD)
def test_a_broken_program_is_refused_with_its_text(message):
    with pytest.raises(IRError, match=message) as caught:
        verify(BAD[message])
    assert "program over" in str(caught.value)


def test_a_decay_that_depends_on_a_read_through_a_map_is_refused():
    s = Var("s", "scalar", ("b",))
    with pytest.raises(IRError, match="depends on a read"):
        verify(program(Read(OUT, Q), Map(s, "aten.sum.dim_IntList", (OUT,)), Decay(s)))


@pytest.mark.parametrize("name", NAMED)
def test_the_text_form_of_named_recurrences_reads_back(name):
    assert parse(str(NAMED[name])) == NAMED[name]


@settings(deadline=None, max_examples=100)
@given(random_programs(exact=False))
def test_the_text_form_reads_back(p):
    again = parse(str(p))
    assert str(again) == str(p) and again.ops == p.ops and again.inputs == p.inputs and again.outputs == p.outputs


@settings(deadline=None, max_examples=50)
@given(random_programs())
def test_canonical_names_forget_the_old_ones(p):
    other = parse(re.sub(r"\b([a-z]\d+)\b", r"other_\1", str(p)))
    assert p.inputs == () or other != p
    assert rename(rename(p)) == rename(p) == rename(other)
    verify(rename(p))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "programme over b tokens 1",
        "program over b tokens 1\n  decay g",
        "program over b tokens 1\n  input g: matrix(b)",
        "program over b tokens 1\n  input g: scalar(b)\n  g decays",
        "program over b tokens 1\n  input g: scalar(b)\n  x = aten.mul.Tensor(g, two)",
    ],
)
def test_bad_text_is_refused(text):
    with pytest.raises(IRError):
        parse(text)
