"""The suite `waypoint`: all three waypoints stand, do the same, and are measured."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.harness import statistics, targets
from benchmarks.harness.bench import Bench
from benchmarks.harness.results import Measure, Results, Round, Series
from benchmarks.lab.remains import left_of
from benchmarks.lab.topology import Lab
from benchmarks.suites import waypoint
from benchmarks.suites.between.mesh import ROUTES, path, prefixes
from benchmarks.suites.waypoint import Plan, Waypoint

TINY = Plan((1, 2), protocols=("grpc",), routes=(1000,), shares=(50,), rounds=1, corner_rounds=1, seconds=0.6, idle=80)


@pytest.mark.root
@pytest.mark.mesh
def test_every_waypoint_is_proven_and_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labs: list[Lab] = []

    def lab() -> Lab:
        labs.append(Lab())
        return labs[-1]

    monkeypatch.setattr(waypoint, "Lab", lab)
    bench = Bench(Results("now", quick=True), tmp_path, quick=True)
    Waypoint(TINY).run(bench)
    assert left_of(labs[0].names.prefix) == []
    assert not bench.failures
    assert [one.passed for one in bench.results.checks] == [True]

    def found(measure: str, subject: str) -> Round:
        series = bench.results.find(measure, subject)
        assert series is not None
        assert series.rounds, series.refused
        return series.rounds[-1]

    for subject in ("built-in", "envoy-as-guided", "envoy-as-shipped"):
        saturated = found("waypoint/grpc/1000/saturated", subject)
        own = found("waypoint/cpu/grpc/1000/saturated", subject)
        assert saturated.value == saturated.details["per_second"] > 10
        assert own.value == saturated.details["cpu_us/waypoint"]
        assert 0 < own.value < saturated.details["cpu_us"]
        offered = found("waypoint/grpc/1000/50", subject)
        assert 0 < offered.details["p50_us"] <= offered.value <= offered.details["max_us"] * 1.001
        held = found("waypoint/idle", subject)
        assert held.value > found("waypoint/memory", subject).value - 1
        assert held.details["each_kb"] > 0


def test_the_route_that_is_asked_for_is_the_one_in_the_middle() -> None:
    for routes in ROUTES:
        assert len(set(prefixes(routes))) == routes
        assert path(routes) == f"{sorted(prefixes(routes))[routes // 2]}/Echo"


def test_the_targets_are_about_what_the_suite_measures() -> None:
    """The waypoint's own processor time, and p99, at every share of the knee."""
    results = Results("now", quick=False)
    for share in waypoint.SHARES:
        name = f"waypoint/http1/10/{share}"
        measure = Measure(name, waypoint.NAME, "", "", "us")
        results.measures.append(measure)
        for subject, p99, own in (("built-in", 60.0, 40.0), ("envoy-as-guided", 100.0, 100.0)):
            details = {"cpu_us/waypoint": own, "cpu_us": 500.0, "operations": 5000.0}
            results.series.append(Series(name, subject, [Round(i, p99, details) for i in range(5)]))
        waypoint.add_own(results, measure)
    results.ratios, _ = statistics.ratios(results, targets.BASELINES)
    judged = [one for one in targets.judged(results) if one.measure.startswith("waypoint/")]
    found = [(one.ratio.median, bool(one.met)) for one in judged if one.ratio is not None]
    assert [met for _, met in found] == [True] * 6
    assert [ratio for ratio, _ in found] == pytest.approx([0.4] * 3 + [0.6] * 3)
