"""The command `emit`: files that run without this package, C++ for real and Triton in its interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kvbuffer_compile.codegen.standalone import check as standalone_check
from kvbuffer_compile.codegen.standalone.check import Subject, check
from kvbuffer_compile.codegen.standalone.reference import emit_reference
from kvbuffer_compile.commands import cli
from kvbuffer_compile.commands.arguments import DTYPES, VARIANTS
from kvbuffer_compile.commands.recurrences import RECURRENCES
from tests.support.programs import NAMED

SMALL = ("--k", "6", "--v", "5", "--flush", "3", "--drafts", "2")
# Runs files one after the other in a process that must not know this package.
ALONE = """
import runpy, sys
sys.path[:] = [p for p in sys.path if p not in ("", sys.argv[1])]
files, sys.argv[1:] = sys.argv[2:], []
for file in files:
    runpy.run_path(file, run_name="__main__")
assert not [name for name in sys.modules if name.startswith("kvbuffer_compile")]
"""


def emitted(folder: Path, recurrence: str, variant: str, target: str, *more: str) -> Path:
    path = folder / f"{recurrence}_{variant}_{target}_{len(list(folder.iterdir()))}.py"
    names = ("--recurrence", recurrence, "--variant", variant, "--target", target, "--out", str(path))
    assert cli.main(["emit", *names, *SMALL, *more]) == 0
    return path


def run_alone(*files: Path) -> subprocess.CompletedProcess[str]:
    home = str(Path(__file__).resolve().parents[2])
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", ALONE, home, *map(str, files)]
    return subprocess.run(command, capture_output=True, text=True, cwd=files[0].parent, env=env)


def test_files_run_alone_and_agree_with_their_reference(tmp_path):
    files = [
        emitted(tmp_path, "gdn", "verify", "triton"),
        emitted(tmp_path, "kda", "buffered", "triton", "--dtype", "bfloat16", "--layout", "vk"),
        emitted(tmp_path, "rwkv7", "recurrent", "triton", "--dtype", "float16"),
        emitted(tmp_path, "gdn", "verify", "cpp", "--row-dtype", "float32"),
        emitted(tmp_path, "mamba2", "buffered", "cpp", "--dtype", "bfloat16", "--layout", "vk"),
        emitted(tmp_path, "mlstm", "recurrent", "cpp"),
    ]
    done = run_alone(*files)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("agrees with the reference") == len(files)


def test_a_file_with_a_wrong_kernel_says_so(tmp_path):
    file = emitted(tmp_path, "gdn", "buffered", "cpp")
    text = file.read_text()
    right = "call.mark(0, b) += int32_t(call.tokens)"
    assert right in text
    file.write_text(text.replace(right, "call.mark(0, b) += 0"))
    done = run_alone(file)
    assert done.returncode != 0 and "relative error" in done.stderr


@pytest.mark.nightly
@pytest.mark.parametrize("target", ["triton", "cpp"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", RECURRENCES)
def test_every_file_agrees_with_its_reference(name, dtype, target, tmp_path):
    files = [emitted(tmp_path, name, variant, target, "--dtype", dtype) for variant in VARIANTS]
    done = run_alone(*files)
    assert done.returncode == 0, done.stderr[-3000:]


def reference(program):
    space = {"torch": torch}
    exec(emit_reference(program), space)
    return space["reference"]


@pytest.mark.parametrize("name", RECURRENCES)
def test_the_reference_is_the_recurrence(name):
    case = RECURRENCES[name]
    state = torch.randn(2, case.heads, *case.sizes)
    inputs = case.inputs(2, torch.float32, torch.device("cpu"))
    got, (out,) = reference(case.program)(state, *inputs)
    torch.testing.assert_close(out, case.step(state, *inputs), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(got, state, atol=1e-4, rtol=1e-4)


def test_the_check_finds_a_step_that_applies_a_token_twice():
    case = RECURRENCES["gla"]
    step = reference(case.program)

    def subject(times: int) -> Subject:
        def run(state, cursor, rows, operands):
            for _ in range(times):
                state[:], outputs = step(state, *operands)
            return outputs

        inputs = {v.name: (v.kind, "rate") for v in case.program.inputs}
        return Subject(run, step, "recurrent", (4, 5), 1, 1, 1, torch.float32, (0, 1, 2, 3), inputs, {})

    assert check(subject(1), torch.device("cpu")) <= 1e-6
    with pytest.raises(AssertionError, match="output"):
        check(subject(2), torch.device("cpu"))


def test_scalars_are_lifted_in_the_reference():
    text = emit_reference(NAMED["mamba2"])
    assert "dtx = x * dt[..., None]" in text and "g = torch.ops.aten.exp.default(dtA)" in text
    assert "s = torch.ops.aten.sum.dim_IntList(qkb, [-1])" in emit_reference(NAMED["rwkv6"])


@pytest.mark.parametrize(
    ("argument", "value", "allowed"),
    [
        ("--recurrence", "lstm", "gdn"),
        ("--variant", "prefill", "verify"),
        ("--target", "cuda", "triton"),
        ("--dtype", "int8", "bfloat16"),
        ("--k", "0", "integer >= 1"),
        ("--out", "nowhere/file.py", "does not exist"),
    ],
)
def test_what_is_not_allowed_is_named(argument, value, allowed, capsys):
    given = {"--recurrence": "gdn", "--variant": "verify", "--target": "cpp", argument: value}
    try:
        code = cli.main(["emit", *(x for pair in given.items() for x in pair)])
    except SystemExit as stop:
        code = stop.code
    error = capsys.readouterr().err
    assert code == 2 and argument in error and value in error and allowed in error


def test_the_text_goes_to_the_standard_output(capsys):
    argv = ["emit", "--recurrence", "gdn", "--k", "128", "--v", "128", "--variant", "verify", "--target", "triton"]
    assert cli.main(argv) == 0
    text = capsys.readouterr().out
    compile(text, "gdn.py", "exec")
    for part in ("@triton.jit", "def launch(", "def reference(", "def check(", "def main("):
        assert part in text
    assert standalone_check.check.__doc__.splitlines()[0] in text
