"""docs/recurrences.md says what the code does today."""

from __future__ import annotations

import pytest

from tests.spelled.recurrences_table import PAGE, sections, table, versions
from tests.support.daily import chosen

# What is left out lifts the same forms as tests of their own do.
DAILY = sections().keys() - {
    "In the forms that graphs give them", "Several tokens by an associative scan", "Near-misses",
    "Architectures of transformers",
}  # fmt: skip


@pytest.mark.parametrize("title", chosen(sections(), DAILY))
def test_the_page_is_up_to_date(title: str) -> None:
    written = PAGE.read_text(encoding="utf-8")
    if versions() not in written:
        pytest.skip(f"the page was made with other versions than {versions()}")
    assert f"## {title}\n\n{table(sections()[title]()).rstrip()}\n" in written, (
        "run python -m tests.spelled.recurrences_table"
    )
