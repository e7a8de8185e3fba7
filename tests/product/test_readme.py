"""Every Python snippet of the README runs, in order, in one namespace."""

from __future__ import annotations

import re
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]


def test_every_snippet_runs(monkeypatch, capsys, records):
    monkeypatch.chdir(ROOT)
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert len(snippets) >= 3
    namespace: dict[str, object] = {}
    with torch.no_grad():
        for snippet in snippets:
            exec(compile(snippet, "README.md", "exec"), namespace)
    printed = capsys.readouterr().out
    assert "def fibonacci" in printed and "DUR" in printed
    assert any(record.rewritten for record in records)
