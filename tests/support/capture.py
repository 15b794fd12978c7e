"""One workload under capture, with a stand-in for its uProxy: real namespaces, cgroups, programs and connections.

Code runs inside through forked children. Everything is named after this process and removed with it; what a killed run
left is swept by the next one.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import functools
import ipaddress
import itertools
import os
import pickle
import secrets
import selectors
import signal
import socket
import subprocess
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from bpf import bpffs, layout
from bpf.loader import Loader
from bpf.maps import Maps, RangeKind, Route, Settings, Target
from control.api.address import IpAddress, packed16, parse_address
from uproxy import cgroup, linux
from uproxy.node.places import Cgroup, NetworkNamespace
from uproxy.node.workloads import Registration, Workloads

PREFIX = "uproxy-test"
_LOCKS = Path("/run/uproxy-test")
_CHILD_TIMEOUT_S = 90  # an emulator is a twentieth as fast
_numbers = itertools.count()
_Result = TypeVar("_Result")

WORKLOAD_V4, WORKLOAD_V6 = parse_address("10.99.0.2"), parse_address("fd99::2")
PEER_V4, PEER_V6 = "10.99.0.1", "fd99::1"
OUTSIDE_V4, OUTSIDE_V6 = "192.0.2.1", "2001:db8::1"
EXCLUDED_V4 = "10.99.5.1"
VIP_V4, VIP_V6 = parse_address("240.240.0.10"), parse_address("fd75:5072:6f78::10")
KNOWN_V4, KNOWN_V6 = parse_address("10.99.0.9"), parse_address("fd99::9")
UNKNOWN_V4, UNKNOWN_V6 = "240.240.0.11", "fd75:5072:6f78::11"
PORT = 80
SERVICE, WORKLOAD = Target(77, Route.TUNNEL), Target(99, Route.TUNNEL)
RANGES = {
    "240.240.0.0/16": RangeKind.MESH,
    "10.99.0.0/16": RangeKind.MESH,
    "fd99::/64": RangeKind.MESH,
    "fd75:5072:6f78::/112": RangeKind.MESH,
    "10.99.5.0/24": RangeKind.EXCLUDED,
}


@functools.cache
def _token() -> str:
    """Names this process, and shows that it lives: it holds a lock, which is seen from any PID namespace."""
    token = secrets.token_hex(4)
    _LOCKS.mkdir(exist_ok=True)
    fd = os.open(_LOCKS / token, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o600)
    fcntl.flock(fd, fcntl.LOCK_EX)
    atexit.register((_LOCKS / token).unlink, missing_ok=True)
    return token


def unique_name() -> str:
    return f"{PREFIX}-{_token()}-{next(_numbers)}"


def sweep() -> None:
    """Removes what test runs left that are dead now."""
    for lock in _LOCKS.glob("*"):
        with open(lock, "w") as held:
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            for found in cgroup.mount_point().glob(f"{PREFIX}-{lock.name}-*"):
                cgroup.remove(found)
            for found in bpffs.BPFFS.glob(f"uproxy/v*/{PREFIX}-{lock.name}-*"):
                bpffs.remove(found)
            lock.unlink(missing_ok=True)


def run_inside(netns: int | None, directory: Path | None, function: Callable[[], _Result]) -> _Result:
    """The function's result, from a child in the namespace and cgroup, if given. Its exception is raised here."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # the runner's handler would go on with its tests in this child
        signal.alarm(_CHILD_TIMEOUT_S)
        try:
            try:
                _enter(netns, directory)
                outcome: tuple[bool, Any] = (True, function())
            except BaseException as error:
                error.add_note(traceback.format_exc())
                outcome = (False, error)
            with os.fdopen(write, "wb") as out:
                pickle.dump(outcome, out)
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as source:
        raw = source.read()
    os.waitpid(child, 0)
    assert raw, "the child died without an answer"
    ok, value = pickle.loads(raw)
    if not ok:
        raise value
    return value


def _enter(netns: int | None, directory: Path | None) -> None:
    if directory is not None:
        (directory / "cgroup.procs").write_text("0")
    if netns is not None:
        linux.setns(netns)


@contextlib.contextmanager
def background(
    netns: int, directory: Path | None, function: Callable[[], None], ready: Callable[[], Any]
) -> Iterator[int]:
    """A child in the namespace and cgroup: `ready` makes what it needs, then `function` runs until the end.

    Gives the child's pid. Killed at the end.
    """
    read, write = os.pipe()
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            linux.die_with_parent(parent)
            _enter(netns, directory)
            ready()
            os.write(write, b"ready")
            os.close(write)
            function()
            status = 0
        except BaseException:
            traceback.print_exc()
        os._exit(status)
    os.close(write)
    try:
        assert os.read(read, 8) == b"ready", "the child did not become ready"
        yield child
    finally:
        os.close(read)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@contextlib.contextmanager
def listening(
    netns: int, directory: Path | None, ends: Sequence[tuple[str, int]], answer: Callable[[socket.socket], bytes]
) -> Iterator[int]:
    """TCP listeners whose every connection gets an answer and is closed when the peer has closed."""
    listeners: list[socket.socket] = []

    def ready() -> None:
        for address, port in ends:
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            listener = socket.socket(family)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            listener.bind((address, port))
            listener.listen(512)
            listeners.append(listener)

    def serve() -> None:
        with selectors.DefaultSelector() as selector:
            for listener in listeners:
                selector.register(listener, selectors.EVENT_READ)
            while True:
                for event, _ in selector.select():
                    sock = event.fileobj
                    assert isinstance(sock, socket.socket)
                    if sock in listeners:
                        connection, _ = sock.accept()
                        with contextlib.suppress(OSError):
                            connection.sendall(answer(connection))
                        selector.register(connection, selectors.EVENT_READ)
                        continue
                    with contextlib.suppress(OSError):
                        if sock.recv(65536):
                            continue
                    selector.unregister(sock)
                    sock.close()

    with background(netns, directory, serve, ready) as child:
        yield child


NOT_CAPTURED = b"not captured"


def original_destination(connection: socket.socket) -> bytes:
    """What a uProxy learns: the 64 bytes."""
    level = socket.IPPROTO_IPV6 if connection.family == socket.AF_INET6 else socket.IPPROTO_IP
    try:
        return connection.getsockopt(level, 80, 64)
    except OSError:
        return NOT_CAPTURED


@dataclass(frozen=True)
class Site:
    """A workload's namespace and cgroups, and the namespace of a neighbour it is wired to."""

    name: str
    netns: int
    peer: int
    directory: Path

    @property
    def app(self) -> Path:
        return self.directory / "app"

    @property
    def proxy(self) -> Path:
        return self.directory / "proxy"

    def in_app(self, function: Callable[[], _Result]) -> _Result:
        return run_inside(self.netns, self.app, function)

    def in_proxy(self, function: Callable[[], _Result]) -> _Result:
        return run_inside(self.netns, self.proxy, function)

    def at_peer(self, function: Callable[[], _Result]) -> _Result:
        return run_inside(self.peer, None, function)

    def uproxy(self) -> contextlib.AbstractContextManager[int]:
        """A stand-in for the uProxy, which tells its caller what it learnt."""
        return listening(self.netns, self.proxy, [("127.0.0.1", 15001), ("::1", 15001)], original_destination)

    def outside(self, *ports: int) -> contextlib.AbstractContextManager[int]:
        """Listeners at every address of the neighbour; they answer `outside`."""
        addresses = (PEER_V4, PEER_V6, OUTSIDE_V4, OUTSIDE_V6, EXCLUDED_V4)
        ends = [(address, port) for address in addresses for port in ports or (PORT,)]
        return listening(self.peer, None, ends, lambda _: b"outside")

    @contextlib.contextmanager
    def registration(
        self, name: str = "", addresses: tuple[IpAddress, ...] = (WORKLOAD_V4, WORKLOAD_V6)
    ) -> Iterator[Registration]:
        with _directory(self.app) as app, _directory(self.proxy) as proxy:
            yield Registration(
                name or self.name,
                addresses,
                Cgroup.of(app, "app cgroup"),
                Cgroup.of(proxy, "proxy cgroup"),
                NetworkNamespace.of(self.netns),
            )


@contextlib.contextmanager
def _directory(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def site() -> Iterator[Site]:
    """Two wired namespaces and two cgroups."""
    name = unique_name()
    directory = cgroup.mount_point() / name
    with contextlib.ExitStack() as stack:
        netns, peer = (stack.enter_context(namespace()) for _ in range(2))
        stack.callback(cgroup.remove, directory)
        for child in ("app", "proxy"):
            (directory / child).mkdir(parents=True)
        _wire(netns, peer)
        yield Site(name, netns.fd, peer.fd, directory)


@dataclass(frozen=True)
class Namespace:
    pid: int
    fd: int


@contextlib.contextmanager
def namespace() -> Iterator[Namespace]:
    """A network namespace that lives as long as a child which does nothing else."""
    home = os.open("/proc/self/ns/net", os.O_RDONLY)

    def wait() -> None:
        while True:
            signal.pause()

    try:
        with background(home, None, wait, lambda: linux.unshare(linux.CLONE_NEWNET)) as pid:
            fd = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY)
            try:
                yield Namespace(pid, fd)
            finally:
                os.close(fd)
    finally:
        os.close(home)


def _wire(netns: Namespace, peer: Namespace) -> None:
    ours = f"""
        link set lo up
        link add w0 type veth peer name p0 netns {peer.pid}
        link set w0 up
        address add {WORKLOAD_V4}/16 dev w0
        address add {WORKLOAD_V6}/64 dev w0 nodad
        route add default via {PEER_V4}
    """
    theirs = f"""
        link set lo up
        link set p0 up
        address add {PEER_V4}/16 dev p0
        address add {PEER_V6}/64 dev p0 nodad
        address add {OUTSIDE_V4}/32 dev lo
        address add {OUTSIDE_V6}/128 dev lo nodad
        address add {EXCLUDED_V4}/32 dev lo
    """
    for namespace, commands in ((netns, ours), (peer, theirs)):
        run_inside(namespace.fd, None, lambda commands=commands: ip(commands))
    run_inside(netns.fd, None, lambda: ip(f"-6 route add default via {PEER_V6}"))


def ip(commands: str) -> None:
    for line in filter(None, map(str.strip, commands.splitlines())):
        subprocess.run(["ip", *line.split()], check=True, capture_output=True)


@contextlib.contextmanager
def pins(name: str = "", schema: int = layout.SCHEMA) -> Iterator[Path]:
    """A node's pin directory of its own."""
    bpffs.mount()
    directory = bpffs.node_directory(name or unique_name(), schema=schema)
    try:
        yield directory
    finally:
        bpffs.remove(directory)


def fill(maps: Maps, *, whole: bool = True) -> None:
    """The ranges, one service and one workload of the constants above; whatever was there before is gone."""
    for address, bits in maps.ranges.items():
        maps.ranges.delete(address, bits)
    for targets in (maps.services, maps.workloads, maps.datagrams):
        for key in targets.items():
            targets.delete(key)
    for answering in maps.answering.items():
        maps.answering.delete(*answering)
    for text, kind in RANGES.items():
        network = ipaddress.ip_network(text)
        bits = network.prefixlen + (96 if network.version == 4 else 0)
        maps.ranges.put(packed16(IpAddress(str(network.network_address))), bits, kind)
    for vip in (VIP_V4, VIP_V6):
        maps.services.put((packed16(vip), PORT), SERVICE, 5)
    for address in (KNOWN_V4, KNOWN_V6):
        maps.workloads.put((packed16(address), 0), WORKLOAD, 6)
    maps.settings.write(Settings(9, whole))


@dataclass(frozen=True)
class Rig:
    """A captured workload."""

    site: Site
    loader: Loader
    workloads: Workloads
    pins: Path

    @property
    def maps(self) -> Maps:
        return self.loader.maps


@contextlib.contextmanager
def rig() -> Iterator[Rig]:
    with site() as where, pins() as directory, Loader(directory / "maps") as loader:
        fill(loader.maps)
        workloads = Workloads(loader, directory / "links")
        with where.registration() as registration:
            workloads.register(registration)
        yield Rig(where, loader, workloads, directory)
