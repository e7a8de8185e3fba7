"""Options, bad input, graphs with nothing to rewrite: what a user meets besides the good case."""

from __future__ import annotations

import copy
import logging
import warnings
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch._higher_order_ops.scan import scan

import kvbuffer_compile
from kvbuffer_compile import backend
from kvbuffer_compile.errors import DeclinedError
from kvbuffer_compile.options import Options, split
from tests.runtime.test_runtime import draw, step
from tests.support.machines import CPU

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
    (record,) = records
    ((found, why),) = record.states
    assert record.name(found.state) == "S" and why.rule == "gradients" and "torch.no_grad()" in why.reason
    assert "test_backend.py" in why.source


def test_gradients_are_declined_like_anything_else(caplog):
    def call(on_decline):
        torch._dynamo.reset()
        compiled = torch.compile(remember, backend="kvbuffer", options={**EAGER, "on_decline": on_decline})
        return compiled(torch.randn(B, H, K, V), *(x.requires_grad_() for x in draw()[:3]))

    with pytest.raises(DeclinedError, match=r"gradients: .*torch\.no_grad\(\).*test_backend\.py"):
        call("raise")
    with pytest.warns(UserWarning, match=r"declined S: gradients: .*torch\.no_grad\(\)"):
        call("warn")
    with caplog.at_level(logging.INFO, "kvbuffer_compile"):
        call("ignore")
    assert "declined S: gradients:" in caplog.text


def unseen(S, q, k, v):
    """A state that is written where autograd does not look."""
    with torch.no_grad():
        S.mul_(0.5).add_(k[..., None] * v[..., None, :])
        out = (S * q[..., None]).sum(-2)
    return out * q.sum()


def in_a_loop(S, q, k, v):
    def body(S, token):
        q, k, v = token
        S = S + k[..., None] * v[..., None, :]
        return S.clone(), (S * q[..., None]).sum(-2)

    new, out = scan(body, S, (q[None], k[None], v[None]))
    S.copy_(new)
    return out


def returned(S, q, k, v):
    new = S * 0.5 + k[..., None] * v[..., None, :]
    return new, (new * q[..., None]).sum(-2)


@pytest.mark.parametrize("fn", [remember, unseen, in_a_loop, returned])
def test_what_gradients_cost_is_what_is_buffered_without(fn, records):
    options = {**EAGER, "donate": fn is returned}
    for needed in (True, False):
        torch._dynamo.reset()
        inputs = [x.requires_grad_(needed) for x in draw()[:3]]
        torch.compile(fn, backend="kvbuffer", options=options)(torch.randn(B, H, K, V), *inputs)
    declined, served = records
    assert [why.rule for _, why in declined.states] == ["gradients"]
    assert [plan.variant for _, plan in served.rewritten] == ["buffered"]


def test_training_is_nothing_to_us(records):
    """Buffers that are written, moving averages of matrices among them, are no states; nothing is said or raised."""

    class Averaged(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = torch.nn.Sequential(torch.nn.Conv1d(4, 4, 3), torch.nn.BatchNorm1d(4), torch.nn.Linear(6, 6))
            self.register_buffer("average", torch.zeros(2, 6, 6))

        def forward(self, x):
            with torch.no_grad():
                self.average.mul_(0.9).add_(self.inner[2].weight, alpha=0.1)
            return self.inner(x).sum() + self.average.sum()

    torch.manual_seed(0)
    eager, x = Averaged(), torch.randn(3, 4, 8)
    model = copy.deepcopy(eager)
    compiled = torch.compile(model, backend="kvbuffer", options={**EAGER, "on_decline": "raise"})
    for _ in range(2):
        compiled(x).backward()
        eager(x).backward()
    for a, b in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    torch.testing.assert_close(model.state_dict(), eager.state_dict())
    assert [r.declined for r in records] == [[]]


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


class Remembering(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(K, 3 * K)
        self.register_buffer("S", torch.zeros(B, K, K))

    def forward(self, x):
        q, k, v = self.inner(x).chunk(3, -1)
        return remember(self.S, q, k, v)


def test_explain_is_about_the_grad_mode_at_hand():
    model, x, options = Remembering(), torch.randn(B, K), {**EAGER, "on_decline": "raise"}
    with torch.no_grad():
        assert [s.status for s in kvbuffer_compile.explain(model, x, options=options).states] == ["buffered"]
    report = kvbuffer_compile.explain(model, x, options=options)
    (state,) = report.states
    assert (state.name, state.status, state.rule) == ("self.S", "declined", "gradients")
    assert "torch.no_grad()" in str(report) and not report.notes
    assert not model.S.requires_grad and not model.S.any() and model.inner.weight.grad is None
    model.inner.requires_grad_(False)
    assert [s.status for s in kvbuffer_compile.explain(model, x, options=options).states] == ["buffered"]


def test_explain_leaves_the_history_of_a_state_alone():
    model, x = Remembering(), torch.randn(B, K)
    model(x)
    assert model.S.grad_fn is not None
    expected = torch.autograd.grad(model.S.sum(), model.inner.weight, retain_graph=True)
    before = model.S.detach().clone()
    for fn, given in ((model, (x,)), (remember, (model.S, *torch.randn(3, B, K).requires_grad_()))):
        report = kvbuffer_compile.explain(fn, *given, options=EAGER)
        assert [s.rule for s in report.states] == ["gradients"]
        assert torch.equal(model.S, before)
        got = torch.autograd.grad(model.S.sum(), model.inner.weight, retain_graph=True)
        torch.testing.assert_close(got, expected)


def test_explain_answers_where_autograd_gives_up():
    """The call itself fails under any backend; the reason why its state is not buffered is known all the same."""
    model = Remembering()

    def step(x):
        q, k, v = model.inner(x).chunk(3, -1)
        model.S.add_(k[..., None] * v[..., None, :])
        out = (model.S * q[..., None]).sum(-2)
        model.S.mul_(0.5)
        return out

    with pytest.raises(RuntimeError, match=r"(?s)modified by an inplace operation.*call it under torch\.no_grad\(\)"):
        torch.compile(step, backend="kvbuffer", options=EAGER)(torch.randn(B, K))
    with pytest.raises(DeclinedError, match="gradients"):
        torch.compile(step, backend="kvbuffer", options={**EAGER, "on_decline": "raise"})(torch.randn(B, K))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = kvbuffer_compile.explain(step, torch.randn(B, K), options=EAGER)
    assert [s.rule for s in report.states] == ["gradients"]


@pytest.mark.parametrize("spread", [0.0, 0.9])
def test_explain_tells_that_the_machine_was_measured_while_it_was_busy(spread, monkeypatch):
    monkeypatch.setattr("kvbuffer_compile.explanation.machine_for", lambda device: replace(CPU, spread=spread))
    with torch.no_grad():
        report = kvbuffer_compile.explain(step, torch.zeros(B, H, K, V), *draw(), options={"flush": 4, **EAGER})
    assert report.count("buffered") == 1
    assert [("--remeasure" in note) for note in report.notes] == [True] * (spread > 0)


def test_explain_names_a_bad_option():
    with pytest.raises(ValueError, match="flush"):
        kvbuffer_compile.explain(step, torch.randn(B, H, K, V), *draw(), options={"flush": 0})


class Assigning(torch.nn.Module):
    """States that a call sets anew instead of writing them: attribute, buffer, in a list and by name, and a counter."""

    def __init__(self) -> None:
        super().__init__()
        self.S = torch.zeros(2, 4, 8, 8)
        self.register_buffer("B", torch.zeros(2, 4, 8, 8))
        self.states, self.named, self.calls = [torch.zeros(2, 4, 8, 8)], {"a": torch.zeros(2, 4, 8, 8)}, 0

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        update = k[..., None] * v[..., None, :]
        self.S, self.B = self.S * 0.9 + update, self.B * 0.9 + update
        self.states[0], self.named["a"] = self.states[0] + update, self.named["a"] + update
        self.calls += 1
        return (q[..., None] * (self.S + self.B + self.states[0] + self.named["a"])).sum(-2)


@pytest.mark.parametrize("donate", [False, True])
def test_explain_sets_nothing(donate: bool) -> None:
    module = Assigning()
    before = {name: id(tensor) for name, tensor in (("S", module.S), ("B", module.B), ("0", module.states[0]))}
    with torch.no_grad():
        found = kvbuffer_compile.explain(module, *torch.randn(3, 2, 4, 8), options={"donate": donate})
    assert len(found.states) == 4
    after = {name: id(tensor) for name, tensor in (("S", module.S), ("B", module.B), ("0", module.states[0]))}
    assert after == before and module.calls == 0
    assert not any(t.any() for t in (module.S, module.B, module.states[0], module.named["a"]))
