"""A whole run with suites that are made up: what is written, what is told, and the exit status."""

import csv
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from types import ModuleType

import pytest

from benchmarks import run
from benchmarks.harness import selfcheck
from benchmarks.harness.bench import Bench, BenchError, Probe, Sample
from benchmarks.harness.results import Check, Measure, Subject, read
from benchmarks.load import LoadError
from control.cli.__main__ import main


class Standing:
    def __init__(self, name: str, *, reference: bool = False) -> None:
        self.subject = Subject(name, name, "made up", reference=reference)

    def processes(self):
        return {"proxy": [os.getpid()]}


class Suite:
    """Named as a real one, so that it has that one's baseline."""

    name, title = "paths", "Made up"

    def __init__(self, taken: Callable[[Bench], None]) -> None:
        self.run = taken


def take(live: Standing, seconds: float, number: int) -> Sample:
    value = {"tcp": 1.0, "uproxy": 6.0, "envoy-hbone": 10.0}[live.subject.name]
    return Sample(value, 100, {"p99_us": value * 3}, {1000: 99, 9000: 1})


CHECK_INSTRUMENT = run.check_instrument
LIVES = [Standing("tcp", reference=True), Standing("uproxy"), Standing("envoy-hbone")]


def measured(bench: Bench) -> None:
    measures = [
        Measure(f"paths/rr/{connections}/64", "paths", "Round trip", f"{connections} connections", "us")
        for connections in (1, 64)
    ]
    bench.check(Check("stalls are seen", True, "p99 100 ms"))
    bench.condition("pinning", "none")
    bench.interleave([Probe(one, take) for one in measures], LIVES, rounds=3, seconds=0.0)


@pytest.fixture
def suites(monkeypatch):
    """Put suites in the place of the real ones: name -> what runs."""

    def put(**runs: Callable[[Bench], None]) -> None:
        for name, taken in runs.items():
            module = ModuleType(f"benchmarks.suites.{name}")
            module.SUITE = Suite(taken)
            module.SUITE.name = name
            monkeypatch.setitem(sys.modules, module.__name__, module)

    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(run, "check_instrument", lambda bench: None)
    return put


@pytest.fixture
def checked(suites, monkeypatch, tmp_path):
    """Run no suite, only the self-check, with the load generator's answers made up."""

    def with_checks(stalls, against_packaged):
        monkeypatch.setattr(selfcheck, "stalls", stalls)
        monkeypatch.setattr(selfcheck, "against_packaged", against_packaged)
        monkeypatch.setattr(run, "check_instrument", CHECK_INSTRUMENT)
        suites(paths=lambda bench: None)
        status = main(["bench", "run", "--suite", "paths", "--quick", "--output", str(tmp_path)])
        return status, read(tmp_path / "results.json")

    return with_checks


def test_a_run_is_written_told_and_shown(suites, tmp_path, capsys):
    suites(paths=measured)
    output = tmp_path / "new" / "run"
    assert main(["bench", "run", "--suite", "paths", "--quick", "--output", str(output)]) == 0
    found = read(output / "results.json")
    assert found.quick
    assert found.machine["uProxy"]
    assert found.conditions["pinning"] == "none"
    assert [len(one.rounds) for one in found.series] == [3] * 6
    (ours,) = (
        one for one in found.ratios if (one.measure, one.subject, one.key) == ("paths/rr/64/64", "uproxy", "value")
    )
    assert (ours.baseline, ours.rounds, ours.median) == ("envoy-hbone", 3, pytest.approx(0.6))
    met = {one.measure: one.met for one in found.targets}
    assert (met["paths/rr/1/64"], met["paths/rr/64/64"], met["paths/connect"]) == (True, True, None)

    rows = list(csv.DictReader((output / "results.csv").read_text().splitlines()))
    assert len(rows) == 18
    assert [(row["measure"], row["subject"], row["round"]) for row in rows[:2]] == [
        ("paths/rr/1/64", "tcp", "1"),
        ("paths/rr/1/64", "tcp", "2"),
    ]
    assert float(rows[3]["p99_us"]) == 18.0
    assert float(rows[3]["cpu_us"]) >= 0
    assert "<html" in (output / "report.html").read_text()

    out, err = capsys.readouterr()
    assert "paths/rr/64/64: round 3 of 3, envoy-hbone; about 0 s left of this part" in err
    assert all(str(output / name) in out for name in ("results.json", "results.csv", "report.html"))


def test_a_suite_that_fails_leaves_the_others_and_what_it_found(suites, tmp_path, capsys):
    def broken(bench: Bench) -> None:
        measured(bench)
        raise BenchError("Envoy did not start")

    suites(paths=broken, architectures=lambda bench: bench.condition("came", "too"))
    assert main(["bench", "run", "--output", str(tmp_path)]) == 1
    found = read(tmp_path / "results.json")
    assert len(found.series) == 6
    assert found.conditions["came"] == "too"
    assert "error: paths: ran to its end: Envoy did not start" in capsys.readouterr().err


def test_a_mistake_in_a_suite_is_told_with_where_it_is(suites, tmp_path, capsys):
    suites(paths=lambda bench: bench.peers["nobody"])
    assert main(["bench", "run", "--suite", "paths", "--output", str(tmp_path)]) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert "error: paths: ran to its end: KeyError: 'nobody'" in err


def test_a_subject_that_fails_is_a_failure_and_a_refusal_is_none(suites, tmp_path, capsys):
    def slow(live: Standing, seconds: float, number: int) -> Sample:
        return Sample(1.0, 1, bottleneck="late")

    def failing(live: Standing, seconds: float, number: int) -> Sample:
        if live.subject.name == "uproxy":
            raise BenchError("it hung up")
        return Sample(1.0, 1)

    def with_probe(probe):
        measure = Measure("paths/rr/1/64", "paths", "Round trip", "1", "us")
        return lambda bench: bench.interleave([Probe(measure, probe)], LIVES, rounds=2, seconds=0.0)

    suites(paths=with_probe(slow))
    assert main(["bench", "run", "--suite", "paths", "--output", str(tmp_path / "slow")]) == 0
    found = read(tmp_path / "slow" / "results.json")
    assert found.ratios == []
    assert [bool(one.refused) for one in found.series] == [False, True, True]
    suites(paths=with_probe(failing))
    assert main(["bench", "run", "--suite", "paths", "--output", str(tmp_path / "failing")]) == 1
    assert "error: paths/rr/1/64: uproxy failed: it hung up" in capsys.readouterr().err


def test_a_check_that_did_not_pass_is_a_failure(suites, tmp_path, capsys):
    suites(paths=lambda bench: bench.check(Check("stalls are seen", False, "p99 was 3 ms")))
    assert main(["bench", "run", "--suite", "paths", "--output", str(tmp_path)]) == 1
    assert "error: stalls are seen: p99 was 3 ms" in capsys.readouterr().err


def test_the_instrument_is_checked_in_every_run(checked):
    asked = []

    def agreeing(directory, *, rounds):
        asked.append(rounds)
        return [Check("agrees with wrk", True, "0.99")]

    status, found = checked(lambda directory: Check("a stall shows", True, "p95 50 ms"), agreeing)
    assert (status, asked) == (0, [2])
    assert [one.name for one in found.checks] == ["a stall shows", "agrees with wrk"]


def test_an_instrument_that_does_not_work_is_a_failure(checked, capsys):
    def broken(directory):
        raise LoadError("no C compiler")

    status, found = checked(broken, None)
    assert status == 1
    assert [(one.name, one.text) for one in found.checks] == [("instrument: ran to its end", "no C compiler")]


def test_packaged_generators_that_are_missing_are_said_to_be(checked, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None if name == "h2load" else name)
    status, found = checked(lambda directory: Check("a stall shows", True, "p95 50 ms"), None)
    assert status == 0
    assert found.conditions["self-check"] == "not against packaged generators: h2load not installed"


def test_peers_reach_the_suite(suites, tmp_path):
    seen = {}
    suites(paths=lambda bench: seen.update(bench.peers))
    words = ["--peer", f"ztunnel={sys.executable}", "--output", str(tmp_path)]
    assert main(["bench", "run", "--suite", "paths", *words]) == 0
    assert seen["ztunnel"].samefile(sys.executable)


@pytest.mark.parametrize(
    ("words", "status", "told"),
    [
        (["--suite", "nothing"], 2, "no suite is called nothing: known is paths, architectures"),
        (["--peer", f"envoy={sys.executable}"], 2, "no peer is called envoy: known is ztunnel"),
        (["--peer", f"linkerd={sys.executable}"], 2, "control plane over gRPC only, which is not emulated here"),
        (["--peer", "ztunnel=/no/such/program"], 2, "is not NAME=PATH with the path of a program"),
        (["--peer", "ztunnel"], 2, "is not NAME=PATH with the path of a program"),
        ([], 1, "never overwritten"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_is_measured(suites, tmp_path, capsys, words, status, told):
    suites(paths=lambda bench: pytest.fail("measured"), architectures=lambda bench: pytest.fail("measured"))
    (tmp_path / "results.json").write_text("{}")
    try:
        found = main(["bench", "run", "--output", str(tmp_path), *words])
    except SystemExit as ended:
        found = ended.code
    assert (found, told in capsys.readouterr().err) == (status, True)
    assert (tmp_path / "results.json").read_text() == "{}"


def test_measuring_needs_root(suites, monkeypatch, tmp_path, capsys):
    suites(paths=lambda bench: pytest.fail("measured"))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert main(["bench", "run", "--suite", "paths", "--output", str(tmp_path / "out")]) == 1
    assert "measuring needs root" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_other_commands_do_not_wait_for_the_benchmarks():
    code = "import sys, control.cli.__main__; print([name for name in sys.modules if name.startswith('benchmarks')])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert shown.stdout == "[]\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_ended_removes_what_its_suites_made_and_writes_what_it_found(suites, tmp_path, capsys, number):
    removed = []

    def ended(bench: Bench) -> None:
        try:
            measured(bench)
            bench.interleave([Probe(Measure("paths/late", "paths", "g", "l", "us"), end)], LIVES, rounds=3, seconds=0.0)
        finally:
            removed.append(bench.directory)

    def end(live: Standing, seconds: float, round_number: int) -> Sample:
        if round_number == 2:
            os.kill(os.getpid(), number)
            time.sleep(10)
        return Sample(1.0, 1)

    suites(paths=ended, architectures=lambda bench: pytest.fail("measured"))
    assert main(["bench", "run", "--output", str(tmp_path)]) == 130
    found = read(tmp_path / "results.json")
    assert found.conditions["interrupted"]
    ours = [one.median for one in found.ratios if (one.subject, one.key) == ("uproxy", "value")]
    assert ours == pytest.approx([0.6, 0.6])
    assert [len(one.rounds) for one in found.series] == [3] * 6 + [1] * 3
    assert (tmp_path / "report.html").exists()
    err = capsys.readouterr().err
    assert "error: interrupted: " in err
    assert "Traceback" not in err
    assert not removed[0].exists()
