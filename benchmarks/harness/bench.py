"""Takes rounds: subjects that all stand at once, measured in turn, with everybody's processor time beside each.

A suite builds its subjects in the lab, describes its measures as probes, and calls `Bench.interleave`. How the rounds
are ordered, warmed up, accounted and judged is decided here, once, for all suites.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from benchmarks.harness.results import Check, Measure, Results, Round, Series, Subject
from benchmarks.harness.rounds import WARM_UP_S, Estimate, duration, in_turn, judge
from benchmarks.harness.usage import ASIDE, GoneError, Meter, pss_mb


class BenchError(Exception):
    """A run that cannot go on: a subject that failed under load, a program that is missing."""


class EndedError(BenchError):
    """A subject that will not take load again: one of its processes has ended."""


@dataclass(frozen=True, slots=True)
class Sample:
    """What the load generator found in one round. `details` and `histogram` as in `results.Round`.

    Of `details`, "cpu_us", "softirq_us" and "pss_mb" (the processors' time per operation, and memory when the round is
    over) are added, the first and the last where the subject has processes of its own; a probe that knows them better,
    as memory under load, gives its own.
    """

    value: float
    operations: float
    """What processor time is divided by: requests, connections, or MiB. 0: nothing to divide by, so none is shown."""
    details: Mapping[str, float] = field(default_factory=dict)
    histogram: Mapping[int, int] = field(default_factory=dict)
    bottleneck: str = ""
    """Why the load generator, not the subject, decided this round; empty when it did not."""
    counted: tuple[int, int] | None = None
    """When the operations were counted: begin and end, CLOCK_MONOTONIC in ns. None: all the time that the take took."""


class Live(Protocol):
    """A subject that stands and takes load."""

    @property
    def subject(self) -> Subject: ...

    def processes(self) -> Mapping[str, Sequence[int]]:
        """Role ("client proxy") -> process ids: whose processor time and memory are the subject's, children included.

        The roles "application" and "generator" are shown beside, and are not counted to the subject. Raises EndedError.
        """
        ...


@dataclass(frozen=True, slots=True)
class Absent:
    """A subject that could not be started: shown with the reason, which `Bench.lose` was told, and never measured."""

    subject: Subject


L = TypeVar("L", bound=Live)


@dataclass(frozen=True, slots=True)
class Probe(Generic[L]):
    """A measure, and how to take it once.

    `take` is given the subject, seconds, and the number of the round, by which all subjects of a round get the same
    arrivals and each round others. Raises BenchError.
    """

    measure: Measure
    take: Callable[[L, float, int], Sample]


class Suite(Protocol):
    """One set of questions. `name` is what `--suite` takes."""

    name: str
    title: str

    def run(self, bench: Bench) -> None:
        """Raises BenchError when nothing of the suite can be measured."""
        ...


class Bench:
    """One run: what suites are given."""

    def __init__(
        self,
        results: Results,
        directory: Path,
        *,
        quick: bool,
        peers: Mapping[str, Path] | None = None,
        tell: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.results = results
        self.directory = directory
        """Of the run's own: configuration, logs, compiled programs. Gone afterwards."""
        self.quick = quick
        self.peers = dict(peers or {})
        """Name -> program, for what no package brings: "ztunnel"."""
        self.failures: list[str] = []
        """Which subject failed at which measure, and why."""
        self._lost: dict[str, str] = {}
        self._tell = tell

    def progress(self, text: str) -> None:
        """One line for whoever waits."""
        self._tell(text)

    def check(self, check: Check) -> None:
        """A test of the instrument. One that failed makes the run fail, and is shown with the results."""
        self.results.checks.append(check)
        self.progress(f"{'ok' if check.passed else 'FAILED'}: {check.name}: {check.text}")

    def condition(self, name: str, text: str) -> None:
        """How something was measured, for the report: "pinning", "round trip of the link"."""
        self.results.conditions[name] = text

    def machine(self, name: str, text: str) -> None:
        """What it was measured on or with: "wrk" -> its version."""
        self.results.machine[name] = text

    def lose(self, subject: Subject, reason: str) -> Absent:
        """A subject did not start, or has ended: it has failed at all that is measured from now on."""
        self._lost[subject.name] = reason
        self._fail(f"{subject.name} failed: {reason}")
        return Absent(subject)

    def _fail(self, text: str) -> None:
        self.failures.append(text)
        self.progress(text)

    def interleave(
        self, probes: Sequence[Probe[L]], everybody: Sequence[L | Absent], *, rounds: int, seconds: float
    ) -> None:
        """Take all probes on all subjects. One that fails is out of that measure, with the reason; the others go on.

        Each measure begins with a round for each subject that is shorter, and not counted.
        """
        for one in everybody:
            if one.subject not in self.results.subjects:
                self.results.subjects.append(one.subject)
        lives = [one for one in everybody if not isinstance(one, Absent)]
        warm_up = min(seconds, WARM_UP_S)
        estimate = Estimate(len(probes) * len(lives) * (warm_up + rounds * seconds))
        for probe in probes:
            self.results.measures.append(probe.measure)
            found = {one.subject.name: Series(probe.measure.name, one.subject.name) for one in everybody}
            self.results.series += found.values()
            standing = found.keys() - self._lost.keys()
            for name in found.keys() - standing:
                found[name].refused, found[name].failed = self._lost[name], True
            try:
                for number in range(rounds + 1):
                    length = seconds if number else warm_up
                    for live in in_turn(lives, number):
                        name = live.subject.name
                        if name in standing:
                            what = f"round {number} of {rounds}" if number else "warm-up"
                            left = duration(estimate.left_s())
                            self.progress(f"{probe.measure.name}: {what}, {name}; about {left} left of this part")
                            try:
                                taken = self._take(probe, live, number, length)
                            except BenchError as error:
                                found[name].refused, found[name].failed = str(error), True
                                standing.remove(name)
                                if isinstance(error, EndedError):
                                    self.lose(live.subject, str(error))
                                else:
                                    self._fail(f"{probe.measure.name}: {name} failed: {error}")
                            else:
                                found[name].rounds += [taken] if number else []
                        estimate.taken(length)
            finally:
                for one in everybody:
                    judge(found[one.subject.name], reference=one.subject.reference)

    def _take(self, probe: Probe[L], live: L, number: int, seconds: float) -> Round:
        try:
            processes = live.processes()
            has_own = not processes.keys() <= set(ASIDE)
            began = time.monotonic_ns()
            with Meter(processes) as meter:
                sample = probe.take(live, seconds, number)
                used = meter.used(sample.counted)
            details = {"taken_s": (time.monotonic_ns() - began) / 1e9}
            if sample.operations > 0:
                each = {role: ns / 1000 / sample.operations for role, ns in used.processor_ns.items()}
                details["operations"] = sample.operations
                if has_own:
                    details["cpu_us"] = sum(us for role, us in each.items() if role not in ASIDE)
                details |= {f"cpu_us/{role}": us for role, us in each.items()}
                details["softirq_us"] = used.softirq_ns / 1000 / sample.operations
            memory = {role: pss_mb(pids) for role, pids in processes.items()}
            if has_own:
                details["pss_mb"] = sum(mb for role, mb in memory.items() if role not in ASIDE)
            details |= {f"pss_mb/{role}": mb for role, mb in memory.items()}
        except GoneError as error:
            live.processes()  # whoever knows more of its end says so
            raise BenchError(f"{live.subject.name}: {error}") from error
        return Round(number, sample.value, details | dict(sample.details), sample.histogram, sample.bottleneck)
