"""The report: what a reader sees in 100 columns, in JSON, on a page and in a plot."""

from __future__ import annotations

import builtins
import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from kvbuffer_compile.errors import Declined
from kvbuffer_compile.options import Options
from kvbuffer_compile.passes.choice.choose import explain_choice
from kvbuffer_compile.passes.lifted import Call, Lifted
from kvbuffer_compile.report.report import Report
from kvbuffer_compile.report.state import StateReport, state_report
from kvbuffer_compile.report.text import LEGEND
from kvbuffer_compile.report.whole import WholeCall, whole_call
from tests.program.test_choose import GDN, GLA, lifted
from tests.support.machines import CPU


def named(found: Lifted, name: str) -> Lifted:
    found.state.name = name
    return found


def full_report() -> Report:
    """Three layers of one kind, another kind, a decline for want of gain, and one that was never lifted."""
    states = []
    for layer in range(3):
        found = named(lifted(), f"l_past_key_values_layers_{layer}_recurrent_states_0_")
        states.append(state_report(found, *explain_choice(found, Options(), CPU, "cpp")))
    other = lifted(GLA, operand=torch.bfloat16)
    states.append(state_report(other, *explain_choice(other, Options(flush=16), CPU, "cpp")))
    tiny = named(lifted(lanes=(1, 4), sizes=(32, 32)), "tiny")
    aten = Options(target="aten")
    states.append(state_report(tiny, *explain_choice(tiny, aten, CPU, "aten")))
    refused = Declined(
        "tanh_1", "nonlinear", "tanh of <S> [B, H, K, V] is not linear in the state & more", "model.py:12"
    )
    states.append(state_report(named(lifted(), "odd").state, refused))
    return Report(tuple(states), graphs=2, options={"flush": "auto", "row_dtype": torch.bfloat16})


def test_state_report_of_a_plan() -> None:
    found = lifted()
    plan, prediction = explain_choice(found, Options(flush=8, capacity=12), CPU, "cpp")
    state = state_report(found, plan, prediction)
    assert (state.name, state.shape, state.dtype, state.status) == ("state", (32, 32, 128, 128), "float32", "buffered")
    assert state.signature == "DRUR" and state.program == str(GDN) and state.source == "model.py:7"
    assert state.row_bytes == 12 * 32 * 32 * (4 + 4 * 128 + 4 * 128)  # capacity slots of g, k and u
    assert state.prediction == prediction and state.rule == ""


def test_what_is_no_matrix_state_is_kept_and_not_counted_as_one() -> None:
    vector = Declined("add_1", "vector", "it has fewer than two dims", "model.py:13")
    kept = state_report(named(lifted(), "normaliser").state, vector, kept=True)
    report = Report((kept,))
    assert report.headline == "0 states in 1 graph: nothing to buffer (1 other tensor written, no matrix state: kept)"
    assert "vector: it has fewer than two dims [model.py:13]" in str(report)


def test_a_whole_call_gains_less_than_its_states() -> None:
    found = lifted()
    state = state_report(found, *explain_choice(found, Options(), CPU, "cpp"))
    alone, among = (whole_call([state.prediction], Call(size, 1)) for size in (1 << 26, 1 << 30))
    assert alone is not None and among is not None
    assert "100% of it states" in str(alone) and "6% of it states" in str(among) and among.share < 0.07
    assert state.prediction is not None and state.prediction.choice is not None
    assert alone.gain == pytest.approx(state.prediction.choice.gain, abs=0.01) and 1 < among.gain < alone.gain
    assert whole_call([], Call(1 << 20, 0)) is None


def test_a_report_says_what_the_whole_gains_and_what_its_words_mean(tmp_path: Path) -> None:
    report = replace(full_report(), calls=(WholeCall(1000, 400, 1.5),))
    report.to_html(tmp_path / "page.html")
    for text in (str(report), (tmp_path / "page.html").read_text()):
        assert "40% of it states; as a whole 1.50x predicted" in text
        for term, _ in LEGEND:
            assert f"{term}:" in text or f"<dt>{term}</dt>" in text
    assert json.loads(json.dumps(report.to_dict()))["calls"] == [
        {"bytes": 1000, "state_bytes": 400, "gain": 1.5, "share": 0.4}
    ]
    assert "slot:" not in str(Report((), notes=("nothing",)))


def test_state_report_of_declines() -> None:
    states = {state.name: state for state in full_report().states}
    assert (states["tiny"].status, states["tiny"].rule) == ("declined", "no-gain")
    assert states["tiny"].prediction is not None and states["tiny"].prediction.chosen is None
    assert states["tiny"].prediction.target == "aten"
    assert states["tiny"].program and not states["tiny"].plan
    assert (states["odd"].rule, states["odd"].prediction, states["odd"].program) == ("nonlinear", None, "")


def test_a_recurrent_plan_owes_no_rows() -> None:
    found = lifted()
    state = state_report(found, *explain_choice(found, Options(flush=1), CPU, "cpp"))
    assert (state.status, state.row_bytes) == ("recurrent", 0)


# --------------------------------------------------------------------------------------------------- text


def test_text_fits_100_columns_and_says_everything() -> None:
    text = str(full_report())
    assert max(map(len, text.splitlines())) <= 100
    assert text.isascii()  # printable on any terminal
    headline = text.splitlines()[0]
    assert "6 states in 2 graphs: 4 buffered, 2 declined" in headline
    flat = " ".join(text.split())
    assert "nonlinear: tanh of <S> [B, H, K, V] is not linear in the state & more [model.py:12]" in flat
    assert "L* = sqrt(2*s*K*V/slot)" in flat and "DRUR" in flat and "no-gain" in flat


def test_layers_of_one_kind_share_a_row() -> None:
    report = full_report()
    assert [len(names) for _, names in report.groups()] == [3, 1, 1, 1]
    assert "and 2 more" in " ".join(str(report).split())


def test_very_long_names_and_reasons_are_wrapped() -> None:
    state = StateReport("n" * 300, ("s" * 40, 4, 5), "float32", "declined", "why " * 100 + "x" * 200, "rule", "f.py:1")
    text = str(Report((state,)))
    assert max(map(len, text.splitlines())) <= 100
    assert text.count("n") >= 300 and text.count("x") >= 200


def test_an_empty_report() -> None:
    assert str(Report((), graphs=1)) == "kvbuffer: 0 states in 1 graph: nothing to buffer"
    assert "note: the graph needs gradients" in str(Report((), notes=("the graph needs gradients",)))


# --------------------------------------------------------------------------------------- dict, page, plot


def test_dict_survives_json() -> None:
    report = full_report()
    again = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert again == report.to_dict()
    assert again["options"] == {"flush": "auto", "row_dtype": "bfloat16"}
    assert len(again["states"]) == 6 and again["states"][0]["prediction"]["candidates"][0]["variant"] == "recurrent"


class Page(HTMLParser):
    """Text of a page; fails on unbalanced tags and on anything loaded from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "img", "iframe")
        assert not {"src", "href"} & {name for name, _ in attrs}
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_page_is_escaped_and_self_contained(tmp_path: Path) -> None:
    full_report().to_html(tmp_path / "report.html")
    source = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page()
    page.feed(source)
    assert page.open == []
    assert "tanh of <S> [B, H, K, V] is not linear in the state & more" in page.text
    assert "<S>" not in source and "and 2 more" in page.text and "decay g" in page.text


def test_page_escapes_names(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    Report((StateReport(evil, (evil,), evil, "declined", evil, evil, evil, evil),), notes=(evil,)).to_html(
        tmp_path / "x"
    )
    assert "<script" not in (tmp_path / "x").read_text(encoding="utf-8")


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_plot(tmp_path: Path, ending: str) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / f"plot.{ending}"
    full_report().plot(path)
    content = path.read_bytes()
    assert len(content) > 10_000 and content.startswith(b"\x89PNG" if ending == "png" else b"<?xml")


def test_every_panel_has_a_title(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = pytest.importorskip("matplotlib.figure")
    seen: list[Any] = []
    save = figure.Figure.savefig
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, *a, **k: (seen.append(self), save(self, *a, **k)))
    full_report().plot(tmp_path / "plot.png")
    titles = [panel.get_title(loc="left") for panel in seen[0].axes]
    assert len(titles) == 6 and all("a step: " in title and len(title) < 75 for title in titles)
    assert "6 states in 2 graphs" in seen[0].get_suptitle()


def test_plot_without_predictions() -> None:
    with pytest.raises(ValueError, match="nothing to plot"):
        Report(()).plot("never.png")


def test_plot_without_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ImportError, match=r"kvbuffer_compile\[plot\]"):
        full_report().plot(tmp_path / "plot.png")
