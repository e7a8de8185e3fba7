"""Every Python snippet of the README runs, in order, in one namespace; at night with Inductor."""

from __future__ import annotations

import re
import shutil

import pytest

from tests.support.snippets import ROOT, blocks, quick, run_page

README = ROOT / "README.md"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    monkeypatch.chdir(tmp_path)


def check(printed: str, records) -> None:
    assert "class Point" in printed and "DRUR" in printed and "ms a step" in printed
    plain, ours = (float(x) for x in re.findall(r"norm of the state ([\d.]+)", printed))
    assert plain > 1 and abs(plain - ours) <= 0.002  # printed with three decimals
    assert any(plan.variant != "recurrent" for record in records for _, plan in record.rewritten)


def test_every_snippet_runs(folder, monkeypatch, records):
    assert len(blocks(README)) >= 4
    with quick(monkeypatch):
        check(run_page(README), records)


@pytest.mark.nightly
def test_every_snippet_runs_with_inductor(folder, records):
    check(run_page(README), records)
