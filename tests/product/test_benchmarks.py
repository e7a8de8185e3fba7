"""What the README says was measured is what the stored results say."""

import json
from pathlib import Path

import pytest

from benchmarks import cpu_report

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(p.name for p in cpu_report.RESULTS.glob("cpu_*.json"))


def test_the_tables_of_the_readme_are_the_stored_results():
    readme = (ROOT / "README.md").read_text()
    measured = cpu_report.tables(cpu_report.cases("cpu_kernels"), cpu_report.cases("cpu_models*"))
    for table in (cpu_report.sweeps(), *measured):
        assert table in readme, f"the README lacks this table; python -m benchmarks.cpu_report prints it\n{table}"


@pytest.mark.parametrize("name", FILES)
def test_results_say_how_they_came_about(name):
    found = json.loads((cpu_report.RESULTS / name).read_text())
    assert found["command"].startswith("python -m benchmarks.cpu")
    assert {"cpu", "cores", "threads", "torch", "compiler"} <= found["machine"].keys() and found["cases"]
    assert (cpu_report.RESULTS / "cpu.png").stat().st_size < 100_000
