"""docs/recurrences.md says what the code does today."""

from __future__ import annotations

import pytest

from tests.spelled.recurrences_table import PAGE, sections, table, versions

ARCHITECTURES = "Architectures of transformers"


@pytest.mark.parametrize(
    "title", [pytest.param(t, marks=pytest.mark.nightly if t == ARCHITECTURES else []) for t in sections()]
)
def test_the_page_is_up_to_date(title: str) -> None:
    written = PAGE.read_text(encoding="utf-8")
    if versions() not in written:
        pytest.skip(f"the page was made with other versions than {versions()}")
    assert f"## {title}\n\n{table(sections()[title]()).rstrip()}\n" in written, (
        "run python -m tests.spelled.recurrences_table"
    )
