"""What is recorded of a direct connection when it closes: each once, with its bytes; what is lost is counted."""

from __future__ import annotations

import itertools
import mmap
import os
import select
import socket
import struct
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress

import pytest

from bpf import libbpf
from bpf.flows import RECORD, End, Flow, Flows
from bpf.loader import Loader
from bpf.ringbuf import Ring
from control.api.address import packed16
from tests.bpf.dialling import connected, dial, disconnect
from tests.bpf.test_direct import APP_PORT, declare_bob, serving
from tests.support import capture
from tests.support.capture import PORT, SERVICE, VIP_V4, background
from tests.support.neighbours import Host

pytestmark = pytest.mark.root

Act = Callable[[socket.socket], None]
_ports = itertools.count(9000)


def read_all(sock: socket.socket) -> int:
    """Bytes until the end of the stream."""
    return sum(iter(lambda: len(sock.recv(65536)), 0))


def abort(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def talk(host: Host, client: Act, server: Act) -> Flow:
    """One connection, with what each end does on its socket; its record."""
    port = next(_ports)
    listeners: list[socket.socket] = []

    def ready() -> None:
        listener = socket.create_server(("0.0.0.0", port))
        listeners.append(listener)

    def serve() -> None:
        accepted, _ = listeners[0].accept()
        accepted.settimeout(5)
        with accepted, suppress(OSError):
            server(accepted)
        time.sleep(5)

    def act() -> None:
        with connected(host.bob.v4, port) as sock, suppress(OSError):
            client(sock)

    host.grant(host.alice, host.bob, port)
    with background(host.bob.site.netns, host.bob.site.app, serve, ready):
        host.alice.site.in_app(act)
        (flow,) = host.flows()
    assert host.maps.flows.drain() == []
    return flow


def client_closes(sock: socket.socket) -> None:
    """After both have said what they had to say, at once."""
    sock.sendall(bytes(1000))
    assert len(sock.recv(300, socket.MSG_WAITALL)) == 300


def server_reads_on(sock: socket.socket) -> None:
    sock.sendall(bytes(300))
    read_all(sock)


def client_half_closes(sock: socket.socket) -> None:
    sock.sendall(bytes(1000))
    sock.shutdown(socket.SHUT_WR)
    read_all(sock)


def server_answers_the_end(sock: socket.socket) -> None:
    sock.sendall(bytes(300))
    assert read_all(sock) == 1000


def server_closes(sock: socket.socket) -> None:
    assert len(sock.recv(1000, socket.MSG_WAITALL)) == 1000
    sock.sendall(bytes(300))


def client_reads_on(sock: socket.socket) -> None:
    sock.sendall(bytes(1000))
    assert read_all(sock) == 300


def server_aborts(sock: socket.socket) -> None:
    server_closes(sock)
    time.sleep(0.1)
    abort(sock)


def client_aborts(sock: socket.socket) -> None:
    client_closes(sock)
    time.sleep(0.1)
    abort(sock)


def client_waits(sock: socket.socket) -> None:
    client_closes(sock)
    sock.recv(1)


@pytest.mark.parametrize(
    ("client", "server", "end"),
    [
        (client_closes, server_reads_on, End.CLOSED),
        (client_half_closes, server_answers_the_end, End.CLOSED),
        (client_reads_on, server_closes, End.CLOSED),
        (client_waits, server_aborts, End.RESET),
        (client_aborts, server_reads_on, End.RESET),
    ],
)
def test_every_byte_is_counted_however_it_ends(host: Host, client: Act, server: Act, end: End):
    flow = talk(host, client, server)
    assert (flow.sent, flow.received, flow.end) == (1000, 300, end)


def test_nobody_is_woken_by_a_record(host: Host):
    """It waits for who looks for it now and then: a wake-up for each connection would cost more than the record."""
    host.grant(host.alice, host.bob, APP_PORT)
    written = host.maps.flows._ring._producer
    before = written[:8]
    with select.epoll() as epoll, serving(host.bob):
        epoll.register(host.maps.fds["flows"], select.EPOLLIN)  # looked at now, and from then on only if it wakes
        host.alice.site.in_app(lambda: dial(host.bob.v4, APP_PORT))
        deadline = time.monotonic() + 5
        while written[:8] == before and time.monotonic() < deadline:
            time.sleep(0.01)
        assert written[:8] != before
        assert epoll.poll(0) == []
    assert len(host.flows()) == 1


def test_nothing_said_is_nothing_counted(host: Host):
    flow = talk(host, lambda _: None, read_all)
    assert (flow.sent, flow.received, flow.end) == (0, 0, End.CLOSED)
    flow = talk(host, read_all, lambda _: None)
    assert (flow.sent, flow.received, flow.end) == (0, 0, End.CLOSED)


def test_a_large_transfer_is_counted(host: Host):
    size = 300 << 20

    def send(sock: socket.socket) -> None:
        piece = memoryview(bytes(1 << 20))
        for _ in range(size >> 20):
            sock.sendall(piece)

    flow = talk(host, send, read_all)
    assert (flow.sent, flow.received) == (size, 0)


def test_who_and_where_and_how_long(host: Host):
    host.grant(host.alice, host.bob, APP_PORT)
    declare_bob(host, VIP_V4)

    def linger() -> tuple[str, int]:
        with connected(VIP_V4) as sock:
            sock.recv(64)
            time.sleep(0.3)
            return sock.getsockname()

    before = time.monotonic_ns()
    with serving(host.bob):
        name = host.alice.site.in_app(linger)
    (flow,) = host.flows()
    assert (flow.source, flow.source_port) == (packed16(host.alice.v4), name[1])
    assert (flow.target, flow.target_port) == (packed16(host.bob.v4), APP_PORT)
    assert (flow.dialled, flow.dialled_port) == (packed16(capture.VIP_V4), PORT)
    assert (flow.source_cgroup, flow.source_netns) == (host.alice.app_cgroup, host.alice.netns_cookie)
    assert flow.target_netns == host.bob.netns_cookie
    assert (flow.source_id, flow.target_id, flow.service_id) == (host.alice.id, host.bob.id, SERVICE.id)
    assert before < flow.opened_ns < flow.closed_ns < time.monotonic_ns()
    assert 0.3 < (flow.closed_ns - flow.opened_ns) / 1e9 < 2
    assert 0 < flow.srtt_us < 100_000
    assert flow.retransmits == 0


def test_retransmissions_are_counted(host: Host):
    def send_into_the_hole(sock: socket.socket) -> None:
        sock.sendall(b"x")
        sock.recv(1)
        with host.black_hole(host.bob):
            sock.sendall(b"y")
            time.sleep(0.8)
        sock.recv(1)

    def echo(sock: socket.socket) -> None:
        while data := sock.recv(16):
            sock.sendall(data)

    flow = talk(host, send_into_the_hole, echo)
    assert flow.retransmits >= 1
    assert (flow.sent, flow.received) == (2, 2)


def test_a_connection_that_is_never_established_is_recorded_as_such(host: Host):
    host.grant(host.alice, host.bob, APP_PORT)
    with pytest.raises(ConnectionRefusedError):
        host.alice.site.in_app(lambda: dial(host.bob.v4, APP_PORT))
    (flow,) = host.flows()
    assert (flow.end, flow.sent, flow.received) == (End.FAILED, 0, 0)


def test_a_connection_that_is_killed_is_recorded(host: Host):
    """As the node agent does when a policy changes: SOCK_DESTROY."""
    host.grant(host.alice, host.bob, APP_PORT)

    def be_killed() -> None:
        with connected(host.bob.v4, APP_PORT) as sock:
            sock.recv(64)
            command = ["ss", "--no-header", "--kill", "--tcp", "dst", f"{host.bob.v4}:{APP_PORT}"]
            subprocess.run(command, check=True, capture_output=True)
            sock.recv(64)

    with serving(host.bob), pytest.raises(ConnectionAbortedError):
        host.alice.site.in_app(be_killed)
    (flow,) = host.flows()
    assert (flow.end, flow.received) == (End.RESET, 3)
    assert all(grant.suspended_ns == 0 for grant in host.maps.grants.items().values())


def test_one_record_for_each_connection_of_one_socket(host: Host):
    """AF_UNSPEC makes a socket as new; it may even listen then, and close twice."""
    host.grant(host.alice, host.bob, APP_PORT)

    def use_again() -> None:
        with socket.socket() as sock:
            for _ in range(3):
                sock.connect((host.bob.v4, APP_PORT))
                sock.recv(64)
                disconnect(sock)
            sock.listen()

    with serving(host.bob):
        host.alice.site.in_app(use_again)
    assert len(host.flows(3)) == 3
    time.sleep(0.1)
    assert host.maps.flows.drain() == []


def test_connections_that_are_not_direct_are_not_recorded(host: Host):
    with host.alice.site.uproxy():
        host.alice.site.in_app(lambda: dial(VIP_V4))
    assert host.maps.flows.drain() == []


def many(host: Host, count: int) -> None:
    """So many direct connections, one after the other."""

    def run() -> None:
        for _ in range(count):
            with socket.socket() as sock:
                sock.connect((host.bob.v4, APP_PORT))
                sock.recv(64)

    host.alice.site.in_app(run)


@pytest.mark.soak  # thousands of connections
def test_under_load_every_connection_has_one_record_and_overruns_are_counted(host: Host, counted):
    """A reader that sleeps: the ring keeps the oldest, and tells how many it had no room for."""
    host.grant(host.alice, host.bob, APP_PORT)
    room = libbpf.map_capacity(host.maps.fds["flows"]) // (RECORD.size + 8)
    dialled = room + 500
    with serving(host.bob):
        many(host, dialled)
        deadline = time.monotonic() + 5
        while counted().get("flows_lost", 0) < dialled - room and time.monotonic() < deadline:
            time.sleep(0.05)
        found = host.maps.flows.drain()
        assert len(found) + counted()["flows_lost"] == dialled
        assert len(found) == room
        many(host, 100)
        found += host.flows(100)
    assert len(found) + counted()["flows_lost"] == dialled + 100
    assert len({(flow.opened_ns, flow.source_port) for flow in found}) == len(found)
    assert all((flow.sent, flow.received, flow.end) == (0, 3, End.CLOSED) for flow in found)


@pytest.mark.soak  # thousands of connections
def test_a_reader_beside_a_writer_misses_none(host: Host, counted):
    host.grant(host.alice, host.bob, APP_PORT)
    found: list[Flow] = []
    alice = host.alice.site
    with serving(host.bob), background(alice.netns, alice.app, lambda: many_here(host), lambda: None):
        deadline = time.monotonic() + 20
        while len(found) < 3000 and time.monotonic() < deadline:
            found += host.maps.flows.drain()
    assert len(found) == 3000
    risen = counted()
    risen.pop("dropped_syn", 0)  # an ACK that comes when its connection is over asks for a listener, as a SYN does
    assert risen == {"direct": 3000, "admitted_syn": 3000}
    assert [flow.closed_ns for flow in found] == sorted(flow.closed_ns for flow in found)


def many_here(host: Host) -> None:
    for _ in range(3000):
        with socket.socket() as sock:
            sock.connect((host.bob.v4, APP_PORT))
            sock.recv(64)
    time.sleep(5)


def test_the_next_agent_goes_on_where_the_last_one_read(host: Host):
    host.grant(host.alice, host.bob, APP_PORT)
    with serving(host.bob):
        many(host, 3)
        assert len(host.flows(3)) == 3
        many(host, 2)
    with Loader(host.pins / "maps") as successor:
        deadline = time.monotonic() + 5
        found = successor.maps.flows.drain()
        while len(found) < 2 and time.monotonic() < deadline:
            found += successor.maps.flows.drain()
        assert len(found) == 2
    assert host.maps.flows.drain() == []


class FakeRing:
    """The pages of a ring, in a file, as the kernel would lay them out: what it does seldom can be done here."""

    SIZE = mmap.PAGESIZE
    RECORD = struct.Struct("=QQ")

    def __init__(self) -> None:
        self.fd = os.memfd_create("ring")
        os.ftruncate(self.fd, 2 * mmap.PAGESIZE + 2 * self.SIZE)
        self.produced = 0

    def write(self, *fields: int, busy: bool = False, discarded: bool = False) -> int:
        """Where the record is."""
        header = 16 | busy << 31 | discarded << 30
        at = self.produced % self.SIZE
        raw = struct.pack("=II", header, 0) + self.RECORD.pack(*fields)
        for copy in (at, at + self.SIZE, at - self.SIZE):
            for offset, byte in enumerate(raw):
                if 0 <= copy + offset < 2 * self.SIZE:
                    os.pwrite(self.fd, bytes([byte]), 2 * mmap.PAGESIZE + copy + offset)
        self.produced += len(raw)
        os.pwrite(self.fd, self.produced.to_bytes(8, "little"), mmap.PAGESIZE)
        return at

    def commit(self, at: int) -> None:
        os.pwrite(self.fd, (16).to_bytes(4, "little"), 2 * mmap.PAGESIZE + at)

    @property
    def consumed(self) -> int:
        return int.from_bytes(os.pread(self.fd, 8, 0), "little")


class TestRing:
    @pytest.fixture
    def pages(self):
        pages = FakeRing()
        yield pages
        os.close(pages.fd)

    @pytest.fixture
    def ring(self, pages):
        ring = Ring(pages.fd, pages.SIZE, pages.RECORD)
        yield ring
        ring.close()

    def test_a_record_that_is_being_written_holds_up_what_is_behind_it(self, pages, ring):
        pages.write(1, 1)
        busy = pages.write(2, 2, busy=True)
        pages.write(3, 3)
        assert list(ring.drain()) == [(1, 1)]
        assert list(ring.drain()) == []
        pages.commit(busy)
        assert list(ring.drain()) == [(2, 2), (3, 3)]
        assert pages.consumed == pages.produced

    def test_a_discarded_record_is_passed_over(self, pages, ring):
        pages.write(1, 1, discarded=True)
        pages.write(2, 2)
        assert list(ring.drain()) == [(2, 2)]

    def test_records_wrap_around(self, pages, ring):
        for number in range(1000):
            pages.write(number, number)
            assert list(ring.drain()) == [(number, number)]

    def test_what_is_not_taken_is_there_again(self, pages, ring):
        for number in range(5):
            pages.write(number, 0)
        taken = ring.drain()
        assert [next(taken), next(taken)] == [(0, 0), (1, 0)]
        taken.close()
        assert [number for number, _ in ring.drain()] == [2, 3, 4]

    def test_records_of_an_odd_size_are_refused(self, pages):
        with pytest.raises(ValueError, match="multiple of 8"):
            Ring(pages.fd, pages.SIZE, struct.Struct("=I"))


def test_flows_are_closed_with_the_loader(host: Host):
    fd = host.maps.fds["flows"]
    flows = Flows(fd)
    flows.close()
    with pytest.raises(ValueError, match="closed"):
        flows.drain()
