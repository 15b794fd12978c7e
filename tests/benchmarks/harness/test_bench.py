"""The order of rounds, and what happens to a run when a subject fails or the generator was the bottleneck."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from benchmarks.harness.bench import Bench, BenchError, Probe, Sample
from benchmarks.harness.results import Check, Measure, Results, Subject
from benchmarks.harness.rounds import WARM_UP_S


@dataclass
class Standing:
    """A subject whose only process is this one."""

    subject: Subject
    roles: dict[str, list[int]] = field(default_factory=lambda: {"proxy": [os.getpid()]})

    def processes(self) -> Mapping[str, Sequence[int]]:
        return self.roles


def subject(name: str, **more: bool) -> Subject:
    return Subject(name, name.title(), "for a test", **more)


def measure(name: str = "paths/rr/1/64B") -> Measure:
    return Measure(name, "paths", "round trips", name, "us")


@pytest.fixture
def results() -> Results:
    return Results("2026-01-01T00:00:00Z", quick=True)


@pytest.fixture
def lines() -> list[str]:
    return []


@pytest.fixture
def bench(results: Results, lines: list[str], tmp_path: Path) -> Bench:
    return Bench(results, tmp_path, quick=True, tell=lines.append)


def test_every_subject_is_taken_once_per_round_and_another_leads_each(bench: Bench, results: Results) -> None:
    taken: list[tuple[str, float]] = []
    numbers: list[int] = []

    def take(live: Standing, seconds: float, number: int) -> Sample:
        taken.append((live.subject.name, seconds))
        numbers.append(number)
        return Sample(1.0, 10)

    bench.interleave([Probe(measure(), take)], [Standing(subject(name)) for name in "abc"], rounds=3, seconds=2.0)
    names = "".join(name for name, _ in taken)
    assert [names[i : i + 3] for i in range(0, 12, 3)] == ["abc", "bca", "cab", "abc"]
    assert numbers == [number for number in range(4) for _ in "abc"]
    assert [seconds for _, seconds in taken] == [WARM_UP_S] * 3 + [2.0] * 9  # the warm-up is shorter, and is not kept
    assert {one.subject: [r.number for r in one.rounds] for one in results.series} == {
        name: [1, 2, 3] for name in "abc"
    }
    assert [one.name for one in results.subjects] == ["a", "b", "c"]


def test_one_measure_after_the_other(bench: Bench, results: Results) -> None:
    lives = [Standing(subject("a"))]
    probes = [Probe(measure(name), lambda live, seconds, number: Sample(1.0, 1)) for name in ("first", "second")]
    bench.interleave(probes, lives, rounds=1, seconds=0.0)
    bench.interleave(
        [Probe(measure("third"), lambda live, seconds, number: Sample(1.0, 1))], lives, rounds=1, seconds=0.0
    )
    assert [one.name for one in results.measures] == ["first", "second", "third"]
    assert len(results.subjects) == 1


def test_a_subject_that_fails_is_out_of_that_measure_only(bench: Bench, results: Results, lines: list[str]) -> None:
    taken: list[str] = []

    def take(live: Standing, seconds: float, number: int) -> Sample:
        taken.append(live.subject.name)
        if live.subject.name == "b" and taken.count("b") == 3:
            raise BenchError("it hung up")
        return Sample(1.0, 1)

    lives = [Standing(subject(name)) for name in "ab"]
    bench.interleave([Probe(measure("first"), take), Probe(measure("second"), take)], lives, rounds=3, seconds=0.0)
    failed = results.find("first", "b")
    assert failed is not None
    assert failed.refused == "it hung up"
    assert [one.number for one in failed.rounds] == [1]  # what it did before is shown
    assert [len(one.rounds) for one in results.series] == [3, 1, 3, 3]
    assert any("first: b failed: it hung up" in line for line in lines)


def test_a_subject_whose_process_is_gone_fails(bench: Bench, results: Results) -> None:
    gone = Standing(subject("a"), {"client proxy": [2**22 + 1]})  # above the largest process id of Linux
    bench.interleave([Probe(measure(), lambda live, seconds, number: Sample(1.0, 1))], [gone], rounds=1, seconds=0.0)
    assert results.series[0].refused == f"a: process {2**22 + 1} is gone"


def test_processor_time_and_memory_are_by_role_and_the_application_is_not_the_subjects(
    bench: Bench, results: Results
) -> None:
    def take(live: Standing, seconds: float, number: int) -> Sample:
        for _ in range(200_000):
            pass
        return Sample(1.0, operations=100)

    me = [os.getpid()]
    bench.interleave(
        [Probe(measure(), take)], [Standing(subject("a"), {"proxy": me, "application": me})], rounds=1, seconds=0.0
    )
    details = results.series[0].rounds[0].details
    assert details["operations"] == 100
    assert details["cpu_us"] == details["cpu_us/proxy"] == pytest.approx(details["cpu_us/application"], rel=0.1)
    assert details["cpu_us"] > 5
    assert details["pss_mb"] == details["pss_mb/proxy"] > 5
    assert details["softirq_us"] >= 0


def test_a_subject_without_processes_of_its_own_has_no_processor_time_and_no_memory(
    bench: Bench, results: Results
) -> None:
    wire = Standing(subject("a"), {"application": [os.getpid()]})
    probe = Probe(measure(), lambda live, seconds, number: Sample(1.0, operations=100))
    bench.interleave([probe], [wire], rounds=1, seconds=0.0)
    details = results.series[0].rounds[0].details
    assert {"cpu_us", "pss_mb"}.isdisjoint(details)
    assert details["pss_mb/application"] > 5


def test_what_the_probe_says_of_its_memory_stands(bench: Bench, results: Results) -> None:
    probe = Probe(measure(), lambda live, seconds, number: Sample(1.0, 0, {"pss_mb": 3.0}))
    bench.interleave([probe], [Standing(subject("a"))], rounds=1, seconds=0.0)
    assert results.series[0].rounds[0].details["pss_mb"] == 3.0
    assert "cpu_us" not in results.series[0].rounds[0].details  # per operation, and there is none


@pytest.mark.parametrize(("bound", "refused"), [(0, False), (1, False), (2, True), (3, True)])
def test_a_series_that_the_generator_decided_is_refused(
    bench: Bench, results: Results, bound: int, refused: bool
) -> None:
    def take(live: Standing, seconds: float, number: int) -> Sample:
        return Sample(1.0, 1, bottleneck="its core was busy 97 %" if number <= bound else "")

    bench.interleave([Probe(measure(), take)], [Standing(subject("a"))], rounds=3, seconds=0.0)
    series = results.series[0]
    reason = f"{bound} of 3 rounds say nothing of the subject: its core was busy 97 %"
    assert series.refused == (reason if refused else "")
    assert [bool(one.bottleneck) for one in series.rounds].count(True) == bound


def test_a_reference_that_the_generator_decided_is_shown_and_labelled(bench: Bench, results: Results) -> None:
    probe = Probe(measure(), lambda live, seconds, number: Sample(1.0, 1, bottleneck="its core was busy 97 %"))
    bench.interleave([probe], [Standing(subject("tcp", reference=True))], rounds=3, seconds=0.0)
    assert results.series[0].refused == ""
    assert results.series[0].remark == "bound by the generator: its core was busy 97 %"


def test_progress_says_what_which_round_and_how_long(bench: Bench, lines: list[str]) -> None:
    probe = Probe(measure(), lambda live, seconds, number: Sample(1.0, 1))
    bench.interleave([probe], [Standing(subject("a"))], rounds=2, seconds=60.0)
    assert lines[0] == "paths/rr/1/64B: warm-up, a; about 2 min left of this part"
    assert lines[2].startswith("paths/rr/1/64B: round 2 of 2, a; about ")


def test_checks_and_conditions_are_kept(bench: Bench, results: Results, lines: list[str]) -> None:
    bench.check(Check("stalls are seen", False, "p99 was 3 ms"))
    bench.condition("pinning", "core 0")
    bench.machine("wrk", "4.1.0")
    assert (results.checks[0].passed, results.conditions, results.machine) == (
        False,
        {"pinning": "core 0"},
        {"wrk": "4.1.0"},
    )
    assert lines == ["FAILED: stalls are seen: p99 was 3 ms"]
