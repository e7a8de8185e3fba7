"""Every snippet of the manual and of the README runs, in order, page by page; and rewrites what the page is about."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

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


def test_the_manual_has_pages() -> None:
    assert len(PAGES) >= 8
