"""What one tenant's misbehaviour costs another: the callers of one service are measured while those of the other load.

The neighbour floods (as fast as 64 connections go), floods against a limit that its service's owner has set, or calls
a service whose owner's filter burns processor time for each request, as Lua in an Envoy and in Python at our waypoint.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from benchmarks import load
from benchmarks.harness.bench import BenchError, Probe, Sample
from benchmarks.harness.results import Measure
from benchmarks.harness.usage import Meter
from benchmarks.load import Load, Outcome
from benchmarks.load.together import Started, run_together, start_together
from benchmarks.suites.placements.application import BUSY, BUSY_MS, LIMIT_PER_S, LIMITED, SERVICES
from benchmarks.suites.placements.placement import Caller, Placement

NEIGHBOUR, VICTIM = SERVICES
RATE: Final = 450
"""Requests a second of all callers that are measured: more than 1,000 of a round of SECONDS, so that ten are slower
than its p99."""
SECONDS: Final = 2.5
_CONNECTIONS: Final = 16
"""Of each of them: a request that finds none free waits, which counts."""
_FLOOD_CONNECTIONS: Final = 32
_BUSY_RATE, _BUSY_CONNECTIONS = 10, 4
"""Of the neighbour's callers together, so that its filter wants a fifth of a core; of each."""
_LONGER_S: Final = 0.4
"""What the neighbour begins earlier and ends later."""
_GRACE_S: Final = 45.0


@dataclass(frozen=True, slots=True)
class Situation:
    """What the neighbour does meanwhile."""

    name: str
    label: str
    path: str = ""
    flood: bool = True

    def load(self, callers: int, seed: int) -> Load:
        """Of one of so many callers of the neighbour's."""
        if self.flood:
            return load.http_closed(_FLOOD_CONNECTIONS, self.path, NEIGHBOUR.name)
        rate = _BUSY_RATE / callers
        return load.http_open(_BUSY_CONNECTIONS, self.path, NEIGHBOUR.name, rate, seed=seed)


SITUATIONS: Final = (
    Situation("calm", "alone"),
    Situation("flood", "beside a flood", "/"),
    Situation("limited", f"beside a flood that its service's owner limits to {LIMIT_PER_S} requests/s", LIMITED),
    Situation("filter", f"beside a filter that takes {BUSY_MS} ms a request, {_BUSY_RATE} a second", BUSY, flood=False),
)


def probes(suite: str, program: Path) -> list[Probe[Placement]]:
    """A measure for each situation."""
    return [
        Probe(
            Measure(
                f"{suite}/isolation/{one.name}",
                suite,
                "Isolation: another tenant's latency",
                f"p99, {one.label}",
                "us",
            ),
            partial(_take, program, one),
        )
        for one in SITUATIONS
    ]


def _take(program: Path, situation: Situation, placement: Placement, seconds: float, number: int) -> Sample:
    victims = {
        one.member.name: _victim(program, one, len(_of(placement, VICTIM.caller)), seconds, number)
        for one in _of(placement, VICTIM.caller)
    }
    with ExitStack() as stack, Meter({"application": placement.applications}) as meter:
        beside = _neighbours(stack, program, situation, placement, seconds, number)
        found = run_together(placement.subject.name, victims, seconds, all_answered=False)
        busy_ns = meter.used(found.counted).processor_ns["application"]
        neighbours = [_outcome(placement, one, seconds) for one in beside]
    if not any(one.histogram for one in found.outcomes):
        raise BenchError(f"{placement.subject.name}: none of {VICTIM.caller}'s requests was answered")
    sample = found.sample("p99_us", busy_ns)
    scheduled = sum(one.scheduled for one in found.outcomes)
    share = sample.details["load_core_share"] + sum(one.generator.cpu_share for one in neighbours)
    details = {
        **sample.details,
        "load_core_share": share,
        "failed_percent": 100 * sum(one.failed for one in found.outcomes) / scheduled,
        "neighbour_per_second": sum(one.operations / one.seconds for one in neighbours),
        "neighbour_refused": float(sum(one.failed for one in neighbours)),
    }
    # That every connection waits is what is asked for here, and no fault of the load's.
    bound = f"generators and applications used {share:.0%} of their core" if share >= load.BUSIEST else ""
    # Proxies serve the neighbour, too: their time is not divided by what the others asked for.
    return Sample(sample.value, 0, details, sample.histogram, bound, sample.counted)


def _of(placement: Placement, account: str) -> list[Caller]:
    """The callers of a service account that are far from what they call."""
    return [one for one in placement.callers if one.member.account == account and not one.member.near]


def _victim(program: Path, caller: Caller, callers: int, seconds: float, number: int) -> Started:
    seed = number * callers + caller.member.number
    asked = load.http_open(_CONNECTIONS, "/", VICTIM.name, RATE / callers, seed=seed)
    return partial(caller.start, load.argv(program, asked, *caller.entries[VICTIM.name], seconds, waits=True))


def _neighbours(
    stack: ExitStack, program: Path, situation: Situation, placement: Placement, seconds: float, number: int
) -> Sequence[subprocess.Popen[bytes]]:
    """Their generators, which begin when all of them have their connections: a flood would use up the limit that the
    others' first requests need.
    """
    if not situation.path:
        return []
    callers = _of(placement, NEIGHBOUR.caller)
    started = []
    for caller in callers:
        asked = situation.load(len(callers), number * len(callers) + caller.member.number)
        entry = caller.entries_for(situation.path)[NEIGHBOUR.name]
        argv = load.argv(program, asked, *entry, seconds * 1.1 + _LONGER_S, waits=True)
        started.append(caller.start(argv, first=False))
        stack.callback(started[-1].kill)
    start_together(placement.subject.name, started)
    return started


def _outcome(placement: Placement, process: subprocess.Popen[bytes], seconds: float) -> Outcome:
    try:
        told, failed = process.communicate(timeout=seconds + _GRACE_S)
    except subprocess.TimeoutExpired as error:
        raise BenchError(f"{placement.subject.name}: the neighbour did not end: {error}") from error
    if process.returncode:
        raise BenchError(f"{placement.subject.name}: the neighbour: {failed.decode().strip()}")
    return load.parse(told.decode())
