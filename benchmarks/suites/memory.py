"""What sidecars take of a host's memory: the first of them, each further one, and connections that do nothing.

Some sidecars of each kind stand beside workloads of two hosts, configured for the same inbound and outbound ports. They
are looked at after their start, and again while the first two hold idle connections between them.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from benchmarks import load
from benchmarks.harness.bench import Bench, BenchError, EndedError, Probe, Sample
from benchmarks.harness.results import LEAST_ROUNDS, Measure, Subject
from benchmarks.lab import forking
from benchmarks.lab.apps import commands
from benchmarks.lab.remains import Owner
from benchmarks.lab.sources import TRUST_DOMAIN, LabError
from benchmarks.lab.topology import Host, Lab, Workload
from benchmarks.load import LoadError
from benchmarks.peers import envoy
from benchmarks.peers.pairs import APP_PORT, ENTRY_PORT, Peer, Started
from benchmarks.peers.place import Address, Place
from benchmarks.peers.standing import TOGETHER, UPROXY, Standing, application, stand_peer, stand_uproxy
from benchmarks.suites.placements.memory import resident_mb
from control.api.address import HBONE_PORT

NAME: Final = "memory"
ALONE, MARGINAL, IDLE = (f"{NAME}/{what}" for what in ("alone", "marginal", "idle"))

OWN: Final = replace(
    UPROXY,
    label="uProxies, each by itself",
    description="Sidecars started by `uproxy exec`, each an interpreter of its own. Captured by eBPF; access logs on.",
)
FORKED: Final = replace(
    UPROXY,
    name="uproxy-forked",
    label="uProxies of a fork server",
    description="The same, started through one `uproxy fork-server`, with which they share what it has imported. It "
    "counts to them, and not to what each further one adds.",
)
ENVOY: Final = Subject(
    "envoy",
    "Envoys",
    "An Envoy as a sidecar, with one worker: HBONE in on 15008 and TCP out on loopback, in mTLS. Access logs on.",
)
_SERVICES: Final = {OWN.name: "240.240.0.61", FORKED.name: "240.240.0.62"}
_PORTS: Final = range(load.PORTS)
_POLL_S: Final = 0.02


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is measured."""

    sidecars: int
    """Of each kind; two at least."""
    idle: int
    """Connections."""
    seconds: float
    """For which they are held, in each round."""


QUICK: Final = Plan(sidecars=3, idle=500, seconds=0.4)
FULL: Final = Plan(sidecars=10, idle=1000, seconds=1.5)


@dataclass(frozen=True, slots=True)
class Sidecars:
    """All of one kind."""

    pair: Standing
    """The first two, between which connections are made."""
    further: Sequence[int]
    shared: Sequence[int] = ()
    """Processes that are there once for all."""

    @property
    def subject(self) -> Subject:
        return self.pair.subject

    def processes(self) -> Mapping[str, Sequence[int]]:
        found = self.pair.processes()
        for pid in (*self.further, *self.shared):
            try:
                Owner.of(pid)
            except ProcessLookupError as error:
                raise EndedError(f"{self.subject.name}: process {pid} has ended") from error
        if self.shared:  # whose children all others are
            return {"fork server and proxies": self.shared, "application": found["application"]}
        return {**found, "further proxies": self.further}

    @property
    def first(self) -> Sequence[int]:
        """What there is when there is one of them."""
        return [*self.shared, *self.pair.proxies["client proxy"]]

    @property
    def ends(self) -> Sequence[int]:
        """The two that hold connections."""
        return [pid for pids in self.pair.proxies.values() for pid in pids]

    @property
    def everything(self) -> Sequence[int]:
        return [*self.shared, *self.ends, *self.further]


class Memory:
    """The suite. `plan` replaces what is measured, for tests."""

    name = NAME
    title = "Memory of sidecars"

    def __init__(self, plan: Plan | None = None) -> None:
        self._plan = plan

    def run(self, bench: Bench) -> None:
        """Raises BenchError when nothing can be measured."""
        plan = self._plan or (QUICK if bench.quick else FULL)
        try:
            program = load.build(bench.directory)
            with Lab() as lab:
                _measure(bench, plan, _stand(bench, plan, lab, program))
        except (LabError, LoadError, OSError, subprocess.SubprocessError) as error:
            raise BenchError(f"{NAME}: {error}") from error


SUITE: Final = Memory()


def _measure(bench: Bench, plan: Plan, everybody: Sequence[Sidecars]) -> None:
    bench.condition(
        NAME,
        f"{plan.sidecars} sidecars of each kind on two hosts, in use for the same {load.PORTS} ports in and out, after "
        "their start. Distinct physical pages: what processes of a kind share counts once, and what they share with "
        "others in full, as if they were alone on a machine. Node agents and launchers are not counted",
    )
    bench.interleave([_alone(), _marginal()], everybody, rounds=LEAST_ROUNDS, seconds=0.0)
    fresh = {one.subject.name: _resident(one, one.ends) for one in everybody}
    bench.interleave([_idle(plan.idle, fresh)], everybody, rounds=LEAST_ROUNDS, seconds=plan.seconds)


def _alone() -> Probe[Sidecars]:
    def take(sidecars: Sidecars, seconds: float, number: int) -> Sample:
        del seconds, number  # it takes as long as it takes
        return Sample(_resident(sidecars, sidecars.first), 0)

    return Probe(Measure(ALONE, NAME, "Memory of one sidecar", "after its start", "MB"), take)


def _marginal() -> Probe[Sidecars]:
    def take(sidecars: Sidecars, seconds: float, number: int) -> Sample:
        del seconds, number
        one, all_of_them = _resident(sidecars, sidecars.first), _resident(sidecars, sidecars.everything)
        added = len(sidecars.everything) - len(sidecars.first)
        return Sample((all_of_them - one) / added, 0, {"all_mb": all_of_them})

    return Probe(Measure(MARGINAL, NAME, "Memory of each further sidecar", "on the same host", "MB"), take)


def _idle(count: int, fresh: Mapping[str, float]) -> Probe[Sidecars]:
    """`fresh`: of the two ends before any load, by subject: what load leaves behind is counted too."""

    def take(sidecars: Sidecars, seconds: float, number: int) -> Sample:
        del number  # nothing arrives
        pair = sidecars.pair
        holding = pair.spawn(TOGETHER, load.argv(pair.program, load.idle(count), *pair.entry, seconds))
        read: list[tuple[int, float]] = []
        while holding.poll() is None:
            read.append((time.monotonic_ns(), _resident(sidecars, sidecars.ends)))
            time.sleep(_POLL_S)
        told, failed = holding.communicate()
        if holding.returncode:
            sidecars.processes()  # whoever has ended says so
            raise BenchError(f"{sidecars.subject.name}: {failed.decode().strip()}")
        outcome = load.parse(told.decode())
        held = [mb for at, mb in read if outcome.start_ns <= at <= outcome.end_ns]
        if not held:
            raise BenchError(f"{sidecars.subject.name}: {seconds:g} s are too few to read the memory in")
        before = fresh[sidecars.subject.name]
        during = statistics.median(held)
        # Nothing was done by which processor time could be divided.
        return Sample((during - before) * 1000 / count, 0, {"before_mb": before, "during_mb": during})

    label = f"each of {count:,}, both ends together"
    measure = Measure(IDLE, NAME, "Memory of an idle connection", label, "KB", parameters={"connections": count})
    return Probe(measure, take)


def _resident(sidecars: Sidecars, pids: Sequence[int]) -> float:
    try:
        return resident_mb(pids)
    except ProcessLookupError as error:
        raise EndedError(f"{sidecars.subject.name}: process {error} is gone") from error


# -- what stands


def _stand(bench: Bench, plan: Plan, lab: Lab, program: Path) -> Sequence[Sidecars]:
    """Raises LabError."""
    a, b = lab.host("a"), lab.host("b")
    server = forking.start(a)
    declared = {
        OWN.name: _declare(a, plan, OWN.name, program),
        FORKED.name: _declare(a, plan, FORKED.name, program, *forking.launching(lab)),
    }
    lab.configure("---\n".join(map(_service, declared)))
    lab.start(bench.progress)
    uproxies = [
        _of(subject, declared[subject.name], program, shared) for subject, shared in ((OWN, ()), (FORKED, [server.pid]))
    ]
    envoys = _stand_envoys(a, b, plan, program)
    bench.progress(f"standing: {plan.sidecars} each of {', '.join(one.subject.name for one in (*uproxies, envoys))}")
    return [*uproxies, envoys]


def _declare(host: Host, plan: Plan, name: str, program: Path, *launch: str) -> Sequence[Workload]:
    """A client and a server, and others that do nothing."""
    return [
        host.workload(f"{name}-client", commands.idle(), launch=launch),
        host.workload(f"{name}-server", application(program), launch=launch),
        *(host.workload(f"{name}-{i}", commands.idle(), launch=launch) for i in range(2, plan.sidecars)),
    ]


def _service(name: str) -> str:
    ports = "".join(f"  - {{name: tcp-{i}, port: {APP_PORT + i}}}\n" for i in _PORTS)
    return f"""\
apiVersion: v1
kind: Service
metadata: {{name: {name}, namespace: default}}
spec:
  clusterIP: {_SERVICES[name]}
  selector: {{app: {name}-server}}
  ports:
{ports}"""


def _of(subject: Subject, workloads: Sequence[Workload], program: Path, shared: Sequence[int]) -> Sidecars:
    client, server, *others = workloads
    pair = replace(stand_uproxy(client, server, program), subject=subject, entry=(_SERVICES[subject.name], APP_PORT))
    return Sidecars(pair, [one.proxy_pid() for one in others], shared)


def _stand_envoys(a: Host, b: Host, plan: Plan, program: Path) -> Sidecars:
    made: list[Place] = []

    def start(client: Place, server: Place) -> Started:
        made.append(server)
        proxies = {
            role: [_envoy(place, server)] for role, place in (("server proxy", server), ("client proxy", client))
        }
        return Started(("127.0.0.1", ENTRY_PORT), proxies, envoy.version())

    pair = stand_peer(Peer(ENVOY, start), a, a, program)
    (server,) = made
    further = [_envoy(Place.make(a, f"envoy-{i}", "web"), server) for i in range(2, plan.sidecars)]
    return Sidecars(pair, further)


def _envoy(place: Place, server: Place) -> int:
    """One that takes HBONE for its own application, and sends its entries to the server's."""
    applications = {f"{place.address}:{APP_PORT + i}": (place.address, APP_PORT + i) for i in _PORTS}
    entries: dict[Address, str] = {("127.0.0.1", ENTRY_PORT + i): f"{server.address}:{APP_PORT + i}" for i in _PORTS}
    listen, upstream = (place.address, HBONE_PORT), (server.address, HBONE_PORT)
    config = envoy.sidecar_config(
        envoy.server_config(place.identity_dir, TRUST_DOMAIN, listen, applications, log=place.access_log),
        envoy.client_config(place.identity_dir, TRUST_DOMAIN, upstream, entries, log=place.access_log),
    )
    written = place.directory / "envoy.json"
    written.write_text(json.dumps(config, indent=1))
    return place.start(envoy.argv(written), [listen, *entries]).pid
