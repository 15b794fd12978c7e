"""What configuration takes of each placement's processes as the services of a mesh grow.

One process of each kind is looked at as it runs: by how much its memory is larger with so many services than without
any. Envoys have it from a file, with what Istio's Sidecar resource leaves a sidecar; a uProxy, a node agent and our
waypoint from a control plane. All placements are added up from these for the same two hosts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Final

from benchmarks.harness.bench import Bench
from benchmarks.harness.results import Measure, Round, Series
from benchmarks.lab import cores
from benchmarks.lab.apps import commands
from benchmarks.lab.sources import LabError
from benchmarks.lab.topology import Lab, Workload, tail
from benchmarks.lab.waypoints import Waypoint, config_dump
from benchmarks.peers import envoy
from benchmarks.suites.placements import envoys
from benchmarks.suites.placements.application import CALLERS, SERVICE_PORT, Member, Service, identity
from benchmarks.suites.placements.envoys import INBOUND_PORT, Endpoint
from benchmarks.suites.placements.memory import maps_mb, resident_mb
from benchmarks.suites.placements.placement import ask_socket, until
from benchmarks.suites.placements.standing import map_pins

SIZES: Final = (10, 100, 1000)
ENDPOINTS: Final = 2
"""Of each service."""
CALLED: Final = 10
"""Services that each workload calls."""
HOSTS, WORKLOADS, ACCOUNTS = 2, 10, 5
"""Hosts; workloads of each, and their service accounts. All workloads of an account call the same services."""
_APPLIED_S: Final = 120.0
_CALLER: Final = sorted(CALLERS)[0]
_GATEWAY: Final = "wp"
_MAPS: Final = "kernel maps"
_EMPTY_STARTS: Final = 3
"""Of an Envoy without services, whose memory differs from start to start."""


@dataclass(frozen=True, slots=True)
class Holder:
    """Processes that are alike: how many there are of them, and what each holds."""

    kind: str
    count: int
    services: int
    """Of which it knows; 0: of all."""

    def of(self, services: int) -> int:
        return min(self.services or services, services)


_UPROXIES: Final = (Holder("uproxy", HOSTS * WORKLOADS, 0), Holder("node agent", HOSTS, 0), Holder(_MAPS, HOSTS, 0))
"""A uProxy is told of services that it dials, and of each other's name and version. Each host has its maps."""
PLACEMENTS: Final[Mapping[str, Sequence[Holder]]] = {
    "sidecar": (Holder("envoy", HOSTS * WORKLOADS, CALLED),),
    "node": (Holder("envoy", HOSTS, ACCOUNTS * CALLED),),
    "service-account": (Holder("envoy", HOSTS * ACCOUNTS, CALLED),),
    "remote": (*_UPROXIES, Holder("envoy waypoint", 1, 0)),
    "remote-l4": _UPROXIES,
    "ours": (*_UPROXIES, Holder("waypoint", 1, 0)),
    "ours-node": (*_UPROXIES, Holder("waypoint", HOSTS, 0)),
    "ours-service-account": (*_UPROXIES, Holder("waypoint", HOSTS * ACCOUNTS, 0)),
}

Held = Mapping[tuple[str, int], float]
"""(Kind, services) -> KB of one process, or of the maps of one host."""


def measure(bench: Bench, suite: str, sizes: Sequence[int] = SIZES) -> None:
    """One round: what a process holds hardly differs from one start to the next. Raises LabError."""
    with Lab(control=True) as lab:
        ours = _ours(lab, bench.progress, sizes)
        held, spread_kb = _envoys(lab, bench.progress, sizes)
    bench.condition(
        f"{suite}: starts",
        f"what an Envoy takes without services is the median of {_EMPTY_STARTS} starts, which were up to "
        f"{spread_kb:.0f} KB apart: configuration below that cannot be told from nothing",
    )
    add(bench, suite, {**ours, **held}, sizes)


def add(bench: Bench, suite: str, held: Held, sizes: Sequence[int]) -> None:
    """A measure for each size, of the placements that this run has."""
    known = {one.name for one in bench.results.subjects}
    for services in sizes:
        made = Measure(
            f"{suite}/config/{services}",
            suite,
            "Configuration held by all processes",
            f"{services:,} services",
            "KB",
            parameters={"services": services},
        )
        bench.results.measures.append(made)
        for subject, holders in PLACEMENTS.items():
            if subject in known:
                each = {one: held[one.kind, one.of(services)] for one in holders}
                details = {f"{one.kind.replace(' ', '_')}_kb": kb for one, kb in each.items()}
                processes = [one for one in holders if one.kind != _MAPS]
                details |= {
                    "most_kb": max(each[one] for one in processes),
                    "processes": float(sum(one.count for one in processes)),
                }
                total = sum(one.count * kb for one, kb in each.items())
                bench.results.series.append(Series(made.name, subject, [Round(1, total, details)]))


# -- uProxies, node agents and our waypoint, which a control plane tells


def _ours(lab: Lab, progress: Callable[[str], None], sizes: Sequence[int]) -> dict[tuple[str, int], float]:
    a = lab.host("a")
    caller = a.workload(_CALLER, commands.idle())
    assert lab.control is not None
    waypoint = Waypoint(lab.control, a, _GATEWAY)
    lab.start(progress)
    waypoint.apply()
    waypoint.start()
    assert a.agent is not None
    pids = {"uproxy": caller.proxy_pid(), "node agent": a.agent.pid, "waypoint": waypoint.pid}

    def look() -> dict[str, float]:
        return {kind: resident_mb([pid]) for kind, pid in pids.items()} | {_MAPS: maps_mb(map_pins(a))}

    before = look()
    found: dict[tuple[str, int], float] = {}
    known = 0
    for services in sizes:
        for begin in range(known, services, 100):
            lab.control.apply("".join(map(_resources, range(begin, min(begin + 100, services)))))
        known = services
        lab.wait([partial(_knows, waypoint, services), partial(_dials, caller, services - 1)], _APPLIED_S, "services")
        called = min(services, CALLED)
        for number in range(called):
            _dials(caller, number)
        lab.wait([partial(_has_heard, caller, called)], _APPLIED_S, "what is dialled")
        held = {kind: (mb - before[kind]) * 1000 for kind, mb in look().items()}
        progress(f"{services} services: " + ", ".join(f"{kind} {kb:.0f} KB" for kind, kb in held.items()))
        found |= {(kind, services): kb for kind, kb in held.items()}
    return found


def _knows(waypoint: Waypoint, count: int) -> bool:
    """Whether it has the configuration of so many services."""
    told = waypoint.dump()
    return len(told["services"]) == count and bool(told["whole"])


def _has_heard(caller: Workload, called: int) -> bool:
    """Whether a uProxy has been told of what it dialled."""
    told = config_dump(caller.box.netns_path)
    return bool(told["whole"]) and told["service_count"] >= called


def _dials(caller: Workload, number: int) -> bool:
    """Whether a service is captured: then the connection succeeds at once, though nobody is behind it."""
    (made,) = caller.sockets()
    with made, suppress(OSError):
        made.settimeout(1.0)
        made.connect((_address(number), SERVICE_PORT))
        return True
    return False


def _address(number: int) -> str:
    return f"240.240.{16 + (number >> 8)}.{number & 255}"


def _endpoint(number: int, instance: int) -> str:
    return f"10.{128 + instance}.{number >> 8}.{number & 255}"


def _resources(number: int) -> str:
    entries = "".join(
        f"""\
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {{name: s{number}-{instance}, namespace: default, labels: {{app: s{number}}}}}
spec: {{address: {_endpoint(number, instance)}, serviceAccount: s}}
---
"""
        for instance in range(ENDPOINTS)
    )
    return f"""\
{entries}apiVersion: v1
kind: Service
metadata: {{name: s{number}, namespace: default, labels: {{istio.io/use-waypoint: {_GATEWAY}}}}}
spec:
  clusterIP: {_address(number)}
  selector: {{app: s{number}}}
  ports: [{{name: http, port: {SERVICE_PORT}, targetPort: 8080}}]
---
"""


# -- Envoys, each started for its size


def _envoys(
    lab: Lab, progress: Callable[[str], None], sizes: Sequence[int]
) -> tuple[dict[tuple[str, int], float], float]:
    """And by how many KB starts without services differ at the most."""
    key = lab.directory / "keys"
    lab.issue(identity(_CALLER), key)
    beside = [one for holders in PLACEMENTS.values() for one in holders if one.kind == "envoy"]
    scoped = {one.of(size) for one in beside for size in sizes}
    found: dict[tuple[str, int], float] = {}
    spread_kb = 0.0
    for kind, counts in (("envoy", sorted(scoped)), ("envoy waypoint", list(sizes))):
        empty = [_resident_kb(lab, kind, 0, key) for _ in range(_EMPTY_STARTS)]
        spread_kb = max(spread_kb, max(empty) - min(empty))
        for services in counts:
            found[kind, services] = _resident_kb(lab, kind, services, key) - median(empty)
            progress(f"{services} services: {kind} {found[kind, services]:.0f} KB")
    return found, spread_kb


def _resident_kb(lab: Lab, kind: str, count: int, key: Path) -> float:
    """Of an Envoy that is ready."""
    services = [Service(f"s{number}", _CALLER, _address(number), "") for number in range(count)]
    endpoints = {
        one.name: [
            Endpoint(Member("s", instance, _endpoint(number, instance)), _endpoint(number, instance), INBOUND_PORT)
            for instance in range(ENDPOINTS)
        ]
        for number, one in enumerate(services)
    }
    admin = lab.directory / f"{kind.replace(' ', '-')}-{count}.sock"
    if kind == "envoy":
        config = envoys.calling(services, endpoints, key, admin)
    else:
        config = envoys.gateway(services, endpoints, admin)
    admin.unlink(missing_ok=True)  # of an earlier start
    written, log = admin.with_suffix(".json"), admin.with_suffix(".log")
    written.write_text(json.dumps(config))
    with log.open("wb") as output:
        process = lab.hosts[0].spawn(envoy.argv(written), stdout=output, stderr=output)
    try:
        cores.pin([process.pid], cores.FIRST)

        def ready() -> bool:
            if process.poll() is not None:
                raise LabError(f"an Envoy of {count} services ended with {process.returncode}:\n{tail(log)}")
            return ask_socket(admin, "GET", "/ready").startswith("LIVE")

        until(ready, f"an Envoy of {count} services")
        held = resident_mb([process.pid]) * 1000
        _check(admin, endpoints)  # afterwards, since the answer takes memory
        return held
    finally:
        process.kill()
        process.wait()


def _check(admin: Path, endpoints: Mapping[str, Sequence[Endpoint]]) -> None:
    """Raises LabError unless the Envoy knows all of these."""
    lines = [line.split("::") for line in ask_socket(admin, "GET", "/clusters").splitlines()]
    known = {parts[1].rpartition("/")[2] for parts in lines if len(parts) > 1}  # of envoy://LISTENER/ADDRESS:PORT, too
    wanted = {f"{one.address}:{one.port}" for each in endpoints.values() for one in each}
    if missing := sorted(wanted - known):
        raise LabError(f"an Envoy that was to know {len(wanted)} endpoints does not know {', '.join(missing[:3])}")
