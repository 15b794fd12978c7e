"""What all callers of a placement ask for together, and how it is asked: at a fixed rate, from their own places."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks import load
from benchmarks.harness.bench import Sample
from benchmarks.harness.usage import Meter
from benchmarks.load.together import Started, run_together
from benchmarks.suites.placements.application import SERVICES, Service
from benchmarks.suites.placements.placement import Caller, Placement

CONNECTIONS = 4
"""Of each caller, and as many again where it has calls of both kinds."""


@dataclass(frozen=True, slots=True)
class Mix:
    """Requests a second, and what share of them (0 to 1) is of which kind."""

    rate: float
    l7: float = 1.0
    """Through the proxy that reads HTTP; the others need L4 only."""
    near: float = 0.0
    """By callers on the host of what they call."""


def service_of(caller: Caller) -> Service:
    """What it may call."""
    return next(one for one in SERVICES if one.caller == caller.member.account)


def generators(program: Path, placement: Placement, mix: Mix, seconds: float, number: int) -> dict[str, Started]:
    """The load generators of one round, by name: each caller's share of the rate, with arrivals of this round's own."""
    found: dict[str, Started] = {}
    for near, share in ((False, 1 - mix.near), (True, mix.near)):
        callers = [one for one in placement.callers if one.member.near is near]
        for caller in callers:
            service = service_of(caller)
            for kind, entries, part in (("l7", caller.entries, mix.l7), ("l4", caller.l4_entries, 1 - mix.l7)):
                rate = mix.rate * share * part / len(callers)
                if rate > 0:
                    # The same schedule for every placement, and another for each generator and round.
                    seed = number * 2 * len(placement.callers) + 2 * placement.callers.index(caller) + (kind == "l4")
                    asked = load.http_open(CONNECTIONS, "/", service.name, rate, seed=seed)
                    argv = load.argv(program, asked, *entries[service.name], seconds, waits=True)
                    found[f"{caller.member.name} ({kind})"] = partial(caller.start, argv)
    return found


def take(program: Path, placement: Placement, mix: Mix, seconds: float, number: int) -> Sample:
    """All callers at once. Raises BenchError."""
    with Meter({"application": placement.applications}) as meter:
        found = run_together(placement.subject.name, generators(program, placement, mix, seconds, number), seconds)
        busy_ns = meter.used(found.counted).processor_ns["application"]
    return found.sample("p99_us", busy_ns)
