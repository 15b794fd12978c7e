"""Health probes: what a prober's cgroup dials is let in, at declared ports only, and nothing of it is left."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest

from bpf import layout, libbpf
from bpf.loader import PROBE_HOOK
from bpf.maps import Admission
from control.api.address import packed16
from tests.bpf.dialling import dial, disconnect
from tests.support import capture
from tests.support.capture import PEER_V4, PEER_V6, WORKLOAD_V4, WORKLOAD_V6, background, listening, run_inside
from uproxy.node.places import NetworkNamespace

pytestmark = pytest.mark.root
ADDRESSES = [WORKLOAD_V4, WORKLOAD_V6]
PORT, OTHER_PORT = 8086, 8087
_Result = TypeVar("_Result")


@pytest.fixture(scope="module")
def prober(shared_rig) -> Path:
    """A cgroup whose connections are admitted."""
    directory = shared_rig.site.directory / "prober"
    (directory / "below").mkdir(parents=True)
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    with shared_rig.loader.program(PROBE_HOOK).attach_cgroup(fd):
        os.close(fd)
        yield directory
    for path in (directory / "below", directory):
        path.rmdir()


@pytest.fixture
def declared(rig):
    cookie = NetworkNamespace.of(rig.site.netns).cookie
    for address in ADDRESSES:
        rig.maps.probe_ports.put(packed16(address), PORT, cookie)
    yield
    for address in ADDRESSES:
        rig.maps.probe_ports.delete(packed16(address), PORT)
    assert eventually_none(rig)


@pytest.fixture
def app(rig):
    ends = [(address, port) for address in ("0.0.0.0", "::") for port in (PORT, OTHER_PORT)]
    with listening(rig.site.netns, rig.site.app, ends, lambda _: b"healthy"):
        yield


def eventually_none(rig) -> bool:
    deadline = time.monotonic() + 5
    while len(rig.maps.admitted) and time.monotonic() < deadline:
        time.sleep(0.01)
    return len(rig.maps.admitted) == 0


@pytest.fixture
def probe(rig, prober) -> Callable[[Callable[[], _Result]], _Result]:
    """Runs a function as the prober does, on the other side of the wire."""
    return lambda function: run_inside(rig.site.peer, prober, function)


@pytest.mark.parametrize("address", ADDRESSES)
def test_a_probe_is_let_in_and_the_same_from_elsewhere_is_not(rig, counted, declared, app, probe, address):
    assert probe(lambda: dial(address, PORT)) == b"healthy"
    assert counted() == {"admitted_syn": 1}
    with pytest.raises(ConnectionRefusedError):
        rig.site.at_peer(lambda: dial(address, PORT))
    assert counted(drops=True) == {"admitted_syn": 1, "dropped_syn": 1}


@pytest.mark.parametrize("address", ADDRESSES)
def test_only_declared_ports_are_open_to_probes(rig, counted, declared, app, probe, address):
    with pytest.raises(ConnectionRefusedError):
        probe(lambda: dial(address, OTHER_PORT))
    assert counted(drops=True) == {"dropped_syn": 1}


def test_a_probe_from_below_the_cgroup_is_let_in(rig, declared, app, prober):
    assert run_inside(rig.site.peer, prober / "below", lambda: dial(WORKLOAD_V4, PORT)) == b"healthy"


def test_a_v4_mapped_probe_is_let_in(declared, app, probe):
    assert probe(lambda: dial(f"::ffff:{WORKLOAD_V4}", PORT, family=socket.AF_INET6)) == b"healthy"


def listen_to_one(held: list[socket.socket]) -> None:
    """A listener that accepts nobody: one connection fits its queue, and the SYNs of others are lost."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((WORKLOAD_V4, PORT))
    listener.listen(0)
    held.append(listener)


def test_what_is_admitted_is_the_one_connection_until_it_is_there(rig, declared, probe):
    held: list[socket.socket] = []

    def look() -> tuple[dict, tuple[str, int]]:
        with socket.create_connection((WORKLOAD_V4, PORT), timeout=5), socket.socket() as waiting:
            waiting.setblocking(False)
            waiting.connect_ex((WORKLOAD_V4, PORT))
            return rig.maps.admitted.items(), waiting.getsockname()

    with background(rig.site.netns, rig.site.app, lambda: time.sleep(60), lambda: listen_to_one(held)):
        entries, (address, port) = probe(look)
    ((connection, (since, kind)),) = entries.items()
    assert connection.source == (packed16(capture.parse_address(address)), port)
    assert connection.destination == (packed16(WORKLOAD_V4), PORT)
    assert connection.netns_cookie == NetworkNamespace.of(rig.site.netns).cookie
    assert kind is Admission.PROBE
    assert 0 < time.monotonic_ns() - since < 10**10


@pytest.mark.parametrize("source", [PEER_V4, PEER_V6])
def test_the_source_port_of_a_probe_is_worth_nothing_to_others(rig, declared, app, probe, source):
    """Before it is dialled, and after it is closed."""
    v6 = ":" in source
    target = WORKLOAD_V6 if v6 else WORKLOAD_V4

    def from_port() -> bytes:
        with socket.socket(socket.AF_INET6 if v6 else socket.AF_INET) as sock:
            sock.settimeout(5)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sock.bind((source, 43000))
            sock.connect((target, PORT))
            return sock.recv(16)

    for _ in range(3):
        with pytest.raises(ConnectionRefusedError):
            rig.site.at_peer(from_port)
        assert probe(from_port) == b"healthy"


def test_a_socket_that_probed_is_no_key_to_another_port(declared, app, probe):
    """connect(probe port) → connect(AF_UNSPEC) → connect(another port) on the same socket."""

    def again() -> str:
        with socket.socket() as sock:
            sock.settimeout(5)
            sock.connect((WORKLOAD_V4, PORT))
            disconnect(sock)
            try:
                sock.connect((WORKLOAD_V4, OTHER_PORT))
            except ConnectionRefusedError:
                return "refused"
            return "let in"

    assert probe(again) == "refused"


def test_with_nobody_listening_a_probe_is_refused_and_nothing_is_left(rig, declared, probe):
    for _ in range(50):
        with pytest.raises(ConnectionRefusedError):
            probe(lambda: dial(WORKLOAD_V4, PORT))
    assert len(rig.maps.admitted) == 0


def test_sigkill_before_the_handshake_ends_leaves_nothing(rig, declared, prober):
    held: list[socket.socket] = []

    def start() -> None:
        for _ in range(8):
            sock = socket.socket()
            sock.setblocking(False)
            sock.connect_ex((WORKLOAD_V4, PORT))
            held.append(sock)
        time.sleep(0.1)

    with background(rig.site.netns, rig.site.app, lambda: time.sleep(60), lambda: listen_to_one(held)):
        with background(rig.site.peer, prober, signal.pause, start) as child:
            assert len(rig.maps.admitted) == 7, "the first is there"
            os.kill(child, signal.SIGKILL)
        assert eventually_none(rig)


def test_two_thousand_probes_leave_nothing(rig, counted, declared, app, probe):
    def many() -> int:
        return sum(dial(ADDRESSES[number % 2], PORT) == b"healthy" for number in range(2000))

    assert probe(many) == 2000
    assert eventually_none(rig)
    assert counted() == {"admitted_syn": 2000}


def test_a_full_map_refuses_and_evicts_nobody(rig, counted, declared, app, probe):
    keys = [layout.pack("mesh_admitted_key", netns_cookie=1, source_port=n % 65536) for n in range(65536)]
    value = bytes(layout.sizeof("struct mesh_admitted"))
    try:
        for key in keys:
            libbpf.update(rig.maps.admitted.fd, key, value)
        with pytest.raises(ConnectionRefusedError):
            probe(lambda: dial(WORKLOAD_V4, PORT))
        assert counted(drops=True) == {"probe_unadmitted": 1, "dropped_syn": 1}
    finally:
        for key in keys:
            with contextlib.suppress(OSError):
                libbpf.delete(rig.maps.admitted.fd, key)
