"""A whole run with suites that are made up: what is written, what is told, and the exit status."""

import contextlib
import csv
import os
import re
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
from benchmarks.harness.bench import Bench, BenchError, EndedError, Probe, Sample
from benchmarks.harness.results import Check, Measure, Subject, read
from benchmarks.load import LoadError
from benchmarks.peers import pairs
from control.cli.__main__ import main
from tests.support import dead_labs, inside


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
def suites(monkeypatch, tmp_path_factory):
    """Put suites in the place of the real ones: name -> what runs."""

    def put(**runs: Callable[[Bench], None]) -> None:
        for name, taken in runs.items():
            module = ModuleType(f"benchmarks.suites.{name}")
            module.SUITE = Suite(taken)
            module.SUITE.name = name
            monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(run, "SUITES", {name: f"benchmarks.suites.{name}" for name in runs})

    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(run, "check_instrument", lambda bench: None)
    # Whoever measures on this machine meanwhile is not in the way.
    monkeypatch.setattr(run, "LOCK", tmp_path_factory.mktemp("lock") / "lock")
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
    assert re.fullmatch(r"instrument \d+ s, paths \d+ s", found.conditions["time"])
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

    def later(bench: Bench) -> None:
        assert len(read(tmp_path / "results.json").series) == 6  # already there, whatever happens to this one
        bench.condition("came", "too")

    suites(paths=broken, architectures=later)
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


def test_who_did_not_start_or_has_ended_is_in_everything_that_is_written(suites, tmp_path, capsys):
    log = "--- log\nno <configuration> at /etc"

    def ending(live: Standing, seconds: float, number: int) -> Sample:
        if (live.subject.name, number) == ("uproxy", 2):
            raise EndedError(f"the server proxy, process 7, has ended\n{log}")
        return Sample(1.0, 1)

    def measure(bench: Bench) -> None:
        absent = bench.lose(Subject("ztunnel", "ztunnel", "made up"), f"ztunnel does not listen\n{log}")
        both = [Measure(f"paths/{name}", "paths", "Round trip", name, "us") for name in ("first", "second")]
        bench.interleave([Probe(one, ending) for one in both], [*LIVES, absent], rounds=3, seconds=0.0)

    suites(paths=measure)
    assert main(["bench", "run", "--suite", "paths", "--output", str(tmp_path)]) == 1
    found = read(tmp_path / "results.json")
    rounds = {(one.measure, one.subject): (len(one.rounds), one.failed) for one in found.series}
    assert rounds == {
        ("paths/first", "tcp"): (3, False),
        ("paths/first", "uproxy"): (1, True),
        ("paths/first", "envoy-hbone"): (3, False),
        ("paths/first", "ztunnel"): (0, True),
        ("paths/second", "tcp"): (3, False),
        ("paths/second", "uproxy"): (0, True),
        ("paths/second", "envoy-hbone"): (3, False),
        ("paths/second", "ztunnel"): (0, True),
    }
    assert not [one for one in found.ratios if one.subject in ("uproxy", "ztunnel")]
    assert [one.name for one in found.subjects] == ["tcp", "uproxy", "envoy-hbone", "ztunnel"]

    rows = list(csv.DictReader((tmp_path / "results.csv").read_text().splitlines(keepends=True)))
    failed = [row for row in rows if row["failed"] == "yes"]
    assert [(row["measure"], row["subject"], row["round"], row["value"]) for row in failed] == [
        ("paths/first", "uproxy", "1", "1.0"),
        ("paths/first", "ztunnel", "", ""),
        ("paths/second", "uproxy", "", ""),
        ("paths/second", "ztunnel", "", ""),
    ]
    assert all(log in row["refused"] for row in failed)

    page = (tmp_path / "report.html").read_text()
    assert "<b>ztunnel failed</b> at 2 measures, first at Round trip, first: ztunnel does not listen" in page
    assert page.count("--- log\nno &lt;configuration&gt; at /etc") == 2
    assert page.count("failed: the server proxy, process 7, has ended") == 2

    out, err = capsys.readouterr()
    assert (
        "FAILED: ztunnel at 2 measures, first at Round trip, first: ztunnel does not listen\n  --- log\n  no <" in out
    )
    (line,) = (line for line in out.splitlines() if line.startswith("Round trip, second"))
    assert line.split().count("failed") == 2
    # Once each, however much is measured without them.
    assert [line for line in err.splitlines() if line.startswith("error: ")] == [
        "error: ztunnel failed: ztunnel does not listen",
        "error: uproxy failed: the server proxy, process 7, has ended",
    ]


def test_two_runs_at_once_are_refused_until_the_first_has_ended(suites, tmp_path, capsys):
    suites(paths=measured)
    code = f"""if True:
        import pathlib, time
        from benchmarks import run
        run.LOCK = pathlib.Path({str(run.LOCK)!r})
        with run._alone():
            print("holds it", flush=True)
            time.sleep(60)"""
    words = ["bench", "run", "--suite", "paths", "--output", str(tmp_path / "out")]
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        other.stdout.readline()
        try:
            assert main(words) == 1
            err = capsys.readouterr().err
            assert f"error: process {other.pid} runs benchmarks on this machine" in err
            assert not (tmp_path / "out").exists()
        finally:
            other.kill()
    assert main(words) == 0


def test_a_quick_run_leaves_out_what_takes_long_unless_it_is_named(suites, tmp_path, capsys):
    ran = []
    suites(paths=lambda bench: ran.append("paths"), waypoint=lambda bench: ran.append("waypoint"))
    for words in (["--quick"], [], ["--quick", "--suite", "waypoint"]):
        ran.append(words)
        assert main(["bench", "run", *words, "--output", str(tmp_path / str(len(ran)))]) == 0
    assert ran == [
        ["--quick"], "paths", [], "paths", "waypoint", ["--quick", "--suite", "waypoint"], "waypoint",
    ]  # fmt: skip


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
    words = [word for name in run.PEERS for word in ("--peer", f"{name}={sys.executable}")]
    assert main(["bench", "run", "--suite", "paths", *words, "--output", str(tmp_path)]) == 0
    assert seen.keys() == set(run.PEERS) == pairs.NAMED.keys()
    assert all(path.samefile(sys.executable) for path in seen.values())


@pytest.mark.parametrize(
    ("words", "status", "told"),
    [
        (["--suite", "nothing"], 2, "no suite is called nothing: known is paths, architectures"),
        (["--peer", f"envoy={sys.executable}"], 2, "no peer is called envoy: known is ztunnel, linkerd"),
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


@pytest.fixture
def still_heard():
    """A run that was ended leaves its process deaf to being ended: not this one."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("still_heard")
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


@pytest.mark.soak  # a load that is cut off by the same signal may be counted as failed first
@pytest.mark.root
@pytest.mark.mesh
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_told_again_and_again_to_end_leaves_nothing_and_no_traceback(tmp_path, number):
    code = f"""if True:
        import pathlib, sys
        from benchmarks import run
        run.LOCK = pathlib.Path({str(tmp_path / "lock")!r})
        run.check_instrument = lambda bench: None
        from control.cli.__main__ import main
        sys.exit(main(["bench", "run", "--quick", "--suite", "paths", "--output", {str(tmp_path / "out")!r}]))"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as running:
        assert running.stderr is not None
        told = []
        try:
            for line in running.stderr:
                told.append(line)
                # As a terminal does: everybody that it started, and again while it removes what it made.
                if "round 1 of 5, haproxy-tls" in line or "ending: " in line:
                    os.killpg(running.pid, number)
                if "ending: " in line:
                    for _ in range(20):
                        time.sleep(0.02)
                        with contextlib.suppress(ProcessLookupError):
                            os.killpg(running.pid, number)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(running.pid, signal.SIGKILL)
        status = running.wait(30)
    assert status == 130, told
    assert not [line for line in told if "Traceback" in line or "Exception" in line]
    found = read(tmp_path / "out" / "results.json")
    assert found.conditions["interrupted"]
    # The second of the first round: the order turns from round to round.
    assert found.find(found.measures[0].name, "uproxy").rounds
    assert (tmp_path / "out" / "report.html").exists()
    inside.eventually(lambda: not [name for name in dead_labs.left() if "uproxy-client" in name])
