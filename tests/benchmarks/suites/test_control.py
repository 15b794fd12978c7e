"""The suite `control`: every change is made, enforced and timed, and the targets are judged by it."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import fleet
from benchmarks.harness import targets
from benchmarks.harness.bench import Bench
from benchmarks.harness.results import Measure, Results, Round, Series
from benchmarks.lab.remains import left_of
from benchmarks.lab.topology import Lab
from benchmarks.suites import control
from benchmarks.suites.control import Control, Plan

TINY = Plan(rounds=1, changes=1, simulated=4, simulated_changes=1, namespaces=1)
CHANGES = ("policy", "label", "bind", "unbind", "many", "flap")
ONCE = ("whole", "published", "maps", "restart", "new", "new-all")


@pytest.mark.root
@pytest.mark.mesh
def test_every_change_is_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labs: list[Lab] = []

    def lab(*, control: bool) -> Lab:
        labs.append(Lab(control=control))
        return labs[-1]

    monkeypatch.setattr(control, "Lab", lab)
    # Nothing is judged by what is found here.
    monkeypatch.setattr(control, "_POLL_S", 0.05)
    monkeypatch.setattr(control, "_REST_S", 0.0)
    monkeypatch.setattr(fleet, "SERVICES_EACH", 20)
    bench = Bench(Results("now", quick=True), tmp_path, quick=True)
    Control(TINY).run(bench)
    assert left_of(labs[0].names.prefix) == []
    assert not bench.failures

    def found(name: str) -> Round:
        series = bench.results.find(f"control/{name}", "mesh")
        assert series is not None
        assert series.rounds, series.refused
        return series.rounds[-1]

    for name in CHANGES:
        median, worst = found(name), found(f"{name}/worst")
        assert 0 < median.value <= worst.value
        assert median.value == median.details["p50_us"] / 1000
        assert worst.value == median.details["max_us"] / 1000
    assert found("many").details["cpu_us/simulated proxies"] > 0
    assert all(found(name).value > 0 for name in ONCE)
    assert found("growth").value < 120
    assert found("published").value <= found("maps").value
    assert {one.name for one in bench.results.measures} == {
        f"control/{name}" for name in (*ONCE, "apply", "growth", *CHANGES, *(f"{one}/worst" for one in CHANGES))
    }


@pytest.mark.parametrize(("worst_ms", "met"), [(12.0, True), (101.0, False)])
def test_a_label_meets_its_target_when_the_slowest_of_a_round_does(worst_ms: float, met: bool) -> None:
    results = Results("now", quick=True, measures=[Measure("control/label/worst", "control", "", "", "ms")])
    results.series = [Series("control/label/worst", "mesh", [Round(i, worst_ms) for i in range(3)])]
    (target,) = (one for one in targets.judged(results) if one.measure == "control/label/worst")
    assert target.met is met
