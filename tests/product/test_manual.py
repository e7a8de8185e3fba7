"""Every snippet of the manual and of the README runs, in order, page by page; and rewrites what the page is about."""

from __future__ import annotations

import re
import shutil
from dataclasses import fields
from pathlib import Path

import pytest

from kvbuffer_compile.options import Options
from tests.support.snippets import ROOT, blocks, quick, run_page

DOCS = ROOT / "docs"
PAGES = sorted(page for page in DOCS.glob("*.md") if blocks(page))
NONE_BUFFERED = {"limits.md"}  # pages about what is not rewritten
SLOW = {"transformers.md"}  # whole models; the README and the examples have some of them in every run


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A fresh folder with the examples in it, as a user's checkout has them."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def marked(page: Path):
    return pytest.param(page, id=page.stem, marks=pytest.mark.nightly if page.name in SLOW else ())


@pytest.mark.parametrize("page", [marked(page) for page in PAGES])
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
    """In the manual and in the README, each by its name and its default."""
    for page in (DOCS / "options.md", ROOT / "README.md"):
        told = dict(re.findall(r"^\| `(\w+)` \| `([^`]+)` \|", page.read_text(), re.M))
        assert told == {f.name: repr(f.default).replace("'", '"') for f in fields(Options)}


def test_the_contents_list_every_page() -> None:
    listed = re.findall(r"([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M)
    assert sorted(listed) == sorted(page.name for page in DOCS.glob("*.md")) and len(PAGES) >= 7
