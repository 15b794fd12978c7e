"""What was expected of the suite `architectures` before its run: docs/benchmarks/predictions.md has the reasons.

A prediction is not mended after a run. One that was wrong stays, with what was found beside it.
"""

from __future__ import annotations

from dataclasses import replace
from statistics import median
from typing import Final

from benchmarks.harness.results import Prediction, Ratio, Results
from benchmarks.harness.targets import BASELINES

SUITE: Final = "architectures"
_BASELINE: Final = BASELINES[SUITE]


def _ratio(text: str, measure: str, subject: str, low: float, high: float, key: str = "value") -> Prediction:
    return Prediction(text, f"{SUITE}/{measure}", subject, _BASELINE, key, low, high)


def _value(text: str, measure: str, subject: str, low: float, high: float) -> Prediction:
    return Prediction(text, f"{SUITE}/{measure}", subject, "", "value", low, high)


PREDICTIONS: Final = (
    _ratio("processor time, no call needs L7", "l7-cpu/0", "remote", 0.7, 1.0),
    _ratio("processor time, 10 % of the calls need L7", "l7-cpu/10", "remote", 0.7, 1.05),
    _ratio("processor time, 50 % of the calls need L7", "l7-cpu/50", "remote", 0.8, 1.15),
    _ratio("processor time, all calls need L7", "cpu", "remote", 0.9, 1.15),
    _ratio("processor time, all calls need L7", "cpu", "node", 0.6, 0.8),
    _ratio("processor time, all calls need L7", "cpu", "service-account", 0.65, 0.9),
    _ratio("processor time, all calls need L7", "cpu", "ours", 1.0, 1.5),
    _ratio("processor time, 90 % of the calls stay on their host", "near-cpu/90", "node", 0.6, 0.9),
    _ratio("p50, hosts 1 ms apart: one more way between hosts", "rtt/1", "remote", 1.25, 1.7, "p50_us"),
    _ratio("p50, hosts 1 ms apart", "rtt/1", "node", 0.8, 1.0, "p50_us"),
    _ratio("p99 beside a neighbour's flood", "isolation/flood", "node", 2, 8),
    _ratio("p99 beside a neighbour's flood", "isolation/flood", "service-account", 0.6, 1.5),
    _ratio("p99 beside a neighbour's flood", "isolation/flood", "remote", 4, 20),
    _ratio("p99 beside a neighbour's flood", "isolation/flood", "ours", 4, 25),
    _ratio("p99 beside a neighbour's bad filter", "isolation/filter", "node", 3, 30),
    _ratio("p99 beside a neighbour's bad filter", "isolation/filter", "service-account", 0.5, 2),
    _ratio("p99 beside a neighbour's bad filter", "isolation/filter", "remote", 3, 30),
    _ratio("p99 beside a neighbour's bad filter", "isolation/filter", "ours", 0.5, 3),
    _value("lost while a process that reads HTTP is replaced", "upgrade/l7", "sidecar", 1, 8),
    _value("lost while a process that reads HTTP is replaced", "upgrade/l7", "node", 6, 24),
    _value("lost while a process that reads HTTP is replaced", "upgrade/l7", "remote", 0, 0),
    _value("lost while a process that reads HTTP is replaced", "upgrade/l7", "ours", 0, 0),
    _value("lost while a process that carries connections is replaced", "upgrade/l4", "remote", 1, 12),
    # Of 24 November.
    _ratio("processor time, all calls need L7", "cpu", "sidecar-one-pass", 0.6, 0.85),
    _ratio("processor time, all calls need L7", "cpu", "ours-sidecar", 0.9, 1.4),
    _ratio("p50, hosts 1 ms apart", "rtt/1", "ours-sidecar", 0.9, 1.2, "p50_us"),
    _ratio("p99 beside a neighbour's flood", "isolation/flood", "ours-sidecar", 0.6, 2.0),
    _value("lost while a process that reads HTTP is replaced", "upgrade/l7", "ours-sidecar", 1, 12),
)


def judged(results: Results) -> list[Prediction]:
    """Every prediction about a suite of this run, with what was found of it."""
    if not any(one.suite == SUITE for one in results.measures):
        return []
    found = {(one.measure, one.subject, one.baseline, one.key): one for one in results.ratios}
    judged = []
    for one in PREDICTIONS:
        name = (one.measure, one.subject, one.baseline, one.key)
        judged.append(replace(one, ratio=found.get(name) if one.baseline else _counted(results, one)))
    return judged


def _counted(results: Results, asked: Prediction) -> Ratio | None:
    """The median and the range of the rounds: of counts that may be 0 there is no interval."""
    series = results.find(asked.measure, asked.subject)
    if series is None or series.refused or not series.counted:
        return None
    values = [one.value for one in series.counted]
    return Ratio(asked.measure, asked.subject, "", "value", median(values), min(values), max(values), len(values))
