"""The examples that people copy run, at small sizes, and rewrite states; at night as they are, with Inductor."""

from __future__ import annotations

import runpy
import sys

import pytest

from tests.support.daily import chosen
from tests.support.snippets import ROOT, quick

SMALL = {
    "own_recurrence": "--batch 2 --heads 2 --size 32 --steps 3",
    "batch_decode": "--requests 5 --slots 5 --batch 3 --layers 2 --heads 2 --size 16 --flush 8",
    "long_generation": "--tokens 6",
}
BUFFERED = {"batch_decode"}  # the others take what the cost model says on this machine


def run(name: str, arguments: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An example as the command line runs it; what it says by its exit status holds."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments.split()])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
    assert not end.value.code


@pytest.mark.parametrize("name", chosen(SMALL, SMALL.keys() - {"long_generation"}))  # a whole model
def test_small(name: str, records, monkeypatch) -> None:
    with quick(monkeypatch):
        run(name, SMALL[name], monkeypatch)
    assert any(record.states for record in records)  # found and proved, whether or not they gain at this size
    if name in BUFFERED:
        assert any(plan.variant != "recurrent" for record in records for _, plan in record.rewritten)


@pytest.mark.nightly
@pytest.mark.parametrize("name", [*SMALL, "demo", "speculative_decoding"])
def test_whole(name: str, records, monkeypatch) -> None:
    """Texts, tokens or numbers are those of Inductor or eager, else the exit status says so."""
    run(name, "", monkeypatch)
    assert any(record.rewritten for record in records)
