"""Builds a lab: hosts on an underlay, a real node agent on each, workloads started by the real `uproxy exec`.

    with Lab() as lab:
        a, b = lab.host("a"), lab.host("b")
        web = a.workload("web", client())
        db = b.workload("db", redis(), labels={"app": "db"}, ports={"redis": 6379})
        lab.configure(SERVICES + POLICIES)
        lab.start()

What the lab made is gone when the block ends, and when its process is killed (see remains.py).
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from benchmarks.lab import congestion, remains, sources
from benchmarks.lab.control import ControlPlane
from benchmarks.lab.remains import LabNames, Owner
from benchmarks.lab.sources import TRUST_DOMAIN, Files, LabError, Source
from control.api.identity import SpiffeId
from uproxy import linux, sandbox
from uproxy.entrance import Entrance, sockets_inside
from uproxy.node.client import NodeClient, NodeError
from uproxy.sandbox import Sandbox

APP_USER = "nobody"

# What the mesh captures: service addresses; workloads of all hosts, host i has 10.96.i.0/24; and workloads that are
# declared and do not exist.
MESH_RANGES = ("240.240.0.0/16", "10.96.0.0/16", "fd96::/48", "10.128.0.0/9")
# Twins of workloads, on the same links and outside of the mesh.
_TWIN_RANGE = "10.98"

# A plain `su`, and cron, leave out where nginx and tcpdump are.
PATH = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"

_CONTROL_INDEX = 250
"""Of the control plane's machine on the underlay, out of the hosts' way."""

_NODE_TIMEOUT_S = 60.0
_START_TIMEOUT_S = 120.0
_POLL_S = 0.01


@dataclass(frozen=True, slots=True)
class App:
    """What a workload runs: the argv, and how to know that it serves."""

    argv: Callable[[str, Path], list[str]]
    """From the workload's address and a directory of its own, which its user owns."""
    program: str
    """Must be installed."""
    ports: Mapping[str, int] = field(default_factory=dict)
    """Name -> port; all accept connections when it has started."""
    talks: bool = False
    """Jobs go to its standard input, answers come from its standard output."""


class Workload:
    """One workload of a host: its launcher (`uproxy exec`), its names, and ways into it."""

    def __init__(self, host: Host, name: str, app: App, address: str, options: WorkloadOptions) -> None:
        self.host = host
        self.name = name
        self.app = app
        self.address = address
        self.options = options
        self.identity = SpiffeId.parse(
            f"spiffe://{TRUST_DOMAIN}/ns/{options.namespace}/sa/{options.service_account or name}"
        )
        lab = host.lab
        self.box = Sandbox.below(host.cgroup_root, lab.names.cgroup.parent, name, [address])
        self.identity_dir = lab.source.identity_dir(self)
        self.data = lab.directory / "data" / name
        self.log = lab.directory / f"{name}.proxy.log"
        self._launcher_log = lab.directory / f"{name}.exec.log"
        self._uses_cubic = False
        self.launcher: subprocess.Popen[bytes] | None = None

    @property
    def netns(self) -> str:
        return self.box.netns

    def arguments(self) -> list[str]:
        """The `uproxy exec` line, as an operator would type it."""
        return [
            *[sys.executable, "-I", "-m", "uproxy", "exec", "--name", self.name],
            *self.host.lab.source.workload_arguments(self),
            *["--node-socket", str(self.host.node_socket), "--cgroup-root", str(self.host.cgroup_root)],
            *self.options.launch,
            *["--state-dir", str(self.host.lab.directory / "state"), "--user", APP_USER],
            *["--log", str(self.log), "--log-format", "json"],
            *(["--dns"] if self.options.dns else []),
            *["--", *self.app.argv(self.address, self.data)],
        ]

    def launch(self) -> None:
        """Start `uproxy exec` on the host; return at once."""
        self.data.mkdir(parents=True, exist_ok=True)
        shutil.chown(self.data, APP_USER)
        self._uses_cubic = False
        pipe = subprocess.PIPE if self.app.talks else subprocess.DEVNULL
        with open(self._launcher_log, "ab") as log:
            self.launcher = self.host.spawn(
                self.arguments(), stdin=pipe, stdout=pipe if self.app.talks else log, stderr=log
            )

    def running(self) -> bool:
        """Whether its application serves. Raises LabError when the launcher gave up."""
        assert self.launcher is not None
        if self.launcher.poll() is not None:
            raise LabError(f"`uproxy exec` of {self.name} ended with {self.launcher.returncode}:\n{self.logs()}")
        try:
            # The command is started when the sidecar is ready, so that both run when both have a process. A fork
            # server's sidecar is no child of the launcher's.
            children = Path(f"/proc/{self.launcher.pid}/task/{self.launcher.pid}/children").read_text().split()
            if not set(children) & set((self.box.app_cgroup / "cgroup.procs").read_text().split()):
                return False
            if not (self.box.proxy_cgroup / "cgroup.procs").read_text():
                return False
            if not self._uses_cubic:
                # The launcher made the namespace; nothing has been dialled from it yet.
                with self.entered():
                    congestion.use_cubic()
                self._uses_cubic = True
            return all(self._accepts(port) for port in self.app.ports.values())
        except OSError:
            return False

    def _accepts(self, port: int) -> bool:
        with suppress(OSError), self.entered(), socket.create_connection((self.address, port), 0.5):
            return True
        return False

    @contextmanager
    def entered(self) -> Iterator[None]:
        """This thread in the workload's namespace, but not in its app cgroup: what is made here is not captured."""
        with entered(self.box.netns_path):
            yield

    def sockets(
        self, count: int = 1, family: int = socket.AF_INET, kind: int = socket.SOCK_STREAM
    ) -> list[socket.socket]:
        """Sockets as the application makes them: captured, in its namespace."""
        with _opened(self.box.netns_path) as netns:
            return sockets_inside(self.box.app_cgroup, netns, [family] * count, kind)

    def job(self, **job: Any) -> dict[str, Any]:
        """Have the client application do a job (apps/client.py)."""
        assert self.launcher is not None
        assert self.launcher.stdin is not None
        assert self.launcher.stdout is not None
        self.launcher.stdin.write(json.dumps(job).encode() + b"\n")
        self.launcher.stdin.flush()
        line = self.launcher.stdout.readline()
        if not line:
            raise LabError(f"{self.name} has ended:\n{self.logs()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def proxy_pid(self) -> int:
        """The uProxy's pid. Raises LabError when there is none (never 0, which kill(2) takes for everybody)."""
        for pid in (self.box.proxy_cgroup / "cgroup.procs").read_text().split():
            with suppress(OSError):
                if b"\0run\0" in Path("/proc", pid, "cmdline").read_bytes():
                    return int(pid)
        raise LabError(f"{self.name} has no uProxy now")

    def access_log(self) -> list[dict[str, Any]]:
        """The access-log lines of its uProxy so far."""
        lines = self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
        entries = []
        for line in lines:
            with suppress(ValueError):
                entry = json.loads(line)
                if isinstance(entry, dict) and "direction" in entry:
                    entries.append(entry)
        return entries

    def await_access(self, matches: Callable[[dict[str, Any]], bool], timeout_s: float = 30.0) -> dict[str, Any]:
        """The first access-log entry that matches, which may be written a moment after the connection ended."""
        deadline = time.monotonic() + timeout_s
        while True:
            for entry in self.access_log():
                if matches(entry):
                    return entry
            if time.monotonic() > deadline:
                raise LabError(f"no such line in {self.name}'s access log:\n{tail(self.log)}")
            time.sleep(_POLL_S)

    def logs(self) -> str:
        return tail(self._launcher_log) + tail(self.log)


@dataclass(frozen=True, slots=True)
class WorkloadOptions:
    """How a workload appears in the configuration."""

    namespace: str = "default"
    service_account: str = ""
    """Default: the workload's name."""
    labels: Mapping[str, str] = field(default_factory=dict)
    ports: Mapping[str, int] = field(default_factory=dict)
    """Default: the application's."""
    dns: bool = False
    """Its name queries go to its uProxy."""
    ipv6: bool = False
    """Its one address is an IPv6 one, then."""
    launch: Sequence[str] = ()
    """More options of `uproxy exec`."""


class Host:
    """A machine of the lab: a network namespace with forwarding, and a node agent."""

    def __init__(self, lab: Lab, name: str, index: int) -> None:
        self.lab = lab
        self.name = name
        self.index = index
        self.netns = lab.names.netns(f"host-{name}")
        self.underlay_address = _underlay_address(index)
        self.cgroup_root = lab.names.cgroup / name
        self.run_dir = lab.directory / f"run-{name}"
        self.node_socket = self.run_dir / "node.sock"
        self.workloads: list[Workload] = []
        self.twins: list[Sandbox] = []
        self.agent: subprocess.Popen[bytes] | None = None
        self.agent_options: list[str] = []
        """More options of `uproxy node`."""
        self.agent_within: list[str] = []
        """The command that it is started by, if it is to be restricted."""
        self._agent_log = lab.directory / f"{name}.node.log"

    def workload(self, name: str, app: App, **options: Any) -> Workload:
        """Declare a workload; `Lab.start` starts it. `options`: see WorkloadOptions."""
        number = len(self.workloads) + 10
        address = f"fd96:0:0:{self.index}::{number}" if options.get("ipv6") else f"10.96.{self.index}.{number}"
        made = Workload(self, name, app, address, WorkloadOptions(**options))
        self.workloads.append(made)
        return made

    def twin(self, name: str) -> Sandbox:
        """Make a place that is outside of the mesh."""
        box = self.place(name, f"{_TWIN_RANGE}.{self.index}.{len(self.twins) + 10}")
        self.twins.append(box)
        return box

    def place(self, name: str, address: str) -> Sandbox:
        """Make a namespace with the same plumbing as a workload's and no uProxy in it."""
        box = Sandbox.below(self.cgroup_root, self.lab.names.cgroup.parent, name, [address])
        with self.entered():
            sandbox.build(box)
        with entered(box.netns_path):
            congestion.use_cubic()
        return box

    @contextmanager
    def entered(self) -> Iterator[None]:
        with entered(sandbox.NETNS_DIR / self.netns):
            yield

    def spawn(
        self,
        argv: Sequence[str],
        *,
        stdin: int | IO[bytes] = subprocess.DEVNULL,
        stdout: int | IO[bytes] = subprocess.DEVNULL,
        stderr: int | IO[bytes] | None = None,
    ) -> subprocess.Popen[bytes]:
        """A process on this host, which dies with the lab."""
        return self.lab.spawn(argv, sandbox.NETNS_DIR / self.netns, stdin=stdin, stdout=stdout, stderr=stderr)

    def start_agent(self) -> None:
        """Start `uproxy node`; return at once."""
        self.run_dir.mkdir(exist_ok=True)
        arguments = ["--name", self.lab.names.node(self.name), *self.lab.source.node_arguments(self)]
        arguments += ["--run-dir", str(self.run_dir), "--mesh-cidr", *MESH_RANGES, *self.agent_options]
        with open(self._agent_log, "ab") as log:
            argv = [*self.agent_within, sys.executable, "-I", "-m", "uproxy", "node", *arguments]
            self.agent = self.spawn(argv, stdout=log, stderr=log)

    def agent_running(self) -> bool:
        """Whether it answers. Raises LabError when it gave up."""
        assert self.agent is not None
        if self.agent.poll() is not None:
            raise LabError(f"`uproxy node` on {self.name} ended with {self.agent.returncode}:\n{tail(self._agent_log)}")
        try:
            return self.node_socket.is_socket() and bool(self.node().status())
        except (NodeError, OSError):
            return False

    def node(self) -> NodeClient:
        return NodeClient(self.node_socket)

    def logs(self) -> str:
        return tail(self._agent_log)


class Lab:
    """See the module. Everything it makes bears `names`."""

    def __init__(self, *, control: bool = False) -> None:
        """`control`: configuration and identities come from a control plane in the lab, else from files."""
        self.names = LabNames(secrets.token_hex(3))
        self.directory = self.names.directory
        self.hosts: list[Host] = []
        self.underlay = self.names.netns("net")
        self.control = ControlPlane(self, _underlay_address(_CONTROL_INDEX)) if control else None
        self.source: Source = self.control or Files(self)
        self._resources = ""
        self._started = False
        self._reaper: subprocess.Popen[bytes] | None = None
        self._spawned: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Lab:
        if os.geteuid() != 0:
            raise LabError("the lab needs root: it makes network namespaces and cgroups and loads eBPF")
        remains.sweep_dead()
        self.names.claim()
        owner = Owner.of(os.getpid())
        self._reaper = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.lab.remains", self.names.lab_id, str(owner.pid), owner.started],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            # Out of reach of what is sent to the owner's process group.
            start_new_session=True,
        )
        try:
            (self.names.cgroup / "lab").mkdir(parents=True)
            sandbox.run_ip([f"netns add {self.underlay}"])
            sandbox.run_ip(
                ["link set lo up", "link add br0 type bridge mcast_snooping 0", "link set br0 up"],
                netns=self.underlay,
            )
            if self.control is not None:
                self._attach(self.control.netns, "control", _addresses(_CONTROL_INDEX))
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Remove the lab. Quick and certain (SIGKILL): how the product ends in order has tests of its own."""
        remains.sweep(self.names)
        for process in self._spawned:
            process.wait()
            for pipe in (process.stdin, process.stdout, process.stderr):
                if pipe is not None:
                    with suppress(OSError):  # a buffered job that nobody reads any more
                        pipe.close()
        self._spawned.clear()
        if self._reaper is not None:
            self._reaper.kill()
            self._reaper.wait()

    def host(self, name: str) -> Host:
        """Add a machine to the underlay."""
        made = Host(self, name, len(self.hosts) + 1)
        others = [other.netns for other in self.hosts] + ([self.control.netns] if self.control is not None else [])
        for netns in others:
            sandbox.run_ip(_routes(made), netns=netns)
        routes = [route for other in self.hosts for route in _routes(other)]
        self._attach(made.netns, name, [*_addresses(made.index), *routes])
        with made.entered():
            sandbox.write_sysctls({"net/ipv4/ip_forward": "1"})
            if sandbox.has_ipv6():
                sandbox.write_sysctls({"net/ipv6/conf/all/forwarding": "1"})
        self.hosts.append(made)
        return made

    def _attach(self, netns: str, port: str, commands: Sequence[str]) -> None:
        """Make a namespace with an eth0 on the underlay's bridge, and run `ip` commands in it."""
        sandbox.run_ip([f"netns add {netns}"])
        sandbox.run_ip(
            [f"link add name {port} type veth peer name eth0 netns {netns}", f"link set dev {port} master br0 up"],
            netns=self.underlay,
        )
        sandbox.run_ip(["link set dev lo up", "link set dev eth0 up", *commands], netns=netns)

    def workloads(self) -> list[Workload]:
        return [workload for host in self.hosts for workload in host.workloads]

    def configure(self, resources: str) -> None:
        """Set the mesh's resources but for WorkloadEntries, which the lab writes. Takes effect live once it runs."""
        self._resources = resources
        if self._started:
            self._configure()

    def _configure(self) -> None:
        given = [self._resources] if self._resources else []
        self.source.configure([*map(sources.entry, self.workloads()), *given])

    def issue(self, identity: SpiffeId, directory: Path, ttl_s: int = 24 * 3600) -> None:
        """An identity made by hand with the mesh's CA."""
        sources.issue(self.source.authority(), identity, directory, ttl_s)

    def start(self, progress: Callable[[str], None] = lambda line: None) -> None:
        """Start the agents, then every workload, and return when all serve."""
        programs = {workload.app.program for workload in self.workloads()}
        missing = [program for program in programs if shutil.which(program, path=PATH) is None]
        if missing:
            raise LabError(f"the lab's workloads need programs that are not installed: {', '.join(sorted(missing))}")
        self.source.start(progress)
        self._started = True
        self._configure()
        for host in self.hosts:
            host.start_agent()
        self.wait([host.agent_running for host in self.hosts], _NODE_TIMEOUT_S, "the node agents")
        progress("the node agents hold the maps")
        for workload in self.workloads():
            workload.launch()
        self.wait([workload.running for workload in self.workloads()], _START_TIMEOUT_S, "the workloads")
        progress(f"running: {', '.join(workload.name for workload in self.workloads())}")

    def spawn(self, argv: Sequence[str], netns: Path, cgroup: str = "lab", **streams: Any) -> subprocess.Popen[bytes]:
        """A process in a namespace of the lab, which dies with the lab. `cgroup`: which of the lab's it is in."""
        with _opened(netns) as fd:
            enter = Entrance(self.names.cgroup / cgroup, fd)
            environment = {**os.environ, "PATH": PATH}
            process = subprocess.Popen(argv, cwd="/", env=environment, preexec_fn=enter, **streams)
        self._spawned.append(process)
        return process

    def wait(self, conditions: Sequence[Callable[[], bool]], timeout_s: float, what: str) -> None:
        """Until all are so. Raises LabError, with the logs, when they do not become so in time."""
        deadline = time.monotonic() + timeout_s
        while not all(condition() for condition in conditions):
            if time.monotonic() > deadline:
                raise LabError(f"{what} did not start within {timeout_s:.0f} s:\n{self.logs()}")
            time.sleep(_POLL_S)

    def logs(self) -> str:
        return self.source.logs() + "".join(
            [host.logs() for host in self.hosts] + [workload.logs() for workload in self.workloads()]
        )


def _underlay_address(index: int) -> str:
    return f"10.95.0.{index}"


def _addresses(index: int) -> list[str]:
    """A machine's own, on the underlay."""
    ours = [f"address add {_underlay_address(index)}/24 dev eth0"]
    return ours + ([f"address add fd95::{index}/64 dev eth0 nodad"] if sandbox.has_ipv6() else [])


def _routes(host: Host) -> list[str]:
    """How the other hosts reach what is on this one."""
    routes = [
        f"route add 10.96.{host.index}.0/24 via {host.underlay_address}",
        f"route add {_TWIN_RANGE}.{host.index}.0/24 via {host.underlay_address}",
    ]
    return routes + ([f"route add fd96:0:0:{host.index}::/64 via fd95::{host.index}"] if sandbox.has_ipv6() else [])


@contextmanager
def entered(netns: Path) -> Iterator[None]:
    """This thread in a network namespace."""
    with _opened(netns) as fd, linux.inside(fd):
        yield


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def tail(path: Path, lines: int = 15) -> str:
    """The last lines of a log, headed by its name; nothing of one that does not exist."""
    if not path.exists():
        return ""
    kept = path.read_text(errors="replace").splitlines()[-lines:]
    return f"--- {path.name}\n" + "".join(f"{line}\n" for line in kept)
