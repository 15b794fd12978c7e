"""Minutes of everything at once through uProxies and a waypoint: what they hold must not grow.

Connections that are reset, half closed, left unread or given up, requests through a waypoint, certificates and
configurations that change meanwhile. The load stops between rounds, so that what is measured is what stays.
"""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Final

from benchmarks import load
from benchmarks.harness.bench import Bench, BenchError
from benchmarks.harness.results import Check, Measure, Round, Series, Subject
from benchmarks.lab.apps import commands
from benchmarks.lab.scrape import scrape
from benchmarks.lab.sources import LabError
from benchmarks.lab.topology import Host, Lab, Workload, entered
from benchmarks.load import LoadError
from benchmarks.peers import waypoints
from benchmarks.peers.pairs import APP_PORT
from benchmarks.peers.standing import APART, Standing, resources, stand_uproxy, workloads
from control.api.identity import SpiffeId
from control.server.ca import write_identity
from uproxy.node.metrics import METRICS_PORT as NODE_METRICS_PORT
from uproxy.process import METRICS_PORT

NAME: Final = "soak"
_NAMESPACE: Final = "soak"
_SERVICE: Final = "240.240.0.65"
_MESH: Final = f"""\
---
apiVersion: v1
kind: Namespace
metadata: {{name: {_NAMESPACE}}}
---
apiVersion: v1
kind: Service
metadata: {{name: mixture, namespace: {_NAMESPACE}}}
spec: {{clusterIP: {_SERVICE}, selector: {{app: soak-server}}, ports: [{{name: tcp, port: {APP_PORT}}}]}}
"""
_PASSER_BY: Final = f"""\
---
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {{{{name: passer-by, namespace: {_NAMESPACE}}}}}
spec: {{{{address: 10.128.0.{{}}, serviceAccount: passer-by}}}}
"""
_CALLERS: Final = 24
_REQUESTS: Final = (8, "/bytes/1000", 50.0)
"""Connections, path and rate a second through the waypoint."""
_DISTURBED_S: Final = 2.0
_GROWN_MB: Final = 3.0
"""What allocators, and what is kept for each peer and label set, may still settle by after the first round."""
_MORE_DESCRIPTORS: Final = 4
_MORE_ENTRIES: Final = 16
"""Of all maps of a node together: what is about connections empties itself within seconds, and not at once."""
_GRACE_S: Final = 60.0
_LIVE: Final = ("uproxy_live_connections", "uproxy_tasks")


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is measured."""

    rounds: int
    seconds: float
    """Of load, in each round."""
    rest_s: float = 3.0
    """After it: half-open and lingering ends go away."""


QUICK: Final = Plan(rounds=3, seconds=5.0)
FULL: Final = Plan(rounds=5, seconds=20.0)


@dataclass(frozen=True, slots=True)
class Part:
    """A program that is watched, and what its entries are: metrics whose names begin so."""

    subject: Subject
    pid: Callable[[], int]
    port: int
    entries: tuple[str, ...]
    address: str = "127.0.0.1"
    """Where it tells them."""
    empty: bool = False
    """It has no entries while nothing happens."""


@dataclass(frozen=True, slots=True)
class Held:
    """What one program holds while nothing happens."""

    memory_mb: float
    descriptors: int
    entries: float
    """Of the kernel's maps, at a node agent; live connections and tasks, at a proxy."""


class Soak:
    """The suite. `plan` replaces what is measured, for tests."""

    name = NAME
    title = "What stays after load"

    def __init__(self, plan: Plan | None = None) -> None:
        self._plan = plan

    def run(self, bench: Bench) -> None:
        """Raises BenchError when something does not work, or a request failed."""
        plan = self._plan or (QUICK if bench.quick else FULL)
        bench.condition(
            NAME,
            f"{plan.rounds} rounds of {plan.seconds:g} s: {_CALLERS} callers whose connections echo, carry 2 MiB, are "
            f"reset, half closed, given up or not read, {_REQUESTS[2]:g} requests/s through a waypoint, and every "
            f"{_DISTURBED_S:g} s a renewed certificate and another configuration. What is held is read "
            f"{plan.rest_s:g} s after the load has stopped",
        )
        try:
            program = load.build(bench.directory)
            with Lab() as lab:
                _Run(bench, plan, lab, program).measure()
        except (LabError, LoadError, OSError, subprocess.SubprocessError) as error:
            raise BenchError(f"{NAME}: {error}") from error


SUITE: Final = Soak()


class _Run:
    def __init__(self, bench: Bench, plan: Plan, lab: Lab, program: Path) -> None:
        self._bench = bench
        self._plan = plan
        self._lab = lab
        self._program = program
        self._hosts = [lab.host(name) for name in "abc"]
        a, b, _ = self._hosts
        self._behind = workloads(a, b, program)
        self._caller = a.workload("soak-client", commands.idle(), namespace=_NAMESPACE)
        self._called = b.workload("soak-server", commands.mixture(APP_PORT), namespace=_NAMESPACE)
        self._mesh = resources() + waypoints.resources(self._behind[1]) + _MESH

    def measure(self) -> None:
        """Raises LabError and BenchError."""
        self._lab.configure(self._mesh)
        self._lab.start(self._bench.progress)
        through = waypoints.stand_ours(self._lab, self._hosts[2], stand_uproxy(*self._behind, self._program))
        parts = self._parts(through)
        seen: dict[str, list[Held]] = {one.subject.name: [] for one in parts}
        connections = 0
        for number in range(1, self._plan.rounds + 1):
            self._bench.progress(f"{NAME}: round {number} of {self._plan.rounds}")
            connections += self._load(through, number)
            time.sleep(self._plan.rest_s)
            for part in parts:
                seen[part.subject.name].append(_held(part))
        self._bench.progress(f"{NAME}: {connections:,} connections")
        self._report(parts, seen, connections)

    def _parts(self, through: Standing) -> list[Part]:
        (waypoint,) = through.proxies["waypoint"]
        return [
            _uproxy("soak-caller", "uProxy of the callers", self._caller),
            _uproxy("soak-called", "uProxy of the application", self._called),
            Part(_subject("soak-waypoint", "our waypoint"), lambda: waypoint, METRICS_PORT, _LIVE, through.tls_address),
            *map(_node_agent, self._hosts[:2]),
        ]

    def _load(self, through: Standing, number: int) -> int:
        """One round of everything; how many connections the mixture made. Raises LabError and BenchError."""
        seconds = self._plan.seconds
        data = self._bench.directory / "mixture"
        data.mkdir(exist_ok=True)
        data.parent.chmod(0o755)
        calling = self._lab.spawn(
            commands.mixture_call(_SERVICE, APP_PORT, _CALLERS, seconds, number, data),
            self._caller.box.netns_path,
            str(self._caller.box.app_cgroup.relative_to(self._lab.names.cgroup)),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        connections, path, rate = _REQUESTS
        with self._disturbed():
            through.run(load.http_open(connections, path, "application", rate, seed=number), seconds, APART)
        out, told = calling.communicate(timeout=seconds + _GRACE_S)
        if calling.returncode:
            raise LabError(f"the callers ended with {calling.returncode}: {told.decode().strip()}")
        return int(out)

    @contextmanager
    def _disturbed(self) -> Iterator[None]:
        """New certificates, and configurations that change something or nothing."""
        over = threading.Event()

        def disturb() -> None:
            turn = 0
            while not over.wait(_DISTURBED_S):
                turn += 1
                workload = (self._caller, self._called)[turn % 2]
                _renew(self._lab, workload.identity, workload.identity_dir)
                self._lab.configure(self._mesh + (_PASSER_BY.format(turn % 250) if turn % 2 else ""))

        disturbing = threading.Thread(target=disturb, name="disturb", daemon=True)
        disturbing.start()
        try:
            yield
        finally:
            over.set()
            disturbing.join()
            self._lab.configure(self._mesh)

    def _report(self, parts: Sequence[Part], seen: Mapping[str, Sequence[Held]], connections: int) -> None:
        results = self._bench.results
        results.subjects += [one.subject for one in parts]
        kinds: tuple[tuple[str, str, str, Callable[[Held], float]], ...] = (
            ("memory", "resident memory", "MB", lambda held: held.memory_mb),
            ("descriptors", "open descriptors", "descriptors", lambda held: held.descriptors),
            (
                "entries",
                "live connections and tasks, or entries of the kernel's maps",
                "entries",
                lambda held: held.entries,
            ),
        )
        for name, label, unit, read in kinds:
            measure = Measure(f"{NAME}/{name}", NAME, f"What is held: {label}", "after each round", unit)
            results.measures.append(measure)
            for part in parts:
                rounds = [Round(at, read(held)) for at, held in enumerate(seen[part.subject.name], 1)]
                results.series.append(Series(measure.name, part.subject.name, rounds))
        for part in parts:
            self._bench.check(flat(part, seen[part.subject.name], connections))


def flat(part: Part, seen: Sequence[Held], connections: int) -> Check:
    """Whether the last round left what the first one had left."""
    first, last = seen[0], seen[-1]
    most = 0 if part.empty else first.entries + _MORE_ENTRIES
    grown = {
        "MB": last.memory_mb - first.memory_mb,
        "descriptors": float(last.descriptors - first.descriptors),
        "entries": last.entries - first.entries,
    }
    passed = (
        grown["MB"] < _GROWN_MB
        and grown["descriptors"] <= _MORE_DESCRIPTORS
        and last.entries <= most
        and connections > 0
    )
    text = (
        f"after {connections:,} connections {grown['MB']:+.1f} MB, {grown['descriptors']:+.0f} descriptors, "
        f"{grown['entries']:+.0f} entries from the first round to the last"
    )
    return Check(f"{NAME}: {part.subject.label} stays as it was", passed, text, grown)


def _held(part: Part) -> Held:
    pid = part.pid()
    status = Path(f"/proc/{pid}/status").read_text()
    resident = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS"))
    told = scrape(entered(Path(f"/proc/{pid}/ns/net")), part.port, part.address)
    entries = sum(value for name, value in told.items() if name.startswith(part.entries))
    return Held(resident * 1024 / 1e6, len(os.listdir(f"/proc/{pid}/fd")), entries)


def _uproxy(name: str, label: str, workload: Workload) -> Part:
    return Part(_subject(name, label), workload.proxy_pid, METRICS_PORT, _LIVE, empty=True)


def _node_agent(host: Host) -> Part:
    def pid() -> int:
        assert host.agent is not None
        return host.agent.pid

    subject = _subject(f"soak-node-{host.name}", f"node agent of host {host.name}")
    return Part(subject, pid, NODE_METRICS_PORT, ("uproxy_node_map_entries",))


def _subject(name: str, label: str) -> Subject:
    return Subject(name, label, "Watched while everything at once goes through it.", f"uProxy {version('uproxy-mesh')}")


def _renew(lab: Lab, identity: SpiffeId, directory: Path) -> None:
    authority = lab.source.authority()
    request = (directory / "csr.pem").read_bytes()
    write_identity(directory, authority.issue(request, identity), authority.bundle_pem)
