"""Options, bad input, graphs with nothing to rewrite: what a user meets besides the good case."""

from __future__ import annotations

import logging

import pytest
import torch

import kvbuffer_compile
from kvbuffer_compile import backend
from kvbuffer_compile.errors import DeclinedError
from kvbuffer_compile.options import Options, split
from tests.test_runtime import draw, step

B, H, K, V = 3, 2, 8, 16
EAGER = {"inner": "eager", "target": "aten", "flush": 4}


def failure(options):
    """The message a user sees at the first call with these options."""
    state = torch.randn(B, H, K, V)
    before = state.clone()
    with pytest.raises(ValueError) as caught, torch.no_grad():
        torch.compile(step, backend="kvbuffer", options=options)(state, *draw())
    assert torch.equal(state, before), "a refused call must leave the state as it was"
    return str(caught.value)


@pytest.mark.parametrize("flush", [0, -1, "often", 2.5, True, None, 65537, 2**31 - 1])
def test_a_bad_flush_is_named(flush):
    message = failure({"flush": flush})
    assert "flush" in message and "integer from 1 to 65536" in message


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("inner", "magic", "inductor"),
        ("donate", "yes", "True or False"),
        ("row_dtype", torch.int8, "floating point"),
        ("on_decline", "cry", "warn"),
        ("target", "metal", "cpp"),
        ("check", 1, "True or False"),
        ("capacity", 0, "integer from 1 to 65536"),
        ("capacity", 65537, "integer from 1 to 65536"),
        ("dump", 3, "path"),
    ],
)
def test_a_bad_value_is_named_with_what_is_allowed(name, value, allowed):
    message = failure({name: value})
    assert name in message and allowed in message


def test_a_target_that_the_device_lacks_is_an_error(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    message = failure({"flush": 4, "target": "triton", "inner": "eager"})
    assert "target" in message and "cpu" in message and "aten" in message


def test_an_unknown_option_is_named_with_a_suggestion():
    message = failure({"flsh": 4})
    assert "flsh" in message and "flush" in message


def test_options_of_inductor_pass_through():
    ours, inductor = split({"flush": 2, "max_autotune": True, "triton.cudagraphs": False})
    assert ours == Options(flush=2)
    assert inductor == {"max_autotune": True, "triton.cudagraphs": False}


def test_an_internal_error_leaves_the_graph_alone_and_says_so(monkeypatch):
    monkeypatch.delenv("KVBUFFER_STRICT")
    monkeypatch.setattr(backend, "lift", lambda *_: 1 / 0)
    state, inputs = torch.randn(B, H, K, V), draw()
    with torch.no_grad():
        expected = step(state.clone(), *inputs)
        with pytest.warns(UserWarning, match="internal error.*ZeroDivisionError"):
            got = torch.compile(step, backend="kvbuffer", options=EAGER)(state.clone(), *inputs)
        torch.testing.assert_close(got, expected)
        torch._dynamo.reset()
        with pytest.raises(DeclinedError, match="ZeroDivisionError"):
            torch.compile(step, backend="kvbuffer", options={**EAGER, "on_decline": "raise"})(state, *inputs)


@pytest.mark.parametrize("target", ["aten", "cpp"])
def test_a_program_may_log_more_values_than_there_are_letters(records, target):
    def steps(S, k, v, q, b):
        new = S
        for i in range(6):
            new = torch.lerp(new, k[i][..., None] * v[i][..., None, :], b[i][..., None, None])
        S.copy_(new)
        return (new * q[..., None]).sum(-2)

    state = torch.randn(B, H, K, V)
    eager = state.clone()
    compiled = torch.compile(steps, backend="kvbuffer", options={**EAGER, "target": target})
    with torch.no_grad():
        for _ in range(9):
            inputs = torch.randn(6, B, H, K), torch.randn(6, B, H, V), torch.randn(B, H, K), torch.rand(6, B, H)
            torch.testing.assert_close(compiled(state, *inputs), steps(eager, *inputs), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(state + 0, eager, rtol=1e-4, atol=1e-4)
    assert all(len(r.rewritten) == 1 and len(r.rewritten[0][1].program.logged) > 26 for r in records) and records


def test_a_model_without_a_recurrence_behaves_as_with_inductor(records):
    model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.GELU(), torch.nn.Linear(32, 4)).eval()
    x = torch.randn(5, 16)
    with torch.no_grad():
        expected = torch.compile(model, backend="inductor")(x)
        torch._dynamo.reset()
        got = torch.compile(model, backend="kvbuffer")(x)
    assert torch.equal(got, expected)
    assert len(records) == 1 and not records[0].rewritten


def remember(S, q, k, v):
    """Linear attention; unlike `step` it can be differentiated although the state is overwritten."""
    new = S + k[..., None] * v[..., None, :]
    S.copy_(new)
    return (new * q[..., None]).sum(-2)


def test_a_graph_that_needs_gradients_is_left_alone(records):
    state = torch.randn(B, H, K, V)
    expected = state.clone()
    inputs = [x.requires_grad_() for x in draw()[:3]]
    out = torch.compile(remember, backend="kvbuffer", options=EAGER)(state, *inputs)
    torch.testing.assert_close(out, remember(expected, *inputs))
    torch.testing.assert_close(state, expected)
    out.sum().backward()
    assert all(x.grad is not None for x in inputs)
    assert records and not any(r.rewritten for r in records)
    assert all(r.why_not is not None and r.why_not.rule == "gradients" for r in records)


def test_a_graph_with_gradients_behind_a_rewritten_one_sees_the_true_state(records):
    state = torch.randn(B, H, K, V)
    expected = state.clone()
    compiled = torch.compile(remember, backend="kvbuffer", options=EAGER)
    for t in range(9):
        inputs = draw()[:3]
        if t % 3 == 2:
            inputs = [x.requires_grad_() for x in inputs]
            out, want = compiled(state, *inputs), remember(expected, *inputs)
            state, expected = state.detach(), expected.detach()
        else:
            with torch.no_grad():
                out, want = compiled(state, *inputs), remember(expected, *inputs)
        torch.testing.assert_close(out, want)
    assert any(r.rewritten for r in records)


def nonlinear(S, k, v):
    S.copy_(torch.tanh(S + k[..., None] * v[..., None, :]))
    return S.sum(-2)


def nonlinear_inputs():
    return torch.randn(B, H, K, V), torch.randn(B, H, K), torch.randn(B, H, V)


def test_on_decline_raise():
    with pytest.raises(DeclinedError, match="tanh|linear"), torch.no_grad():
        torch.compile(nonlinear, backend="kvbuffer", options={**EAGER, "on_decline": "raise"})(*nonlinear_inputs())


def test_on_decline_warn():
    with pytest.warns(UserWarning, match="declined"), torch.no_grad():
        torch.compile(nonlinear, backend="kvbuffer", options={**EAGER, "on_decline": "warn"})(*nonlinear_inputs())


def test_a_decline_is_logged(caplog):
    with caplog.at_level(logging.INFO, logger="kvbuffer_compile"), torch.no_grad():
        torch.compile(nonlinear, backend="kvbuffer", options=EAGER)(*nonlinear_inputs())
    assert "declined" in caplog.text and "test_backend.py" in caplog.text


def test_an_unknown_mode_is_named():
    with pytest.raises(ValueError, match="bogus.*reduce-overhead"), torch.no_grad():
        torch.compile(step, backend="kvbuffer", mode="bogus")(torch.randn(B, H, K, V), *draw())


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_mode_is_accepted(mode, records):
    state = torch.randn(B, H, K, V)
    expected = state.clone()
    compiled = torch.compile(step, backend="kvbuffer", mode=mode)
    with torch.no_grad():
        for _ in range(3):
            inputs = draw()
            torch.testing.assert_close(compiled(state, *inputs), step(expected, *inputs))
    torch.testing.assert_close(state + 0, expected)


def test_flush_one_is_the_plain_recurrence(records):
    state = torch.randn(B, H, K, V)
    expected = state.clone()
    compiled = torch.compile(step, backend="kvbuffer", options={**EAGER, "flush": 1})
    with torch.no_grad():
        for _ in range(5):
            inputs = draw()
            torch.testing.assert_close(compiled(state, *inputs), step(expected, *inputs))
            torch.testing.assert_close(state, expected)
    assert [len(r.rewritten) for r in records] == [1] and records[0].rewritten[0][1].variant == "recurrent"
    assert type(state) is torch.Tensor, "a state that owes nothing needs no guard"


def test_a_dump_keeps_programs_plans_and_graphs(tmp_path):
    with torch.no_grad():
        torch.compile(step, backend="kvbuffer", options={**EAGER, "dump": tmp_path})(torch.randn(B, H, K, V), *draw())
    text = "\n".join(p.read_text() for p in tmp_path.rglob("*.txt"))
    assert "update" in text and "buffered L=4" in text and "copy_" in text


def test_explain_leaves_the_arguments_alone():
    state, inputs = torch.randn(B, H, K, V), draw()
    before = state.clone()
    report = kvbuffer_compile.explain(step, state, *inputs, options={"flush": 4})
    assert torch.equal(state, before) and type(state) is torch.Tensor
    (found,) = report.states
    assert found.status == "buffered" and found.signature == "DRUR" and found.name == "S"
    assert "update" in found.program and "test_runtime.py" in found.source


def test_explain_names_a_bad_option():
    with pytest.raises(ValueError, match="flush"):
        kvbuffer_compile.explain(step, torch.randn(B, H, K, V), *draw(), options={"flush": 0})
