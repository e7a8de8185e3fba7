"""Steps with calls that C++ kernels have no spelling for: kernels around the calls, against the definition."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, seed, settings
from hypothesis import strategies as st

from kvbuffer_compile import materialize, rollback
from kvbuffer_compile.codegen import build
from kvbuffer_compile.codegen.cpp import cpp
from kvbuffer_compile.codegen.cut import pieces
from kvbuffer_compile.errors import EmitError
from kvbuffer_compile.ir.text import parse
from kvbuffer_compile.steps import cut_step
from tests.kernels.test_cpp import inners, lenient, play, shapes, sweep, variants
from tests.runtime.test_runtime import L, Pair, draw
from tests.support.daily import diagonal
from tests.support.programs import NAMED, random_programs
from tests.support.sessions import make_plan

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="needs a C++ compiler")

SAME = "aten.special_chebyshev_polynomial_t.n_scalar({}, 1)"  # T_1(x) = x, exact on integers
SECOND = "aten.special_chebyshev_polynomial_t.n_scalar({}, 2)"  # T_2(x) = 2 x^2 - 1


QKV = "  input q: key(b h)\n  input k: key(b)\n  input v: value(b h)\n  input g: scalar(h)\n  input beta: scalar(b h)\n"
PROGRAMS = {
    "error": f"""  decay g
  y = read k
  d = aten.sub.Tensor(v, y)
  e = {SAME.format("d")}
  u = aten.mul.Tensor(e, beta)
  update k, u
  o = read q
  return o""",
    # a read by what a call gave, over the other axis, and a call on what it reads; T_2(0) is not zero
    "twice": f"""  y = read k
  e = {SAME.format("y")}
  z = read e
  w = {SAME.format("z")}
  update w, v
  decay g
  o = read q
  p = {SECOND.format("o")}
  return p, y""",
    # a number of a head, keys shared by heads, an output that no call goes into
    "number": f"""  y = read k
  s = aten.sum.dim_IntList(y)
  t = {SAME.format("s")}
  u = aten.mul.Tensor(v, t)
  update k, u
  update k, t
  x = aten.mul.Tensor(v, beta)
  return y, x""",
}
CUT = {name: parse(f"program over b h tokens 1\n{QKV}{text}") for name, text in PROGRAMS.items()}


def test_where_steps_are_cut():
    error, append = pieces(CUT["error"], in_place=False)
    assert [len(stage.reads) for stage in error.schedule.stages] == [2, 0], "k and q are read in one pass"
    assert not append.schedule.stages[0].reads and [v.name for v in append.outputs] == ["o"]
    assert [len(piece.calls) for piece in pieces(CUT["twice"], in_place=False)] == [1, 1, 1, 0]
    assert len(pieces(NAMED["gdn"], in_place=False)) == 1


@pytest.mark.parametrize(("name", "variant"), diagonal(CUT, ["buffered", "recurrent", "verify"]))
def test_cut_steps_are_exact(name, variant):
    plan = make_plan(CUT[name], variant, sizes=(18, 5) if name == "twice" else (5, 18), capacity=7)
    assert play(plan, limits=(1, 3, 2)) > 1
    if variant != "recurrent":
        play(plan, limits=(4, 2, 3), padded=(1,), strided=True)
        play(plan, exact=False, bare=True)


def test_calls_compute_in_float32():
    plan = make_plan(parse(str(CUT["error"]).replace(SAME.format("d"), "aten.special_i0e.default(d)")))
    assert play(plan, exact=False, operands=torch.bfloat16) > 4


def cut(program):
    """Negation becomes a call that no kernel knows."""
    return parse(re.sub(r"aten\.neg\.default\((\w+)\)", lambda m: SAME.format(m[1]), str(program)))


negated = st.tuples(random_programs(), random_programs()).map(lambda two: max(two, key=lambda p: str(p).count("neg")))


@seed(5)
@settings(max_examples=4, **lenient)
@given(negated, variants, inners, st.booleans(), shapes)
def test_random_programs(program, variant, inner, merged, sizes):
    sweep(cut(program), variant, inner, merged, sizes, exact=True)


@pytest.mark.nightly
@settings(max_examples=50, **lenient)
@given(negated, variants, inners, st.booleans(), shapes)
def test_many_random_programs(program, variant, inner, merged, sizes):
    sweep(cut(program), variant, inner, merged, sizes, exact=True)


def test_several_tokens_have_no_kernel_of_their_own():
    with pytest.raises(EmitError, match="several tokens and aten.special_cheby"):
        cpp.emit(make_plan(CUT["error"], "verify"))


# --------------------------------------------------------------------------------------- compiled graphs


def odd_step(S, q, k, v, g, beta):
    """A delta rule whose error goes through a Bessel function."""
    new = S * g.exp()[..., None, None]
    error = torch.special.i0e(v - (new * k[..., None]).sum(-2)) * beta[..., None]
    new = new + k[..., None] * error[..., None, :]
    S.copy_(new)
    return (new * q[..., None]).sum(-2)


def three_tokens(S, q, k, v, g, beta):
    return torch.stack([odd_step(S, q + t, k, v - t, g, beta) for t in range(3)])


@pytest.mark.parametrize("fn", [odd_step, three_tokens])
def test_a_compiled_graph(fn, records):
    pair = Pair(fn, target="cpp", inner="inductor", capacity=L + 3)
    pair.run(L + 2)
    assert {p.target for r in records for _, p in r.rewritten} == {"cpp"}
    assert pair.owed > 0
    pair.check(pair.state + 0)
    pair.run(1)
    kept = pair.eager.clone(), pair.exact.clone()
    pair.run(1)
    rollback(pair.state, 3 if fn is three_tokens else 1)
    pair.eager, pair.exact = kept
    pair.run(2)
    materialize(pair.state)
    pair.check(pair.state + 0)


@pytest.mark.parametrize("fn", [odd_step, three_tokens])
def test_a_call_that_fails_loses_no_token(fn, monkeypatch):
    """At every fill level, also in the step that flushes."""
    pair = Pair(fn, target="cpp", capacity=L + 3)
    apply_map = cut_step.apply_map
    pair.run(2)
    for turn in range(2 * L):
        left = [turn % 3 if fn is three_tokens else 0]

        def torn(op, args, left=left):
            if not left[0]:
                raise MemoryError
            left[0] -= 1
            return apply_map(op, args)

        with monkeypatch.context() as patched, torch.no_grad():
            patched.setattr(cut_step, "apply_map", torn)
            with pytest.raises(MemoryError):
                pair.compiled(pair.state, *draw())
        if turn % 2:
            pair.check(pair.state + 0)
        pair.run(1)
    pair.check(pair.state + 0)
