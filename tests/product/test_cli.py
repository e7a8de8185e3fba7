"""The command line: doctor, bad input with exit code 2, explain and bench from end to end on a small step."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

import kvbuffer_compile
from kvbuffer_compile.commands import arguments, cli, doctor, workload
from kvbuffer_compile.commands.bench import WAYS, Timing, _agree, deviation, table
from kvbuffer_compile.commands.doctor import Finding
from kvbuffer_compile.commands.recurrences import RECURRENCES

STEP = """
import torch

def step(S, q, k, v, g):
    S.mul_(g[..., None, None]).add_(k[..., None] * v[..., None, :])
    return (S * q[..., None]).sum(-2)

def make():
    return step, (torch.randn(2, 3, 8, 16), *(torch.randn(2, 3, n) for n in (8, 8, 16)), torch.rand(2, 3))

def no_pair():
    return step

def too_few():
    return step, make()[1][:2]

number = 3
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "my_step.py"
    path.write_text(STEP)
    return path


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command; gives the exit code, stdout and stderr."""

    def call(*argv: Any) -> tuple[int, str, str]:
        try:
            code = cli.main([str(x) for x in argv])
        except SystemExit as stop:  # argparse
            code = int(stop.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return call


# ------------------------------------------------------------------------------------------------- doctor


def test_doctor_says_what_there_is(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_entry_point", lambda: Finding("ok", "entry point", "registered"))
    code, out, _ = run("doctor")
    assert code == 0 and out.endswith("usable\n")
    for expected in (torch.__version__, "python", "C++ compiler", "cache", "GB/s", "triton"):
        assert expected in out


def test_doctor_measures_again(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr("kvbuffer_compile.machine.measured_again", asked.append)
    run("doctor")
    assert not asked
    _, out, _ = run("doctor", "--remeasure")
    assert asked[0] == "cpu" and "measured 20" in out


def test_doctor_without_the_package_installed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "entry_points", lambda group: [])
    code, out, _ = run("doctor")
    assert code == 1
    assert 'backend="kvbuffer" is not registered' in out and "not usable" in out


def test_doctor_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    found = {f.what: f for f in doctor.findings()}["C++ compiler"]
    assert found.level == ("note" if torch.cuda.is_available() else "bad")
    assert "Inductor itself" in found.found and "apt install g++" in found.found


def test_doctor_without_torch(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)  # as if it could not be imported
    code, out, _ = run("doctor")
    assert code == 1 and "bad   import torch" in out and "GB/s" not in out


@pytest.mark.parametrize(("version", "level"), [((3, 10), "note"), ((3, 11), "ok"), ((3, 13), "ok"), ((3, 14), "note")])
def test_doctor_knows_the_pythons(monkeypatch: pytest.MonkeyPatch, version: tuple[int, int], level: str) -> None:
    monkeypatch.setattr(doctor.sys, "version_info", (*version, 0))
    found = doctor._python()
    assert found.level == level and ("3.11 to 3.13" in found.found) == (level == "note")


@pytest.mark.parametrize(
    ("version", "level"),
    [("2.11.0", "ok"), ("2.13.0+cpu", "ok"), ("2.9.1", "bad"), ("2.11.0a0+git1", "ok"), ("3.0", "ok")],
)
def test_doctor_compares_versions(monkeypatch: pytest.MonkeyPatch, version: str, level: str) -> None:
    monkeypatch.setattr(metadata, "version", lambda package: version)
    assert doctor._version("torch", doctor.TORCH, needed=True).level == level


def test_doctor_misses_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor._version("no-such-package", (1, 0), needed=False).level == "note"
    assert doctor._version("no-such-package", (1, 0), needed=True).level == "bad"


# ---------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("command", ["explain", "bench"])
@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("nonsense", "it must be file.py:function"),
        ("/no/such", "there is no such folder"),
        ("{dir}/my_step.py", "names no function of the file"),
        ("{dir}/missing.py:make", "there is no file"),
        ("{dir}/my_step.py:missing", "has no function 'missing'"),
        ("{dir}/my_step.py:mak", "has no function 'mak'; did you mean make?"),
        ("{dir}/my_step.py:too_few", "does not fit together: missing a required argument"),
        ("{dir}/my_step.py:number", "has no function 'number'"),
        ("{dir}/my_step.py:no_pair", "must return (fn, args)"),
        ("{dir}/broken.py:make", "cannot be imported"),
        ("{dir}", "no config.json"),
        ("{dir}/odd", "not a causal language model"),
    ],
)
def test_bad_specs(run: Run, file: Path, command: str, spec: str, says: str) -> None:
    (file.parent / "broken.py").write_text("import no_such_module_anywhere")
    (file.parent / "odd").mkdir()
    (file.parent / "odd" / "config.json").write_text('{"model_type": "no such model"}')
    code, out, err = run(command, spec.format(dir=file.parent))
    assert code == 2 and not out
    assert "SPEC" in err and says in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--flush", "often"], '"auto" or an integer from 1 to 65536'),
        (["--flush", "0"], '"auto" or an integer from 1 to 65536'),
        (["--target", "fortran"], "aten"),
        (["--batch", "-1"], "an integer >= 1"),
        (["--json", "/no/such/folder/x.json"], "--json /no/such/folder/x.json: the folder"),
        (["--html", "/no/such/folder/x.html"], "--html"),
        (["--plot", "x.txt"], ".png, .svg, .pdf"),
    ],
)
def test_bad_options(run: Run, file: Path, arguments: list[str], says: str) -> None:
    code, out, err = run("explain", f"{file}:make", *arguments)
    assert code == 2 and not out and says in err


def commands() -> Iterator[argparse.ArgumentParser]:
    """The parser, and those of its commands."""
    whole = arguments.parser(*[lambda _: 0] * 4)
    yield whole
    for action in whole._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield from action.choices.values()


def test_every_option_is_explained() -> None:
    told = {(p.prog, a.dest): a.help for p in commands() for a in p._actions if a.dest != "command"}
    assert len(told) > 25 and all(told.values()), told


@pytest.mark.parametrize(
    "argv",
    [
        ["explain", "missing.py:make"],
        ["bench", "/no/such"],
        ["explain", ".", "--html", "/no/such/page.html"],
        ["emit", "--recurrence", "gdn", "--variant", "buffered", "--target", "cpp", "--out", "/no/such/gdn.py"],
    ],
)
def test_wrong_names_are_told_without_torch(argv: list[str]) -> None:
    """Importing it takes seconds, on a busy machine a minute."""
    code = f"import sys; from kvbuffer_compile.commands import cli; print(cli.main({argv!r}), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["2", "False"] and argv[-1] in done.stderr


def test_names_are_known_without_torch() -> None:
    assert tuple(RECURRENCES) == arguments.RECURRENCES


def test_help_needs_no_torch() -> None:
    script = "import sys; from kvbuffer_compile.commands import cli; cli.main(sys.argv[1:])"
    for argv in (["--help"], ["--version"], ["explain", "--help"], ["emit", "--help"]):
        held = f"import atexit; atexit.register(lambda: print('torch' in sys.modules)); {script}"
        done = subprocess.run([sys.executable, "-c", f"import sys; {held}", *argv], capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout.endswith("False\n"), done.stderr


def test_the_version_is_the_one_that_is_installed(run: Run) -> None:
    code, out, _ = run("--version")
    assert (code, out) == (0, f"kvbuffer_compile {kvbuffer_compile.__version__}\n")
    assert metadata.version("kvbuffer_compile") == kvbuffer_compile.__version__


def test_public_names_come_when_asked_for() -> None:
    script = (
        "import kvbuffer_compile.explanation, kvbuffer_compile; from kvbuffer_compile import *;"
        "assert callable(kvbuffer_compile.explain) and explain is kvbuffer_compile.explain;"
        "assert set(kvbuffer_compile.__all__) <= set(dir(kvbuffer_compile));"
        "assert not hasattr(kvbuffer_compile, 'nothing')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_emit_says_what_it_wrote(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "gla.py"
    code, out, err = run(
        "emit", "--recurrence", "gla", "--variant", "buffered", "--target", "cpp", "--k", 8, "--v", 8, "--out", path
    )
    lines = len(path.read_text().splitlines())
    assert code == 0 and not out and f"wrote {path}, {lines} lines" in err and f"python {path}" in err


def test_a_command_is_needed(run: Run) -> None:
    assert run()[0] == 2
    assert run("emitt")[0] == 2


# ------------------------------------------------------------------------------------------- end to end


def test_explain(run: Run, file: Path) -> None:
    outputs = {kind: file.parent / f"report.{kind}" for kind in ("html", "json")}
    code, out, err = run(
        "explain", f"{file}:make", "--flush", 4, "--target", "aten",
        "--html", outputs["html"], "--json", outputs["json"],
    )  # fmt: skip
    assert code == 0, err
    assert "1 buffered" in out and "2x3x8x16" in out and "flush=4 as asked" in out and "my_step.py:5" in out
    states = json.loads(outputs["json"].read_text())["states"]
    assert [s["signature"] for s in states if s["status"] == "buffered"] == ["DUR"]
    assert "2 x 3 x 8 x 16" in outputs["html"].read_text()


def test_workloads_are_the_same_every_time(file: Path) -> None:
    factory = workload.load(f"{file}:make")
    (first, args), (_, again) = factory(), factory()
    assert callable(first)
    assert all(torch.equal(a, b) and a is not b for a, b in zip(args, again, strict=True))


def test_a_checkpoint_is_a_decode_step(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.Mamba2Config(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, head_dim=8, num_heads=4, state_size=8, expand=2, n_groups=1
    )
    transformers.Mamba2ForCausalLM(config).save_pretrained(tmp_path)
    fn, args = workload.load(str(tmp_path), batch=2)()
    with torch.no_grad():
        first, second = fn(*args), fn(*args)
    assert first.shape == (2, 1, 32)
    assert not torch.equal(first, second)  # the cache has moved on


def test_bench(run: Run, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(cli, "_tell", told.append)
    path = file.parent / "times.json"
    code, out, err = run(
        "bench", f"{file}:make", "--flush", 2, "--target", "aten", "--steps", 4, "--warmup", 2, "--json", path
    )
    assert code == 0, err
    assert [line.split(":")[0] for line in told] == [way for way in WAYS for _ in range(2)]
    timings = {t["way"]: t for t in json.loads(path.read_text())}
    assert tuple(timings) == WAYS
    assert [timings[w]["states"] for w in WAYS] == [0, 0, 1]
    assert all(0 < t["best"] <= t["median"] for t in timings.values())
    assert all(way in out for way in WAYS)


def timing(way: str, error: float) -> Timing:
    return Timing(way, 1.0, 2e-3, 1e-3, error, 0)


def test_bench_compares_outputs() -> None:
    outputs = [[torch.ones(2)]]
    _agree([timing("inductor", 1e-6), timing("kvbuffer", 9e-6)], outputs)
    with pytest.raises(ArithmeticError, match="differ"):
        _agree([timing("inductor", 1e-6), timing("kvbuffer", 1e-4)], outputs)
    with pytest.raises(ArithmeticError):
        _agree([timing("inductor", 0.0), timing("kvbuffer", float("inf"))], outputs)


def test_wrong_outputs_fail_the_command(run: Run, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def disagree(*_: Any) -> None:
        raise ArithmeticError("outputs differ")

    monkeypatch.setattr("kvbuffer_compile.commands.bench.bench", disagree)
    code, _, err = run("bench", f"{file}:make")
    assert code == 1 and "outputs differ" in err


def test_deviation() -> None:
    want = [[torch.tensor([1.0, -4.0, float("inf"), float("nan")])]]
    assert deviation(want, want) == 0
    assert deviation([[torch.tensor([1.5, -4.0, float("inf"), float("nan")])]], want) == pytest.approx(0.125)
    assert deviation([[torch.tensor([1.0, -4.0, 0.0, float("nan")])]], want) == float("inf")
    assert deviation([[torch.tensor([1.0, -4.0, float("inf"), 0.0])]], want) == float("inf")


def test_table() -> None:
    text = table([timing(way, 0.0) for way in WAYS])
    assert [line.split()[0] for line in text.splitlines()[1:4]] == list(WAYS)
    assert "1.00x" in text and "speed: against Inductor" in text


def test_columns_never_touch() -> None:
    """ "0.032" and "3410.94x" once stood there as one number."""
    fast = Timing("kvbuffer", 12345.678, 1e-9, 1e-12, 1.0, 123456)
    slow = Timing("inductor", 1.0, 98765.4, 98765.4, 0.0, 0)
    lines = table([slow, fast]).splitlines()
    assert [len(line.split()) for line in lines[1:3]] == [7, 7]
    assert len({len(line) for line in lines[:3]}) == 1


def test_bench_tells_how_far_it_is(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for terminal in (False, True):
        monkeypatch.setattr(sys.stderr, "isatty", lambda terminal=terminal: terminal, raising=False)
        cli._tell("eager: running 3 steps")
        assert capsys.readouterr().err == "eager: running 3 steps\n" * terminal
