"""The suite `memory`: every kind of sidecar stands, is measured, and what is added up is what there is."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.harness import targets
from benchmarks.harness.bench import Bench
from benchmarks.harness.results import Measure, Results, Round, Series
from benchmarks.lab.remains import left_of
from benchmarks.lab.topology import Lab
from benchmarks.suites import memory
from benchmarks.suites.memory import Memory, Plan

TINY = Plan(sidecars=2, idle=20, seconds=1.0)


@pytest.mark.root
@pytest.mark.mesh
def test_every_kind_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labs: list[Lab] = []

    def lab() -> Lab:
        labs.append(Lab())
        return labs[-1]

    monkeypatch.setattr(memory, "Lab", lab)
    bench = Bench(Results("now", quick=True), tmp_path, quick=True)
    Memory(TINY).run(bench)
    assert left_of(labs[0].names.prefix) == []
    assert not bench.failures

    def found(measure: str, subject: str) -> Round:
        series = bench.results.find(measure, subject)
        assert series is not None
        assert series.rounds, series.refused
        return series.rounds[-1]

    kinds = [one.name for one in bench.results.subjects]
    assert kinds == ["uproxy", "uproxy-forked", "envoy"]
    for kind in kinds:
        first, further = found(memory.ALONE, kind), found(memory.MARGINAL, kind)
        assert 5 < further.value < first.value < 200
        # With two of them, what is further is all that there is besides the first.
        assert further.details["all_mb"] == pytest.approx(first.value + further.value, rel=0.05)
        assert 0 < found(memory.IDLE, kind).value < 1000
    assert found(memory.MARGINAL, "uproxy-forked").value < found(memory.MARGINAL, "uproxy").value
    decided = {one.text for one in targets.judged(bench.results) if one.ratio is not None}
    assert decided == {
        "memory of each further sidecar, MB",
        "memory of each further sidecar from a fork server, MB",
    }


@pytest.mark.parametrize(("values", "met"), [((17.0, 17.1, 17.2), True), ((20.1, 20.2, 20.3), False)])
def test_a_target_that_is_no_ratio_is_judged_by_the_value(values: tuple[float, ...], met: bool) -> None:
    results = Results("now", quick=True, measures=[Measure(memory.MARGINAL, "memory", "", "", "MB")])
    results.series = [Series(memory.MARGINAL, "uproxy", [Round(i, each) for i, each in enumerate(values)])]
    (target,) = (one for one in targets.judged(results) if (one.measure, one.subject) == (memory.MARGINAL, "uproxy"))
    assert target.ratio is not None
    assert (target.ratio.median, target.met) == (pytest.approx(values[1]), met)


def test_a_target_of_a_series_that_was_refused_is_not_judged() -> None:
    results = Results("now", quick=True)
    results.series = [Series(memory.MARGINAL, "uproxy", [Round(i, 1.0) for i in range(3)], refused="for a reason")]
    assert all(one.ratio is None for one in targets.judged(results))
