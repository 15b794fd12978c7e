"""Subjects that stand: a load generator's place, two proxies or none, and the application, on two hosts of a lab."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

from benchmarks import load
from benchmarks.harness.bench import BenchError, EndedError
from benchmarks.harness.results import Subject
from benchmarks.lab import cores
from benchmarks.lab.apps import commands
from benchmarks.lab.remains import Owner
from benchmarks.lab.sources import LabError
from benchmarks.lab.topology import App, Host, Lab, Workload, entered, tail
from benchmarks.load import Load, LoadError, Outcome
from benchmarks.peers.pairs import APP_PORT, Peer
from benchmarks.peers.place import Address, Place
from uproxy.sandbox import Sandbox, write_sysctls

_DYING_S = 0.1
"""A process's sockets are closed a moment before it is gone."""
UPROXY = Subject(
    "uproxy",
    "uProxy pair",
    "Two workloads started by `uproxy exec`, each with its uProxy, captured by eBPF: the load generator dials the "
    "service's address. HBONE in mTLS (TLS 1.3) between the uProxies; access logs on. The hosts' node agents stand "
    "beside them, are idle, and are not counted.",
    f"uProxy {version('uproxy-mesh')}",
)
SERVICE = "240.240.0.60"


def resources(name: str = UPROXY.name, namespace: str = "default", address: str = SERVICE) -> str:
    """The service before the second of a subject's workloads, in YAML."""
    ports = "".join(f"  - {{name: tcp-{i}, port: {APP_PORT + i}}}\n" for i in range(load.PORTS))
    return f"""\
apiVersion: v1
kind: Service
metadata: {{name: application, namespace: {namespace}}}
spec:
  clusterIP: {address}
  selector: {{app: {name}-server}}
  ports:
{ports}"""


@dataclass(frozen=True, slots=True)
class Pinning:
    """Which core the proxies work on, and which the load generator and the application."""

    proxies: int
    load: int
    punctual: bool = False
    """The load generator goes before the application, lest it sends late."""


TOGETHER = Pinning(cores.FIRST, cores.FIRST)
"""All that a subject needs for a message on one core: what is measured is what the message costs."""
APART = Pinning(cores.FIRST, cores.LAST, punctual=True)
"""The proxies alone, so that requests are sent when they are due."""


@dataclass(frozen=True, slots=True)
class Standing:
    """A subject that takes load."""

    subject: Subject
    lab: Lab
    client: Sandbox
    """Where the load generator runs."""
    server: Sandbox
    entry: Address
    """Stands for the application's first port."""
    proxies: Mapping[str, Sequence[int]]
    """Role -> process ids."""
    application: Sequence[int]
    program: Path
    """The load generator."""
    tls_address: str
    """To which the client's proxy opens its connections; the application's where there is no proxy."""
    logs: Sequence[Path] = ()
    """Of the proxies: shown when one has ended."""
    tls: load.Tls | None = None
    """Of the load generator's own."""

    def processes(self) -> Mapping[str, Sequence[int]]:
        everybody = {**self.proxies, "application": self.application}
        for role, pids in everybody.items():
            for pid in pids:
                try:
                    Owner.of(pid)
                except ProcessLookupError as error:
                    logs = "".join(map(tail, self.logs))
                    raise EndedError(f"the {role}, process {pid}, has ended\n{logs}".strip()) from error
        return everybody

    def spawn(self, pinning: Pinning, argv: Sequence[str]) -> subprocess.Popen[bytes]:
        """A program as the client's application: in its namespace and cgroup, with pipes for its output."""
        priority = ["nice", "-n", "-20"] if pinning.punctual else []
        return self.lab.spawn(
            [*priority, "taskset", "-c", str(pinning.load), *argv],
            self.client.netns_path,
            _cgroup(self.lab, self.client.app_cgroup),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def run(self, asked: Load, seconds: float, pinning: Pinning) -> Outcome:
        """Make a load, everything where it belongs before and after. Raises BenchError when a request failed."""
        proxies = [pid for pids in self.proxies.values() for pid in pids]
        placed = ((proxies, pinning.proxies), (self.application, pinning.load))
        for pids, core in placed:
            cores.pin(pids, core)
        try:
            outcome = load.run(partial(self.spawn, pinning), self.program, self.carried(asked), *self.entry, seconds)
        except LoadError as error:
            self._look_for_the_dead()
            raise BenchError(f"{self.subject.name}: {error}") from error
        for pids, core in placed:
            if cores.strays(pids, core):
                raise BenchError(f"{self.subject.name}: a thread has left core {core}")
        if outcome.failed:
            self._look_for_the_dead()
            reasons = ", ".join(f"{count} times {reason}" for reason, count in outcome.errors.items())
            raise BenchError(f"{self.subject.name}: {outcome.failed} of {outcome.scheduled} requests failed: {reasons}")
        return outcome

    def carried(self, asked: Load) -> Load:
        """A load as this subject's generator makes it."""
        return asked.over(self.tls) if self.tls else asked

    def _look_for_the_dead(self) -> None:
        """Raise EndedError if it was the end of a process that requests failed by."""
        time.sleep(_DYING_S)
        self.processes()


def application(program: Path) -> App:
    """The load generator's server as a workload's command."""

    def argv(address: str, data: Path) -> list[str]:
        # A copy, because the application's user may have no right to read where the program lies.
        copy = data / "load"
        shutil.copyfile(program, copy)
        copy.chmod(0o755)
        return load.serve_argv(copy, address, APP_PORT)

    return App(argv, str(program), {f"tcp-{i}": APP_PORT + i for i in range(load.PORTS)})


def workloads(
    a: Host, b: Host, program: Path, name: str = UPROXY.name, namespace: str = "default"
) -> tuple[Workload, Workload]:
    """The two of a subject; to be made before the lab starts, with its `resources`."""
    return (
        a.workload(f"{name}-client", commands.idle(), namespace=namespace),
        b.workload(f"{name}-server", application(program), namespace=namespace),
    )


def stand_uproxy(
    client: Workload, server: Workload, program: Path, subject: Subject = UPROXY, address: str = SERVICE
) -> Standing:
    """The two workloads, once the lab has started; `address`: the service's."""
    _settle(client.box, server.box)
    proxies = {"client proxy": [client.proxy_pid()], "server proxy": [server.proxy_pid()]}
    found = _members(server.box)
    return Standing(
        subject,
        client.host.lab,
        client.box,
        server.box,
        (address, APP_PORT),
        proxies,
        found,
        program,
        server.box.addresses[0],
        (client.log, server.log),
    )


def stand_peer(peer: Peer, a: Host, b: Host, program: Path) -> Standing:
    """A pair of peers and their application, in new places. Raises LabError."""
    name, lab = peer.subject.name, a.lab
    client, server = Place.make(a, f"{name}-client", "web"), Place.make(b, f"{name}-server", "db")
    _settle(client.box, server.box)
    both = [load.Tls(client.identity_dir, str(server.identity)), load.Tls(server.identity_dir, str(client.identity))]
    ours, theirs = both if peer.own_tls else (None, None)
    serving = lab.spawn(
        load.serve_argv(program, peer.listens or server.address, APP_PORT, tls=theirs),
        server.box.netns_path,
        _cgroup(lab, server.box.app_cgroup),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    lab.wait([lambda: server.accepts((server.address, APP_PORT))], 10.0, f"the application of {name}")
    if serving.poll() is not None:
        raise LabError(f"the application of {name} ended with {serving.returncode}")
    started = peer.start(client, server)
    return Standing(
        replace(peer.subject, version=started.version),
        lab,
        client.box,
        server.box,
        started.entry,
        started.proxies,
        [serving.pid],
        program,
        server.address,
        (client.log, server.log),
        ours,
    )


def _settle(*boxes: Sandbox) -> None:
    """Let addresses be used again at once: thousands of short connections a second come from one."""
    for box in boxes:
        with entered(box.netns_path):
            write_sysctls({"net/ipv4/tcp_tw_reuse": "1", "net/ipv4/ip_local_port_range": "20000 65000"})


def _members(box: Sandbox) -> list[int]:
    return [int(pid) for pid in (box.app_cgroup / "cgroup.procs").read_text().split()]


def _cgroup(lab: Lab, directory: Path) -> str:
    return str(directory.relative_to(lab.names.cgroup))
