"""The code that the manual shows, taken out of its pages and run: a page in one namespace, in the working folder."""

from __future__ import annotations

import io
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import pytest
import torch

from kvbuffer_compile.commands import cli
from kvbuffer_compile.options import Options

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"^( *)```(python|bash)\n(.*?)^\1```", re.S | re.M)
SAID = re.compile(r"#\s*->\s*(.+)$", re.M)  # a comment that says what is printed
OURS = "python -m kvbuffer_compile "


def blocks(page: Path) -> list[tuple[str, str]]:
    """(language, text) of each code block, in order."""
    found = []
    for indent, language, text in BLOCK.findall(page.read_text()):
        found.append((language, re.sub(rf"^{indent}", "", text, flags=re.M)))
    return found


def run_page(page: Path) -> str:
    """Run a page's blocks in the working folder; returns what they printed. What comments announce was printed."""
    namespace: dict[str, object] = {"__name__": page.stem}
    printed = io.StringIO()
    with redirect_stdout(printed), torch.set_grad_enabled(torch.is_grad_enabled()):  # a page may switch it off
        for language, text in blocks(page):
            before = printed.tell()
            if language == "python":
                _written(page, text)
                exec(compile(text, str(page), "exec"), namespace)
            else:
                _shell(text)
            for said in SAID.findall(text):
                assert said.strip() in printed.getvalue()[before:], f"{page.name}: {said!r} was not printed"
    return printed.getvalue()


def _written(page: Path, text: str) -> None:
    """A block that begins with `# file: NAME` is also that file, for the commands behind it."""
    named = re.match(r"# file: (\S+)\n", text)
    if named:
        Path(named[1]).write_text(text)


def _shell(text: str) -> None:
    """Our own commands and Python files run in this process; others (pip, make, git) do not run."""
    for line in text.replace("\\\n", " ").splitlines():
        command = line.split("#")[0].strip()
        if command.startswith(OURS):
            assert cli.main(shlex.split(command)[3:]) == 0, command
        elif re.match(r"python \S+\.py", command):
            _file(shlex.split(command)[1:])


def _file(argv: list[str]) -> None:
    before, path = sys.argv, list(sys.path)
    sys.argv, sys.path[:] = argv, [str(Path(argv[0]).resolve().parent), *path]
    try:
        runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as end:
        assert not end.code, f"{argv}: exit status {end.code}"
    finally:
        sys.argv, sys.path[:] = before, path


@contextmanager
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing waits for Inductor: graphs run as they are, with our generated kernels in them."""
    names = [f for f in Options.__dataclass_fields__]
    defaults = list(Options.__init__.__defaults__ or ())
    defaults[names.index("inner")] = "eager"
    with monkeypatch.context() as patch:
        patch.setattr(Options.__init__, "__defaults__", tuple(defaults))
        patch.setattr(torch._TorchCompileInductorWrapper, "__call__", lambda self, gm, inputs: gm.forward)
        yield
