"""Predictions: written down alike in code and docs, and judged by the whole interval."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.harness.predictions import PREDICTIONS, judged
from benchmarks.harness.results import Measure, Ratio, Results, Round, Series, read

DOCS = Path(__file__).parents[3] / "docs" / "benchmarks" / "predictions.md"


def test_docs_have_the_same_ranges() -> None:
    rows = re.findall(r"^\|.*\| (`.*`) \| ([\d.]+)(?: to ([\d.]+))? \|", DOCS.read_text(), re.MULTILINE)
    told = [
        (subject, float(low), float(high or low))
        for subjects, low, high in rows
        for subject in re.findall(r"`(.*?)`", subjects)
    ]
    assert told == [(one.subject, one.low, one.high) for one in PREDICTIONS]


@pytest.mark.parametrize(
    ("low", "high", "held"),
    [(0.7, 1.0, True), (0.71, 0.9, True), (0.6, 0.8, None), (1.01, 1.2, False), (0.5, 0.6, False)],
)
def test_the_whole_interval_decides(low: float, high: float, held: bool | None) -> None:
    one = PREDICTIONS[0]
    assert (one.low, one.high) == (0.7, 1.0)
    ratio = Ratio(one.measure, one.subject, one.baseline, one.key, (low + high) / 2, low, high, 5)
    assert replace(one, ratio=ratio).held is held
    assert one.held is None


def test_ratios_and_counts_of_a_run_are_found(tmp_path: Path) -> None:
    found = Results("now", quick=True)
    found.measures.append(Measure("architectures/upgrade/l7", "architectures", "lost", "", "requests"))
    found.series.append(Series("architectures/upgrade/l7", "remote", [Round(number, 0.0) for number in (1, 2, 3)]))
    found.series.append(Series("architectures/upgrade/l7", "node", [Round(1, 3.0), Round(2, 30.0), Round(3, 9.0)]))
    found.series.append(Series("architectures/upgrade/l7", "ours", [Round(1, 0.0)]))
    found.ratios.append(Ratio("architectures/cpu", "node", "sidecar", "value", 0.9, 0.85, 0.95, 5))
    found.predictions = judged(found)
    outcomes = {(one.measure, one.subject): one.held for one in found.predictions if one.ratio}
    assert outcomes == {
        ("architectures/upgrade/l7", "remote"): True,
        ("architectures/upgrade/l7", "node"): None,
        ("architectures/upgrade/l7", "ours"): None,
        ("architectures/cpu", "node"): False,
    }
    found.write(tmp_path / "results.json")
    assert read(tmp_path / "results.json").predictions == found.predictions


def test_nothing_is_predicted_of_other_suites() -> None:
    assert judged(Results("now", quick=True)) == []
