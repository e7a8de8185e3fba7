"""Who runs a step: generated kernels, composite ones where there can be none, and what the user is told."""

import warnings

import pytest
import torch

from kvbuffer_compile.codegen import build
from kvbuffer_compile.errors import EmitError
from kvbuffer_compile.steps import ops, targets
from tests.runtime.test_runtime import draw, step

B, H, K, V = 3, 2, 8, 16
OPTIONS = {"inner": "eager", "flush": 4}


@pytest.fixture
def told():
    """The warnings of a test; what was said before is said again."""
    targets._said.clear()
    targets._built.cache_clear()
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        yield found


def about_speed(found) -> list[str]:
    return [str(w.message) for w in found if "slower composite steps" in str(w.message)]


def odd_step(S, q, k, v, g, beta):
    """A delta rule whose error goes through a function that kernels cannot spell."""
    S.mul_(g[..., None, None])
    error = torch.digamma((v - (S * k[..., None]).sum(-2)).abs() + 1)
    S.add_(k[..., None] * (error * beta[..., None])[..., None, :])
    return (S * q[..., None]).sum(-2)


def compare(plain, records, options=None, steps=6):
    """Some steps of plain torch and of the backend; returns the plans."""
    ours = torch.randn(B, H, K, V)
    theirs = ours.clone()
    compiled = torch.compile(plain, backend="kvbuffer", options={**OPTIONS, **(options or {})})
    with torch.no_grad():
        for _ in range(steps):
            inputs = draw()
            torch.testing.assert_close(compiled(ours, *inputs), plain(theirs, *inputs))
        torch.testing.assert_close(ours + 0, theirs)
    return [plan for record in records for _, plan in record.rewritten]


@pytest.mark.skipif(build.compiler() is None, reason="needs a C++ compiler")
def test_an_op_without_spelling_cuts_the_step(records, told, tmp_path):
    plans = compare(odd_step, records, {"dump": tmp_path})
    assert {p.target for p in plans} == {"cpp"} and "U" in plans[0].program.signature
    assert not about_speed(told)
    assert "namespace piece_1" in next(tmp_path.rglob("*.cpp")).read_text()


@pytest.fixture
def unbuildable(monkeypatch):
    def library(source, afresh=False):
        raise EmitError("the compiler is broken")

    monkeypatch.setattr(build, "library", library)
    monkeypatch.setattr(build, "_loaded", {})
    ops.use_cpp.cache_clear()


@pytest.mark.skipif(build.compiler() is None, reason="needs a C++ compiler")
def test_what_cannot_be_built_runs_in_composite_steps(records, told, unbuildable):
    plans = compare(odd_step, records, {"flush": 5})
    assert {p.target for p in plans} == {"aten"}
    (message,) = about_speed(told)
    assert "the compiler is broken" in message


@pytest.mark.skipif(build.compiler() is None, reason="needs a C++ compiler")
def test_composite_steps_must_pay_too(records, told, unbuildable):
    """The plan for a kernel that could not be built is no plan for composite steps."""
    compare(odd_step, records, {"flush": "auto"})
    assert not [plan for r in records for _, plan in r.states if getattr(plan, "target", "aten") != "aten"]


def test_no_compiler_is_said_once(records, told, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")

    def two(S, T, *inputs):
        return step(S, *inputs) + step(T, *inputs)

    compiled = torch.compile(two, backend="kvbuffer", options=OPTIONS)
    with torch.no_grad():
        compiled(torch.randn(B, H, K, V), torch.randn(B, H, K, V), *draw())
    assert [p.target for r in records for _, p in r.rewritten] == ["aten", "aten"]
    (message,) = about_speed(told)
    assert "install a C++ compiler" in message


@pytest.mark.skipif(build.compiler() is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("how", ["option", "environment"])
def test_generated_source_is_kept(how, tmp_path, monkeypatch):
    options = dict(OPTIONS)
    if how == "option":
        options["dump"] = tmp_path
    else:
        monkeypatch.setenv("KVBUFFER_DUMP", str(tmp_path))
    with torch.no_grad():
        torch.compile(step, backend="kvbuffer", options=options)(torch.randn(B, H, K, V), *draw())
    (source,) = tmp_path.rglob("*.cpp")
    head = source.read_text().split("#include", 1)[0]
    assert "decay" in head and "update" in head and "buffered L=4 capacity=4 K=8 V=16" in head
