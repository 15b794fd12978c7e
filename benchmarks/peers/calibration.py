"""How this machine compares with those that others publish numbers of: an Envoy as a plain HTTP proxy.

Istio publishes what one of its proxies takes with two workers at 1,000 requests of 1 KB a second: 0.20 vCPU of a
sidecar, 0.25 of a waypoint, 0.06 of a ztunnel (istio.io, "Performance and Scalability", 1.24). Here an Envoy does the
least that any of them does with a request, on one worker, without TLS, filters, telemetry or an access log.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Final

from benchmarks import load
from benchmarks.harness.bench import Probe, Sample
from benchmarks.harness.results import Measure, Results, Round, Series, Subject
from benchmarks.lab.topology import Host
from benchmarks.peers import envoy
from benchmarks.peers.pairs import APP_PORT, Peer, Started
from benchmarks.peers.place import Place
from benchmarks.peers.standing import APART, Standing, stand_peer

NAME: Final = "paths/calibration"
CPU: Final = f"{NAME}/cpu"
RATE: Final = 1000
BODY: Final = 1024
PUBLISHED: Final = (
    "Istio publishes, for 1,000 requests of 1 KB a second, 0.20 vCPU of a sidecar, 0.25 of a waypoint and 0.06 of a "
    "ztunnel (1.24)"
)
SUBJECT: Final = Subject(
    "envoy-plain-http",
    "Envoy as a plain HTTP proxy",
    "One Envoy with one worker on a host between load generator and application: HTTP/1.1 in plaintext in and out, one "
    "route, no filter but the router, no access log.",
)
_PORT: Final = 8000


def starts(host: Host, caller: Host, program: Path) -> tuple[Subject, Callable[[], Standing]]:
    """How it is started, on the application's host; the generator is on the other one."""
    return SUBJECT, partial(stand_peer, Peer(SUBJECT, _start), caller, host, program)


def _start(client: Place, server: Place) -> Started:
    listen = (server.address, _PORT)
    written = server.directory / "envoy.json"
    written.write_text(json.dumps(envoy.http_config(listen, (server.address, APP_PORT + load.HTTP)), indent=1))
    return Started(listen, {"proxy": [server.start(envoy.argv(written), [listen]).pid]}, envoy.version())


def probe() -> Probe[Standing]:
    """Requests at the published rate, and of the published size."""
    measure = Measure(
        NAME, NAME, "Calibration", f"p99 at {RATE:,} requests/s of 1 KB", "us", parameters={"rate": RATE, "bytes": BODY}
    )
    asked = load.http_open(64, "/", "application", RATE, body=BODY)

    def take(live: Standing, seconds: float, number: int) -> Sample:
        found = live.run(asked.seeded(number), seconds, APART)
        return Sample(
            found.value,
            found.operations,
            found.details(),
            found.histogram,
            found.bottleneck,
            (found.start_ns, found.end_ns),
        )

    return Probe(measure, take)


def conclude(results: Results) -> None:
    """The processor time of these rounds as a measure of its own, beside what is published."""
    measure = Measure(CPU, NAME, "Calibration", f"processor time at {RATE:,} requests/s", "ms/1000 requests")
    taken = results.find(NAME, SUBJECT.name)
    rounds = [] if taken is None else taken.rounds
    found = [Round(one.number, one.details["cpu_us"]) for one in rounds]
    results.measures.append(measure)
    results.series.append(
        Series(CPU, SUBJECT.name, found, "" if found else taken.refused if taken else "not taken", failed=not found)
    )
    if found:
        # Microseconds a request are milliseconds a thousand, and thousandths of a core at 1,000 a second.
        cores = median(one.value for one in found) / 1000
        results.conditions["Calibration"] = (
            f"{PUBLISHED}; an Envoy that is a plain HTTP proxy takes {cores:.3f} of a core for as many of them here. "
            "What is published differs from what is found here by the machine, and by what a proxy does beside"
        )
