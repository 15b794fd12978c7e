"""Starts the waypoints between the same callers and the same called workload, all at once."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Final

from benchmarks.harness.bench import EndedError
from benchmarks.harness.results import Subject
from benchmarks.lab import cores
from benchmarks.lab.apps import commands
from benchmarks.lab.remains import Owner
from benchmarks.lab.sources import TRUST_DOMAIN
from benchmarks.lab.topology import Host, Lab, Workload, tail
from benchmarks.load import Protocol
from benchmarks.peers import envoy
from benchmarks.peers.place import Place
from benchmarks.peers.standing import application
from benchmarks.suites.between import mesh
from control.api.address import HBONE_PORT
from control.api.identity import SpiffeId

PROXY_CORE, LOAD_CORE = cores.FIRST, cores.LAST

OURS: Final = Subject(
    "built-in",
    "our waypoint",
    "`waypoint run`, one process: HBONE in and out, HTTP in between, with metrics, request ids and the caller's name "
    "for the application. No access log.",
    f"uProxy {version('uproxy-mesh')}",
)
GUIDED: Final = Subject(
    "envoy-as-guided",
    "Envoy as its guide says",
    "An Envoy with one worker, of the shape of Istio's waypoint, set up as Envoy's guide to benchmarking says: no "
    "limits of connections, no request ids, no dynamic statistics. It tells the application nothing of the caller. No "
    "access log.",
)
SHIPPED: Final = Subject(
    "envoy-as-shipped",
    "Envoy as Istio ships it",
    "The same with what Istio configures at every waypoint and Envoy has: filters for CORS, faults and gRPC "
    "statistics, request ids, retries. Without Istio's own filters (the peer's metadata, Istio's metrics). No access "
    "log.",
)
_ADDRESSES: Final = {OURS.name: "10.96.3.200", GUIDED.name: "10.96.3.201", SHIPPED.name: "10.96.3.202"}


@dataclass(frozen=True, slots=True)
class Between:
    """A waypoint that stands, with callers before it and the called workload behind it."""

    subject: Subject
    callers: Sequence[Workload]
    waypoint: int
    """Its process id."""
    around: Mapping[str, Sequence[int]]
    """Role -> process ids: the uProxies at both ends."""
    application: Sequence[int]
    place: int
    log: Path

    def processes(self) -> Mapping[str, Sequence[int]]:
        everybody = {"waypoint": [self.waypoint], **self.around, "application": self.application}
        for role, pids in everybody.items():
            for pid in pids:
                try:
                    Owner.of(pid)
                except ProcessLookupError as error:
                    raise EndedError(f"the {role}, process {pid}, has ended\n{tail(self.log)}".strip()) from error
        return everybody

    def entry(self, protocol: Protocol, routes: int) -> tuple[str, int]:
        """What a caller dials for a service with so many routes."""
        return mesh.address(self.place, routes), mesh.PORTS[protocol]

    def start(self, caller: Workload, argv: Sequence[str]) -> subprocess.Popen[bytes]:
        """A load generator as a caller's application, with pipes for its input and output.

        It shares its core with others of its kind and the application: it goes first, so that it sends in time.
        """
        lab = caller.host.lab
        return lab.spawn(
            ["taskset", "-c", str(LOAD_CORE), "chrt", "--fifo", "1", *argv],
            caller.box.netns_path,
            str(caller.box.app_cgroup.relative_to(lab.names.cgroup)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )


def stand(lab: Lab, count: int, program: Path, progress: Callable[[str], None]) -> list[Between]:
    """Start everything in a new lab, with so many callers, and return when all of it is ready. Raises LabError."""
    a, b, c = lab.host("a"), lab.host("b"), lab.host("c")
    callers = [a.workload(f"caller-{number}", commands.idle()) for number in range(count)]
    server = b.workload("called", application(program))
    lab.configure(mesh.resources(server.name, list(_ADDRESSES.items())))
    lab.start(progress)
    around = {
        "client proxies": [one.proxy_pid() for one in callers],
        "server proxy": [server.proxy_pid()],
    }
    serving = [int(pid) for pid in (server.box.app_cgroup / "cgroup.procs").read_text().split()]
    made = []
    for place, (subject, start) in enumerate(((OURS, _start_ours), (GUIDED, _start_envoy), (SHIPPED, _start_envoy))):
        where = _place(c, subject.name)
        pid = start(where, server, subject)
        if subject is not OURS:
            subject = replace(subject, version=envoy.version())
        made.append(Between(subject, callers, pid, around, serving, place, where.log))
    proxies = [one.waypoint for one in made] + [pid for pids in around.values() for pid in pids]
    cores.pin(proxies, PROXY_CORE)
    cores.pin(serving, LOAD_CORE)
    progress(f"standing: {', '.join(one.subject.name for one in made)}")
    return made


def _start_ours(place: Place, server: Workload, subject: Subject) -> int:
    del server  # of which the configuration tells
    routes = place.directory / "routes.yaml"
    routes.write_text(mesh.routes_of(subject.name))
    argv = [
        *(sys.executable, "-I", "-m", "waypoint", "run", "--workload", f"default/{subject.name}-1"),
        *("--trust-domain", TRUST_DOMAIN, "--config", str(place.lab.directory / "mesh.yaml"), "--config", str(routes)),
        *("--identity-dir", str(place.identity_dir), "--access-log", "off"),
    ]
    return place.start(argv, [(place.address, HBONE_PORT)]).pid


def _start_envoy(place: Place, server: Workload, subject: Subject) -> int:
    config = envoy.waypoint_config(
        place.identity_dir,
        TRUST_DOMAIN,
        (place.address, HBONE_PORT),
        (server.address, HBONE_PORT),
        f"{server.address}:{mesh.HTTP_PORT}",
        routes=mesh.hosts(),
        denied=mesh.DENIED,
        shipped=subject is SHIPPED,
    )
    written = place.directory / "envoy.json"
    written.write_text(json.dumps(config, indent=1))
    return place.start(envoy.argv(written), [(place.address, HBONE_PORT)]).pid


def _place(host: Host, gateway: str) -> Place:
    identity = SpiffeId.parse(f"spiffe://{TRUST_DOMAIN}/ns/default/sa/{gateway}")
    directory = host.lab.directory / "identities" / gateway
    host.lab.issue(identity, directory)
    return Place(host.lab, host.place(gateway, _ADDRESSES[gateway]), identity, directory)
