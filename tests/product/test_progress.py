"""Signs of life while something compiles: on a terminal that wants them, and nowhere else."""

from __future__ import annotations

import io
import logging
import sys
import time
import types

import pytest
import torch

from kvbuffer_compile.process import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    found = Terminal()
    monkeypatch.setattr(progress, "sys", types.SimpleNamespace(stderr=found))  # capturing sets the true one
    monkeypatch.setattr(progress, "PATIENCE", 0.0)
    monkeypatch.delenv("KVBUFFER_QUIET", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    return found


def shown(terminal: Terminal, text: str) -> bool:
    end = time.monotonic() + 20
    while text not in terminal.getvalue() and time.monotonic() < end:
        time.sleep(0.02)
    return text in terminal.getvalue()


def test_a_terminal_sees_what_goes_on(terminal: Terminal) -> None:
    with progress.compiling("a graph"):
        progress.stage("tracing")
        assert shown(terminal, "kvbuffer: compiling a graph, tracing, ")
        progress.stage("Inductor")
        assert shown(terminal, "Inductor")
        with progress.compiling("another"):  # one line at a time
            time.sleep(0.2)
    assert "another" not in terminal.getvalue()
    length = len(terminal.getvalue())
    time.sleep(0.4)
    assert len(terminal.getvalue()) == length and progress._shown is None


def test_what_is_quick_is_not_shown(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "PATIENCE", 0.3)
    with progress.compiling("a graph"):
        pass
    time.sleep(0.5)
    assert terminal.getvalue() == ""


@pytest.mark.parametrize("why", ["quiet", "no terminal"])
def test_who_does_not_want_it_sees_nothing(terminal: Terminal, monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    if why == "quiet":
        monkeypatch.setenv("KVBUFFER_QUIET", "1")
    else:
        monkeypatch.setattr(terminal, "isatty", lambda: False)
    with progress.compiling("a graph"):
        time.sleep(0.4)
    assert terminal.getvalue() == ""


def test_an_error_ends_it(terminal: Terminal) -> None:
    with pytest.raises(ValueError, match="wrong"), progress.compiling("a graph"):
        raise ValueError("wrong")
    assert progress._shown is None


def test_the_log_has_a_line_when_it_starts_and_when_it_ends(caplog: pytest.LogCaptureFixture) -> None:
    def double(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    with caplog.at_level(logging.INFO, logger="kvbuffer_compile"):
        torch.compile(double, backend="kvbuffer", options={"inner": "eager"})(torch.ones(3))
    said = [r.getMessage() for r in caplog.records if r.name == "kvbuffer_compile"]
    assert said[0] == "compiling a graph of 1 operations" and said[-1].startswith("compiled a graph of 1 operations in")


def test_what_only_writes_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the objects that loggers put in place of stderr."""

    class Log:
        def write(self, text: str) -> None: ...

        def flush(self) -> None: ...

    monkeypatch.delenv("KVBUFFER_QUIET", raising=False)
    for stream in (Log(), None):
        monkeypatch.setattr(sys, "stderr", stream)
        assert not progress.wanted()
