"""A published run is the run: small, readable by the commands, and the page leads to what lies beside it."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.harness.compare import load
from benchmarks.publish import main
from benchmarks.report.wording import question, ratio
from tests.support.results import realistic


def test_a_published_run_is_read_as_the_run_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, shown = tmp_path / "run", tmp_path / "shown"
    run.mkdir()
    results = realistic()
    results.write(run / "results.json")
    assert main([str(run), str(shown)]) == 0
    assert load(shown) == load(shown / "results.json.xz") == results
    assert (shown / "results.json.xz").stat().st_size < (run / "results.json").stat().st_size / 2
    assert sorted(one.name for one in shown.iterdir()) == ["report.html", "results.csv", "results.json.xz", "tables.md"]
    assert 'href="results.json.xz"' in (shown / "report.html").read_text()
    tables = (shown / "tables.md").read_text()
    assert "## Where we lose" in tables
    ours = next(one for one in results.ratios if (one.subject, one.key) == ("uproxy", "value"))
    measure = next(one for one in results.measures if one.name == ours.measure)
    (line,) = (one for one in tables.partition("## Medians")[2].splitlines() if question(measure) in one)
    assert ratio(ours) in line
    assert "report.html" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "told"), [("results.json.xz", "not compressed by xz"), ("results.json", "not JSON")])
def test_what_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, told: str) -> None:
    (tmp_path / name).write_text("no run")
    assert main([str(tmp_path), str(tmp_path / "shown")]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "shown").exists()
