"""Subjects of the suite: the proxies of one placement, what they hold, and how its callers are spoken for."""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol

from benchmarks.harness.results import Subject
from benchmarks.lab import cores
from benchmarks.lab.sources import LabError
from benchmarks.lab.topology import Lab, tail
from benchmarks.lab.waypoints import config_dump
from benchmarks.suites.placements.application import BUSY, Member
from uproxy.entrance import sockets_inside
from uproxy.sandbox import Sandbox

PLAIN = "plain-http"
"""The placement without a proxy."""
ONE_PASS = "sidecar-one-pass"
"""The sidecars, of which the callers' does not read HTTP: as much work as a waypoint has."""
PROXY_CORE, LOAD_CORE = cores.FIRST, cores.LAST
"""Every proxy and node agent on the first, applications and load generators on the second, where there are two."""
_ASK_S = 5.0
_PATIENCE_S = 30.0
_POLL_S = 0.02
DRAIN_S: Final = 2
"""What a process that is replaced has for its connections."""


@dataclass(frozen=True, slots=True)
class Answer:
    """An HTTP answer; `status` 0 when the connection ended without one."""

    status: int
    told: Mapping[str, str] = field(default_factory=dict)
    """What the application said: its service and version, and who it was told is calling."""


@dataclass(frozen=True, slots=True)
class Caller:
    """A workload that calls, in one placement."""

    lab: Lab
    member: Member
    box: Sandbox
    entries: Mapping[str, tuple[str, int]]
    """Of each service by its name: where a request for it goes."""
    l4_entries: Mapping[str, tuple[str, int]]
    """The same of a connection that nobody reads as HTTP on its way."""
    busy_entries: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    """Where a request goes that a bad filter is to meet, if elsewhere."""

    def ask(self, service: str, path: str, *, l7: bool = True) -> Answer:
        """One request, as the application makes it: from its cgroup and namespace."""
        entries = self.entries_for(path) if l7 else self.l4_entries
        with self._socket() as made:
            connection = http.client.HTTPConnection(service)
            connection.sock = made
            try:
                made.connect(entries[service])
                connection.request("GET", path)
                answer = connection.getresponse()
                body = answer.read()
            except (OSError, http.client.HTTPException):
                return Answer(0)
        return Answer(answer.status, json.loads(body) if answer.status == 200 else {})

    def entries_for(self, path: str) -> Mapping[str, tuple[str, int]]:
        """Of each service: where a request for this path goes."""
        return self.busy_entries if path.startswith(BUSY) and self.busy_entries else self.entries

    @contextmanager
    def _socket(self) -> Iterator[socket.socket]:
        netns = os.open(self.box.netns_path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            made = sockets_inside(self.box.app_cgroup, netns, [socket.AF_INET])[0]
        finally:
            os.close(netns)
        with made:
            made.settimeout(_ASK_S)
            yield made

    def start(self, argv: Sequence[str], *, first: bool = True) -> subprocess.Popen[bytes]:
        """A load generator in the application's place, with pipes for its output.

        It shares its core with others of its kind and the applications: it goes `first`, so that it sends in time.
        """
        cgroup = str(self.box.app_cgroup.relative_to(self.lab.names.cgroup))
        pinned = ["taskset", "-c", str(LOAD_CORE), *(["chrt", "--fifo", "1"] if first else []), *argv]
        streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return self.lab.spawn(pinned, self.box.netns_path, cgroup, **streams)


class Process(Protocol):
    """A process of the mesh."""

    @property
    def name(self) -> str: ...

    @property
    def role(self) -> str: ...

    @property
    def host(self) -> str:
        """Of whose memory it takes."""
        ...

    @property
    def pid(self) -> int: ...

    @property
    def believed_by(self) -> int:
        """How many workloads take its word on who calls them."""
        ...

    def private_keys(self) -> dict[str, str]:
        """Which private keys it holds, as it says: the serial number of each one's certificate -> its identity."""
        ...


@dataclass(slots=True)
class Envoy:
    """An Envoy that runs; `admin` is a Unix socket."""

    name: str
    role: str
    host: str
    admin: Path
    log: Path
    start: Callable[[Path], subprocess.Popen[bytes]]
    """Starts one with another admin socket, beside those that run: they share their ports (SO_REUSEPORT)."""
    believed_by: int
    process: subprocess.Popen[bytes] = field(init=False)

    def __post_init__(self) -> None:
        self.process = self.start(self.admin)

    @property
    def pid(self) -> int:
        return self.process.pid

    def replace(self) -> None:
        """Another one serves, then this one drains and ends. Raises LabError."""
        former, former_admin = self.process, self.admin
        self.admin = former_admin.with_name(f"{former_admin.stem}-again.sock")
        self.process = self.start(self.admin)
        until(self.ready, f"the next Envoy {self.name}")
        ask_socket(former_admin, "POST", "/drain_listeners?graceful")
        time.sleep(DRAIN_S)
        former.terminate()
        ended(former, f"the former Envoy {self.name}")

    def ready(self) -> bool:
        """Raises LabError when it gave up."""
        if self.process.poll() is not None:
            raise LabError(f"the Envoy {self.name} ended with {self.process.returncode}:\n{tail(self.log)}")
        return self.asked("/ready").startswith("LIVE")

    def version(self) -> str:
        told: str = json.loads(self.asked("/server_info"))["version"]
        return told.split("/")[1]

    def private_keys(self) -> dict[str, str]:
        # Each TLS context lists its certificates: the same ones many times.
        chains = [leaf for one in json.loads(self.asked("/certs"))["certificates"] for leaf in one["cert_chain"]]
        return {leaf["serial_number"].lstrip("0"): leaf["subject_alt_names"][0]["uri"] for leaf in chains}

    def asked(self, path: str) -> str:
        """A GET of the admin socket; empty while nobody answers."""
        return ask_socket(self.admin, "GET", path)


def ask_socket(path: Path, method: str, target: str) -> str:
    """The answer of an Envoy's admin socket; empty while nobody answers."""
    with closing(http.client.HTTPConnection("envoy")) as connection:
        try:
            connection.sock = socket.socket(socket.AF_UNIX)
            connection.sock.settimeout(_ASK_S)
            connection.sock.connect(str(path))
            connection.request(method, target)
            return connection.getresponse().read().decode()
        except (OSError, http.client.HTTPException):
            return ""


def until(condition: Callable[[], bool], what: str) -> None:
    """Return when it is so. Raises LabError."""
    deadline = time.monotonic() + _PATIENCE_S
    while not condition():
        if time.monotonic() > deadline:
            raise LabError(f"{what} was not there within {_PATIENCE_S:g} s")
        time.sleep(_POLL_S)


def ended(process: subprocess.Popen[bytes], what: str) -> None:
    """Return when it has. Raises LabError."""
    try:
        process.wait(_PATIENCE_S)
    except subprocess.TimeoutExpired:
        raise LabError(f"{what} did not end within {_PATIENCE_S:g} s") from None


@dataclass(slots=True)
class UProxy:
    """A workload's uProxy, or a process of our waypoint."""

    name: str
    role: str
    host: str
    pid: int
    netns: Path
    successor: Callable[[], int]
    """Has another process take over, and returns its pid when the one before has ended. Raises LabError."""
    believed_by: int

    def replace(self) -> None:
        """Another one serves, and this one has drained. Raises LabError."""
        self.pid = self.successor()

    def private_keys(self) -> dict[str, str]:
        dump = config_dump(self.netns)
        return {dump["certificate"]["serial"].lstrip("0"): dump["identity"]}


@dataclass(frozen=True, slots=True)
class NodeAgent:
    """A host's `uproxy node`. It proves itself to nobody here: its configuration is a file."""

    name: str
    role: str
    host: str
    pid: int
    pins: Path
    """Of the maps that it fills."""
    believed_by: int = 0

    def private_keys(self) -> dict[str, str]:
        return {}


@dataclass(frozen=True, slots=True)
class Placement:
    """A subject that stands."""

    subject: Subject
    callers: Sequence[Caller]
    mesh: Sequence[Process]
    applications: Sequence[int]
    """Process ids."""

    def processes(self) -> Mapping[str, Sequence[int]]:
        roles: dict[str, list[int]] = {}
        for one in self.mesh:
            roles.setdefault(one.role, []).append(one.pid)
        return {**roles, "application": self.applications}
