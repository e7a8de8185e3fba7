"""Every snippet of the manual and of the README runs, in order, page by page; and rewrites what the page is about."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from kvbuffer_compile.options import Options
from tests.support.snippets import ROOT, blocks, quick, run_page

DOCS = ROOT / "docs"
PAGES = sorted(page for page in DOCS.glob("*.md") if blocks(page))
NONE_BUFFERED = {"limits.md"}  # pages about what is not rewritten


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A fresh folder with the examples in it, as a user's checkout has them."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_snippet_runs(page: Path, folder: Path, records, monkeypatch) -> None:
    with quick(monkeypatch):
        run_page(page)
    assert any(record.rewritten for record in records) != (page.name in NONE_BUFFERED)


@pytest.mark.nightly
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_snippet_runs_with_inductor(page: Path, folder: Path, records) -> None:
    run_page(page)
    assert any(record.rewritten for record in records) != (page.name in NONE_BUFFERED)


def test_options_are_told_of() -> None:
    """In the manual, each by its name and its default; in the README those that are needed most."""
    manual, readme = (
        dict(re.findall(r"^\| `(\w+)` \| `([^`]+)` \|", page.read_text(), re.M))
        for page in (DOCS / "options.md", ROOT / "README.md")
    )
    assert manual == {f.name: repr(f.default).replace("'", '"') for f in fields(Options)}
    assert {"flush", "donate", "on_decline"} <= readme.keys() and readme.items() <= manual.items()


def test_the_figures_are_those_of_their_script(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="figures are drawn by matplotlib")
    runpy.run_path(str(DOCS / "figures" / "draw.py"))["main"](tmp_path)
    drawn = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert drawn == {path.name: path.read_text() for path in (DOCS / "figures").glob("*.svg")}


def test_it_builds_and_its_links_lead_somewhere(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="the manual is built by mkdocs: pip install '.[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert "rollback" in (tmp_path / "api.html").read_text()


def test_the_contents_list_every_page() -> None:
    listed = re.findall(r"([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M)
    assert sorted(listed) == sorted(page.name for page in DOCS.glob("*.md")) and len(PAGES) >= 7
