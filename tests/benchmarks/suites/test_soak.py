"""The suite `soak`: everything at once goes through, and what grows is seen."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.harness.bench import Bench
from benchmarks.harness.results import Results, Subject
from benchmarks.lab.remains import left_of
from benchmarks.lab.topology import Lab
from benchmarks.suites import soak
from benchmarks.suites.soak import Held, Part, Plan, Soak, flat

TINY = Plan(rounds=2, seconds=0.7, rest_s=1.0)
PARTS = ("soak-caller", "soak-called", "soak-waypoint", "soak-node-a", "soak-node-b")


@pytest.mark.root
@pytest.mark.mesh
def test_every_program_is_watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labs: list[Lab] = []

    def lab() -> Lab:
        labs.append(Lab())
        return labs[-1]

    monkeypatch.setattr(soak, "Lab", lab)
    monkeypatch.setattr(soak, "_DISTURBED_S", 0.3)
    told: list[str] = []
    bench = Bench(Results("now", quick=True), tmp_path, quick=True, tell=told.append)
    Soak(TINY).run(bench)
    assert left_of(labs[0].names.prefix) == []
    assert [one.name for one in bench.results.subjects] == list(PARTS)
    for name in PARTS:
        for measure in ("memory", "descriptors", "entries"):
            found = bench.results.find(f"soak/{measure}", name)
            assert found is not None
            assert len(found.rounds) == TINY.rounds
    # How much a program still settles by in seconds is no matter of this test; that nothing is left open is.
    assert all(one.details["descriptors"] <= 4 for one in bench.results.checks)
    assert len(bench.results.checks) == len(PARTS)
    (said,) = (line for line in told if line.endswith(" connections"))
    assert int(said.split()[1].replace(",", "")) > 5


PROXY = Part(Subject("soak-caller", "a uProxy", ""), lambda: 1, 15020, (), empty=True)
FIRST = Held(40.0, 20, 0)


@pytest.mark.parametrize(
    ("part", "last", "passed"),
    [
        pytest.param(PROXY, Held(42.9, 24, 0), True, id="settled"),
        pytest.param(PROXY, Held(43.1, 20, 0), False, id="memory"),
        pytest.param(PROXY, Held(40.0, 25, 0), False, id="descriptors"),
        pytest.param(PROXY, Held(40.0, 20, 1), False, id="a connection that is left"),
        pytest.param(replace(PROXY, empty=False), Held(40.0, 20, 16), True, id="entries of maps"),
        pytest.param(replace(PROXY, empty=False), Held(40.0, 20, 17), False, id="more of them"),
    ],
)
def test_what_grows_fails(part: Part, last: Held, passed: bool) -> None:
    assert flat(part, [FIRST, Held(99.0, 99, 99), last], 100).passed is passed
    assert not flat(part, [FIRST, last], 0).passed
