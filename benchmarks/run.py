"""One run of the benchmarks: suites, then everything that was found, in files. `meshctl bench run` is the way to it."""

from __future__ import annotations

import csv
import fcntl
import os
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Final

from benchmarks import report
from benchmarks.harness import machine, predictions, selfcheck, statistics, targets
from benchmarks.harness.bench import Bench, BenchError, Suite
from benchmarks.harness.results import FILE, Check, Results
from benchmarks.harness.rounds import duration
from benchmarks.load import LoadError

SUITES: Final = {
    "paths": "benchmarks.suites.paths",
    "kernel": "benchmarks.suites.kernel",
    "architectures": "benchmarks.suites.architectures",
    "memory": "benchmarks.suites.memory",
    "waypoint": "benchmarks.suites.waypoint",
    "control": "benchmarks.suites.control",
    "soak": "benchmarks.suites.soak",
}
"""Name -> module, whose SUITE it is."""
LONG: Final = frozenset({"waypoint", "control", "soak"})
"""Suites that a quick run has no time for, unless they are named."""
PEERS: Final = ("ztunnel", "linkerd")
"""What no package brings: measured when a program is named."""
LOCK: Final = Path("/run/uproxy-bench.lock")
"""Held by whoever measures on this machine; its pid is in it."""
ROWS: Final = "results.csv"
_COLUMNS: Final = ("suite", "measure", "subject", "round", "value", "unit", "better", "bottleneck", "refused", "failed")
INTERRUPTED: Final = "interrupted"
"""The condition of a run that was."""


class BusyError(Exception):
    """Another run measures on this machine."""


@dataclass(frozen=True, slots=True)
class Run:
    """A run that is over."""

    results: Results
    failures: Sequence[str]
    """Subjects and suites that failed, checks that did not pass. What the harness refused to report is no failure."""
    files: Sequence[Path]
    interrupted: bool
    """It was ended before all was measured."""


def find(name: str) -> Suite:
    """The suite of that name. Raises KeyError."""
    suite: Suite = import_module(SUITES[name]).SUITE
    return suite


def run(
    suites: Sequence[Suite],
    directory: Path,
    *,
    quick: bool,
    peers: Mapping[str, Path],
    tell: Callable[[str], None],
) -> Run:
    """Check the instrument, run the suites one after the other, and write what they found to `directory`.

    A suite that fails ends there, with the reason; what it found stays, and the next one goes on. KeyboardInterrupt
    ends all of them, and what was found until then is written. Raises BusyError before anything is done, and OSError.
    """
    with _alone():
        return _run(suites, directory, quick=quick, peers=peers, tell=tell)


@contextmanager
def _alone() -> Iterator[None]:
    """Two runs at once would measure each other. The kernel frees the lock of whoever ends, however it ends."""
    with os.fdopen(os.open(LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644), "r+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BusyError(
                f"process {file.read().strip() or 'unknown'} runs benchmarks on this machine, and two runs would "
                "measure each other: wait until it is done, or end it with SIGINT"
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


def _run(
    suites: Sequence[Suite],
    directory: Path,
    *,
    quick: bool,
    peers: Mapping[str, Path],
    tell: Callable[[str], None],
) -> Run:
    directory.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    results = Results(datetime.now(UTC).isoformat(timespec="seconds"), quick=quick, machine=machine.describe())
    with tempfile.TemporaryDirectory(prefix="uproxy-bench-") as scratch:
        bench = Bench(results, Path(scratch), quick=quick, peers=peers, tell=tell)
        try:
            tell("the instrument itself")
            taken = {"instrument": _guarded("instrument", check_instrument, bench)}
            for number, suite in enumerate(suites, 1):
                tell(f"suite {suite.name}, {number} of {len(suites)}: {suite.title}")
                taken[suite.name] = _guarded(suite.name, suite.run, bench)
                bench.condition("time", ", ".join(f"{name} {duration(seconds)}" for name, seconds in taken.items()))
                results.write(directory / FILE)  # the rounds, if the machine goes down before the end
        except KeyboardInterrupt:
            bench.condition(INTERRUPTED, "the run was ended before all was measured")
    failures = [f"{one.name}: {one.text}" for one in results.checks if not one.passed] + bench.failures
    results.ratios, results.withheld = statistics.ratios(results, targets.BASELINES)
    results.targets = targets.judged(results)
    results.predictions = predictions.judged(results)
    results.seconds = round(time.monotonic() - began, 1)
    results.conditions |= _method()
    tell(f"measured in {duration(results.seconds)}")
    return Run(results, failures, write(results, directory), INTERRUPTED in results.conditions)


def check_instrument(bench: Bench) -> None:
    """Test the load generator against a server that stalls, and against packaged generators. Raises BenchError."""
    try:
        bench.check(selfcheck.stalls(bench.directory))
        missing = [name for name in ("nginx", "wrk", "h2load") if shutil.which(name) is None]
        if missing:
            bench.condition("self-check", f"not against packaged generators: {', '.join(missing)} not installed")
            return
        for check in selfcheck.against_packaged(bench.directory, rounds=2 if bench.quick else 5):
            bench.check(check)
    except LoadError as error:
        raise BenchError(str(error)) from error


def _guarded(name: str, step: Callable[[Bench], None], bench: Bench) -> float:
    """How many seconds it took. If it fails, or has a mistake, what the others find in an hour is not thrown away."""
    began = time.monotonic()
    try:
        step(bench)
    except BenchError as error:
        bench.check(Check(f"{name}: ran to its end", False, str(error)))
    except Exception as error:
        bench.progress(traceback.format_exc())
        bench.check(Check(f"{name}: ran to its end", False, f"{type(error).__name__}: {error}"))
    return time.monotonic() - began


def write(results: Results, directory: Path) -> list[Path]:
    """The run as JSON, a row of a table for each round, and the page for people. Raises OSError."""
    results.write(directory / FILE)
    write_rows(results, directory / ROWS)
    return [directory / FILE, directory / ROWS, report.write(results, directory)]


def write_rows(results: Results, path: Path) -> None:
    """CSV: every round of every series, refused ones too, with all details but histograms. Raises OSError.

    A series without a round has a row without a number: it says why.
    """
    measures = {one.name: one for one in results.measures}
    details = sorted({key for series in results.series for one in series.rounds for key in one.details})
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow([*_COLUMNS, *details])
        for series in results.series:
            measure = measures[series.measure]
            # Nobody has a number for what was never taken.
            taken: list[tuple[float | str, float | str, str, Mapping[str, float]]]
            taken = [(one.number, one.value, one.bottleneck, one.details) for one in series.rounds]
            for number, value, bottleneck, found in taken or [("", "", "", {})]:
                rows.writerow(
                    [
                        measure.suite,
                        measure.name,
                        series.subject,
                        number,
                        value,
                        measure.unit,
                        measure.better,
                        bottleneck,
                        series.refused,
                        "yes" if series.failed else "",
                        *(found.get(key, "") for key in details),
                    ]
                )


def _method() -> dict[str, str]:
    return {
        "order": "round by round, every subject once per round, another one first in each; a round before the first "
        "warms up and is not counted; every other round is reported",
        "intervals": "95 %, of the median of the round-by-round ratios: percentile bootstrap, stretched for few rounds",
        "refusals": "a series of which the load generator, not the subject, decided more than a third of the rounds; a "
        "ratio that its lateness alone could have moved out of the interval",
        "processor time": "of all the subject's processes in the counted part, per operation, by the kernel's clock of "
        "each process",
        "softirq time": "of all cores, of everybody, in steps of 10 ms",
        "memory": "PSS of all the subject's processes after each round, where a measure does not say otherwise",
    }
