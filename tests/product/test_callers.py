"""Which line of the user's code a call came from."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kvbuffer_compile.process import callers
from kvbuffer_compile.process.callers import Site


def called() -> str:
    return str(Site.find())


def line() -> str:
    return f"{__file__}:{inspect.currentframe().f_back.f_lineno}"  # type: ignore[union-attr]


def test_it_is_the_line_that_called() -> None:
    assert called() == f"{__file__}:{called.__code__.co_firstlineno + 1}"


def test_frames_of_torch_and_of_python_are_passed_over() -> None:
    found: list[str] = []

    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None):
            site = Site.find()
            found.append(Path(site.near[0]).name if site else "")
            return func(*args, **(kwargs or {}))

    with Mode():
        torch.nn.functional.relu(torch.ones(1))
    assert found and set(found) == {Path(__file__).name}


def test_code_of_installed_packages_is_named_with_who_called_it() -> None:
    file = Path(callers._INSTALLED[0]) / "some" / "cache.py"
    scope: dict = {}
    exec(compile("def reorder(find): return find()", str(file), "exec"), scope)
    found, user = str(scope["reorder"](Site.find)), line()
    assert found == f"{file}:1, called at {user}"


@pytest.mark.parametrize(("name", "seen"), [("__main__", "<stdin>:1"), ("generated", "")])
def test_what_a_person_types_in_counts_and_generated_code_does_not(name: str, seen: str) -> None:
    scope = {"__name__": name, "find": Site.find}
    exec(compile("site = find()", "<stdin>", "exec"), scope)
    assert str(scope["site"]).startswith(seen or __file__)


def test_the_end_of_all_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "_getframe", lambda depth: None)
    assert Site.find() is None


def test_a_warning_is_given_at_the_line_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.warns(UserWarning, match="something") as told:
        callers.warn("something")
    warned = Path(__file__).read_text().splitlines()[told[0].lineno - 1]
    assert told[0].filename == __file__ and "callers.warn" in warned
    monkeypatch.setattr(sys, "_getframe", lambda depth: None)
    with pytest.warns(UserWarning, match="nobody"):
        callers.warn("nobody called")


def decode(state: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    state.copy_(torch.tanh(state + k[..., None] * v[..., None, :]))
    return state.sum(-1)


def test_what_is_said_while_compiling_points_at_the_call() -> None:
    compiled = torch.compile(decode, backend="kvbuffer", options={"on_decline": "warn", "inner": "eager"})
    with torch.no_grad(), pytest.warns(UserWarning, match="kvbuffer declined state: nonlinear") as told:
        compiled(torch.zeros(1, 2, 8, 8), *torch.randn(2, 1, 2, 8))
    assert {w.filename for w in told if "declined" in str(w.message)} == {__file__}
