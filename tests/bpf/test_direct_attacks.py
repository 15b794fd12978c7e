"""Ways to a port that nobody granted: what a workload may try, with root in its namespace or without."""

from __future__ import annotations

import ctypes
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bpf import layout, libbpf
from bpf.flows import End
from bpf.maps import Grant, Pair
from control.api.address import packed16
from tests.bpf.dialling import connected, dial, disconnect
from tests.bpf.test_beside import ALLOW_MULTI, balancer, running_above  # noqa: F401
from tests.bpf.test_direct import APP_PORT, BOB, TUNNELLED, declare_bob, serving
from tests.support import capture
from tests.support.capture import VIP_V4, VIP_V6, listening, run_inside
from tests.support.neighbours import Host, Neighbour
from uproxy import linux

pytestmark = pytest.mark.root

SECRET_PORT = 9999
"""Where bob's application serves something that nobody is granted."""
NOBODY = 65534
TCP_FASTOPEN_CONNECT, IP_FREEBIND, IP_TRANSPARENT = 30, 15, 19  # <linux/tcp.h>, <linux/in.h>


@pytest.fixture(autouse=True)
def bob(host: Host) -> Iterator[Neighbour]:
    """Serves on two ports; alice is granted one, for an hour."""
    host.grant(host.alice, host.bob, APP_PORT, for_ns=3600 * 10**9)
    declare_bob(host, VIP_V4)
    declare_bob(host, VIP_V6)
    with serving(host.bob), serving(host.bob, SECRET_PORT, answer=b"secret"):
        yield host.bob


@contextmanager
def port_of_ones_own(family: int = socket.AF_INET, port: int = 0) -> Iterator[socket.socket]:
    """A socket whose source port is chosen, and free again as soon as it is closed."""
    with socket.socket(family) as sock:
        sock.settimeout(5)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.bind(("", port))
        yield sock


def assert_closed(call: Callable[[], object]) -> None:
    with pytest.raises(ConnectionRefusedError):
        call()


class TestStaleStorage:
    """connect(granted), connect(AF_UNSPEC), connect(elsewhere) on one socket: what was chosen first is forgotten."""

    @pytest.mark.parametrize("first", [VIP_V4, VIP_V6])
    def test_the_backends_other_port(self, host: Host, counted, first):
        def try_it() -> None:
            with socket.socket(socket.AF_INET6 if ":" in first else socket.AF_INET) as sock:
                sock.settimeout(5)
                sock.connect((first, 80))
                assert sock.recv(16) == BOB
                disconnect(sock)
                sock.connect((host.bob.address(first), SECRET_PORT))
                raise AssertionError(sock.recv(16))

        assert_closed(lambda: host.alice.site.in_app(try_it))
        assert counted() == {"direct": 1, "admitted_syn": 1, "captured": 1}

    def test_while_the_first_is_under_way(self, host: Host):
        """Its admission goes with it: the port may be dialled again at once, and by somebody else."""

        def try_it() -> int:
            with host.black_hole(host.bob), socket.socket() as sock:
                sock.setblocking(False)
                sock.connect_ex((host.bob.v4, APP_PORT))
                waiting = len(host.maps.admitted)
                disconnect(sock)
                assert len(host.maps.admitted) == 0
                return waiting

        assert host.alice.site.in_app(try_it) == 1

    def test_what_is_left_alone_afterwards_shows_its_own_peer(self, host: Host):
        def try_it() -> tuple[str, int]:
            with socket.create_server(("127.0.0.1", 0)) as own, socket.socket() as sock:
                sock.connect((VIP_V4, 80))
                disconnect(sock)
                sock.connect(own.getsockname())
                assert sock.getpeername() == own.getsockname()
                return own.getsockname()[0], len(host.flows())

        assert host.alice.site.in_app(try_it) == ("127.0.0.1", 1)
        assert host.maps.flows.drain() == [], "the connection to oneself was recorded"


class TestWhoCalls:
    def test_a_cgroup_below_the_workloads_is_the_workload(self, host: Host, counted):
        below = host.alice.site.app / "below" / "further"
        below.mkdir(parents=True)
        try:
            assert run_inside(host.alice.site.netns, below, lambda: dial(VIP_V4)) == BOB
        finally:
            below.rmdir()
            below.parent.rmdir()
        (flow,) = host.flows()
        assert flow.source_cgroup == host.alice.app_cgroup
        assert counted() == {"direct": 1, "admitted_syn": 1}

    def test_a_socket_from_before_the_cgroup_is_not_let_in(self, host: Host, counted):
        """No program of ours runs for it, so nobody admits it; bob's namespace is closed to it."""

        def try_it() -> bytes:
            with socket.socket() as sock:
                (host.alice.site.app / "cgroup.procs").write_text("0")
                sock.settimeout(5)
                sock.connect((host.bob.v4, APP_PORT))
                return sock.recv(16)

        assert_closed(lambda: run_inside(host.alice.site.netns, None, try_it))
        assert counted(drops=True) == {"dropped_syn": 1}

    @pytest.mark.parametrize("family", ["v4", "v6"])
    def test_the_callers_uproxy_and_the_host_are_not_the_caller(self, host: Host, counted, family):
        target = getattr(host.bob, family)
        assert_closed(lambda: host.alice.site.in_proxy(lambda: dial(target, APP_PORT)))
        assert_closed(lambda: run_inside(host.router, None, lambda: dial(target, APP_PORT)))
        assert counted(drops=True) == {"dropped_syn": 2}

    def test_a_neighbour_that_is_granted_nothing_is_tunnelled(self, host: Host):
        with host.mallory.site.uproxy():
            for address, port in ((host.bob.v4, APP_PORT), (host.bob.v6, APP_PORT), (VIP_V4, 80)):
                answer = host.mallory.site.in_app(lambda a=address, p=port: dial(a, p))
                assert len(answer) == TUNNELLED

    def test_the_workloads_cgroup_in_another_namespace_is_nobody(self, host: Host, counted):
        """A process of alice's that has entered mallory's namespace, or one of its own, has alice's cgroup only."""
        with host.mallory.site.uproxy():
            answer = run_inside(host.mallory.site.netns, host.alice.site.app, lambda: dial(host.bob.v4, APP_PORT))
        assert len(answer) == TUNNELLED
        assert counted() == {"captured": 1}

    def test_the_workloads_namespace_in_another_cgroup_is_nobody(self, host: Host, counted):
        with host.alice.site.uproxy():
            answer = run_inside(host.alice.site.netns, host.mallory.site.app, lambda: dial(host.bob.v4, APP_PORT))
        assert len(answer) == TUNNELLED
        assert counted() == {"captured": 1}

    def test_a_socket_is_the_workloads_in_which_it_was_made(self, host: Host):
        """Whoever is handed it calls as alice: so does whoever is handed a connection of hers."""
        ours, theirs = socket.socketpair(socket.AF_UNIX)

        def make() -> None:
            with socket.socket() as sock:
                socket.send_fds(theirs, [b"x"], [sock.fileno()])

        def use() -> bytes:
            _, (fd,), *_ = socket.recv_fds(ours, 1, 1)
            with socket.socket(fileno=fd) as sock:
                sock.connect((host.bob.v4, APP_PORT))
                return sock.recv(16)

        with ours, theirs:
            host.alice.site.in_app(make)
            assert host.mallory.site.in_app(use) == BOB
        (flow,) = host.flows()
        assert flow.source_cgroup == host.alice.app_cgroup


class TestSource:
    """An address that is not alice's: bob would see a caller who did not call."""

    def as_mallory(self, host: Host, prepare: Callable[[socket.socket], None]) -> None:
        with socket.socket() as sock:
            sock.settimeout(5)
            prepare(sock)
            sock.bind((host.mallory.v4, 0))
            sock.connect((host.bob.v4, APP_PORT))
            raise AssertionError(sock.recv(16))

    def test_without_root_it_cannot_be_bound_or_leads_nowhere(self, host: Host, counted):
        def free_bind(sock: socket.socket) -> None:
            os.setuid(NOBODY)
            sock.setsockopt(socket.IPPROTO_IP, IP_FREEBIND, 1)

        def transparent(sock: socket.socket) -> None:
            os.setuid(NOBODY)
            sock.setsockopt(socket.IPPROTO_IP, IP_TRANSPARENT, 1)

        with pytest.raises(OSError, match=r"refused|unreachable|Invalid|timed out"):
            host.alice.site.in_app(lambda: self.as_mallory(host, free_bind))
        with pytest.raises(PermissionError):
            host.alice.site.in_app(lambda: self.as_mallory(host, transparent))
        assert "admitted_syn" not in counted()
        assert len(host.maps.admitted) == 0

    def test_with_root_it_is_not_admitted(self, host: Host, counted):
        """alice gives herself mallory's address: the kernel would send from it."""

        def usurp(_: socket.socket) -> None:
            capture.ip(f"address replace {host.mallory.v4}/32 dev lo")

        try:
            with pytest.raises((ConnectionRefusedError, TimeoutError)):
                host.alice.site.in_app(lambda: self.as_mallory(host, usurp))
        finally:
            host.alice.site.in_proxy(lambda: capture.ip(f"address del {host.mallory.v4}/32 dev lo"))
        assert counted()["direct_unadmitted"] == 1
        assert "admitted_syn" not in counted()

    @pytest.mark.parametrize("kind", [socket.SOCK_RAW])
    def test_packets_of_ones_own_making_need_a_socket_that_is_refused(self, host: Host, kind):
        def make() -> None:
            socket.socket(socket.AF_INET, kind, socket.IPPROTO_TCP)

        with pytest.raises(PermissionError):
            host.alice.site.in_app(make)


class TestPortReuse:
    """Another connection from the port of a direct one: an admission is for one connection, and ends with it."""

    PORT = 22000  # not one that the kernel chooses by itself

    def of_the_app(self, host: Host) -> None:
        def once() -> None:
            with port_of_ones_own(port=self.PORT) as sock:
                sock.connect((host.bob.v4, APP_PORT))
                assert sock.recv(16) == BOB

        host.alice.site.in_app(once)

    def of_another_cgroup(self, host: Host) -> bytes:
        def once() -> bytes:
            with port_of_ones_own(port=self.PORT) as sock:
                sock.connect((host.bob.v4, APP_PORT))
                return sock.recv(16)

        return host.alice.site.in_proxy(once)

    def test_after_it_has_closed(self, host: Host, counted):
        for _ in range(20):
            self.of_the_app(host)
            assert_closed(lambda: self.of_another_cgroup(host))
        assert counted() == {"direct": 20, "admitted_syn": 20}

    def test_while_it_is_open(self, host: Host):
        """With SO_REUSEADDR two sockets may share a port, to different destinations only."""

        def share() -> None:
            with port_of_ones_own(port=self.PORT) as sock:
                sock.connect((host.bob.v4, APP_PORT))
                assert sock.recv(16) == BOB
                assert len(host.maps.admitted) == 0, "the accept has ended the admission"
                self.of_another_cgroup(host)

        with pytest.raises(OSError, match=r"Address already in use|Cannot assign"):
            host.alice.site.in_app(share)

    def test_after_a_syn_that_was_killed(self, host: Host):
        def die() -> None:
            with port_of_ones_own(port=self.PORT) as sock:
                sock.setblocking(False)
                sock.connect_ex((host.bob.v4, APP_PORT))
                os.write(written, b"x" * len(host.maps.admitted))
                os.kill(os.getpid(), 9)

        read, written = os.pipe()
        with host.black_hole(host.bob), pytest.raises(AssertionError, match="died without an answer"):
            host.alice.site.in_app(die)
        os.close(written)
        assert os.read(read, 8) == b"x", "nothing was admitted: the test proves nothing"
        os.close(read)
        assert len(host.maps.admitted) == 0
        assert_closed(lambda: self.of_another_cgroup(host))

    def test_the_same_port_with_the_server_in_time_wait(self, host: Host):
        ends = [("0.0.0.0", 9100)]

        def close_first(sock: socket.socket) -> bytes:
            sock.shutdown(socket.SHUT_WR)
            return b""

        def once() -> bytes:
            with socket.socket() as sock:
                sock.settimeout(5)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                sock.bind(("", self.PORT + 1))
                sock.connect((host.bob.v4, 9100))
                return sock.recv(16)

        host.grant(host.alice, host.bob, 9100)
        with listening(host.bob.site.netns, host.bob.site.app, ends, close_first):
            for _ in range(5):
                assert host.alice.site.in_app(once) == b""
        assert all(flow.end is End.CLOSED for flow in host.flows(5))
        assert len(host.maps.admitted) == 0


class TestTime:
    def test_a_grant_that_ends_between_connect_and_the_syn(self, host: Host, counted):
        """With TCP_FASTOPEN_CONNECT, connect() only chooses: the SYN leaves with the first byte."""

        def choose_now_and_send_later() -> bytes:
            with socket.socket() as sock:
                sock.settimeout(5)
                sock.setsockopt(socket.IPPROTO_TCP, TCP_FASTOPEN_CONNECT, 1)
                sock.connect((host.bob.v4, APP_PORT))
                for pair in host.maps.grants.items():
                    host.maps.grants.delete(pair)
                sock.sendall(b"hello")
                return sock.recv(16)

        enable = lambda: Path("/proc/sys/net/ipv4/tcp_fastopen").write_text("0x605")  # noqa: E731
        host.alice.site.in_proxy(enable)
        assert_closed(lambda: host.alice.site.in_app(choose_now_and_send_later))
        assert counted(drops=True) == {"direct": 1, "direct_unadmitted": 1, "dropped_syn": 1, "direct_failed": 1}

    @pytest.mark.soak  # how many dials meet a grant depends on how busy the machine is
    @pytest.mark.parametrize("ends", ["deleted", "expired", "suspended", "moved"])
    def test_no_connection_begins_after_its_grant_has_ended(self, host: Host, ends):
        """Dialling as fast as it goes while the grant comes and goes: what was established began while it was there."""
        pair = Pair(host.alice.app_cgroup, packed16(host.bob.v4), APP_PORT)
        grants, own = host.maps.grants, host.bob.netns_cookie
        forever = 2**62
        endings: dict[str, Callable[[], object]] = {
            "deleted": lambda: grants.delete(pair),
            "expired": lambda: grants.put(pair, Grant(1, own, 0, 0)),
            "suspended": lambda: grants.put(pair, Grant(forever, own, 0, 0, suspended_ns=1)),
            "moved": lambda: grants.put(pair, Grant(forever, own + 1, 0, 0)),
        }
        intervals: list[tuple[int, int]] = []
        """[begin, end] of each grant, on the outside of the two writes."""
        stop = threading.Event()

        def come_and_go() -> None:
            while not stop.is_set():
                begin = time.monotonic_ns()
                grants.put(pair, Grant(forever, own, 0, 0))
                time.sleep(0.003)
                endings[ends]()
                intervals.append((begin, time.monotonic_ns()))
                time.sleep(0.002)

        def dial_on() -> int:
            direct = 0
            deadline = time.monotonic() + 2
            while time.monotonic() < deadline and direct < 3000:  # the ring holds 7,000 records
                try:
                    direct += dial(host.bob.v4, APP_PORT) == BOB
                except ConnectionRefusedError:
                    continue
            return direct

        toggling = threading.Thread(target=come_and_go)
        with host.alice.site.uproxy():
            toggling.start()
            try:
                direct = host.alice.site.in_app(dial_on)
            finally:
                stop.set()
                toggling.join()
        flows = [flow for flow in host.flows(direct) if flow.end is not End.FAILED]
        assert len(flows) == direct >= 3
        for flow in flows:
            assert any(begin <= flow.opened_ns <= end for begin, end in intervals), (flow, ends)

    def test_an_admission_that_nobody_took_back_ends_by_itself(self, host: Host):
        """Should the closing callback ever be missed: sk_lookup looks at its age."""
        tuple_ = self.admission(host)
        key, value = tuple_
        old = layout.pack(
            "mesh_admitted",
            since_ns=(time.monotonic_ns() - layout.constant("MESH_ADMITTED_S") * 10**9)
            % 2**64,  # just after a boot too
            kind=layout.members("mesh_admission")["MESH_ADMISSION_DIRECT"],
        )
        assert len(old) == len(value)
        libbpf.update(host.maps.admitted.fd, key, old)

        def from_that_port() -> None:
            with port_of_ones_own(port=self.PORT) as sock:
                sock.connect((host.bob.v4, APP_PORT))

        assert_closed(lambda: host.alice.site.in_proxy(from_that_port))

    PORT = 22100

    def admission(self, host: Host) -> tuple[bytes, bytes]:
        """As the kernel writes it, from a SYN that is lost."""

        def start() -> tuple[bytes, bytes]:
            with host.black_hole(host.bob), port_of_ones_own(port=self.PORT) as sock:
                sock.setblocking(False)
                sock.connect_ex((host.bob.v4, APP_PORT))
                (key,) = host.maps.admitted.keys()
                return key, libbpf.lookup(host.maps.admitted.fd, key, host.maps.admitted.size.value) or b""

        return host.alice.site.in_app(start)


class TestPlace:
    """The destination is a namespace, and an address only leads there."""

    def test_another_namespace_with_the_address_lets_nobody_in(self, host: Host, counted):
        """bob's address is routed to mallory, who serves on bob's port: the admission is for bob's namespace."""

        def lead(to: str) -> None:
            run_inside(host.router, None, lambda: capture.ip(f"route replace {host.bob.v4}/32 dev {to}"))

        host.mallory.site.in_proxy(lambda: capture.ip(f"address replace {host.bob.v4}/32 dev lo"))
        lead("mallory")
        try:
            with serving(host.mallory, APP_PORT, answer=b"mallory"):
                assert_closed(lambda: host.alice.site.in_app(lambda: dial(host.bob.v4, APP_PORT)))
        finally:
            lead("bob")
            host.mallory.site.in_proxy(lambda: capture.ip(f"address del {host.bob.v4}/32 dev lo"))
        assert counted(drops=True) == {"direct": 1, "dropped_syn": 1, "direct_failed": 1}

    def test_a_grant_for_another_namespace_leads_nowhere(self, host: Host, counted):
        host.grant(host.alice, host.bob, APP_PORT, netns_cookie=host.mallory.netns_cookie)
        assert_closed(lambda: host.alice.site.in_app(lambda: dial(host.bob.v4, APP_PORT)))
        assert counted(drops=True) == {"direct": 1, "dropped_syn": 1, "direct_failed": 1}

    def test_a_destination_that_another_program_changed_is_not_admitted(self, host: Host, counted, balancer):  # noqa: F811
        """A connect4 program above ours runs after it and sends the socket to mallory."""
        host.grant(host.alice, host.mallory, APP_PORT)
        with (
            serving(host.mallory, APP_PORT, answer=b"mallory"),
            running_above(host.alice.site, balancer, host.bob.v4, host.mallory.v4, ALLOW_MULTI),
        ):
            assert_closed(lambda: host.alice.site.in_app(lambda: dial(host.bob.v4, APP_PORT)))
        assert counted(drops=True) == {"direct": 1, "direct_unadmitted": 1, "dropped_syn": 1, "direct_failed": 1}


def test_a_full_map_of_admissions_refuses_and_evicts_nobody(host: Host, counted):
    keys = [
        layout.pack("mesh_admitted_key", netns_cookie=1, source_port=n % 65536, source=n.to_bytes(16, "big"))
        for n in range(65536)
    ]
    value = bytes(layout.sizeof("struct mesh_admitted"))
    for key in keys:
        libbpf.update(host.maps.admitted.fd, key, value)
    try:
        assert_closed(lambda: host.alice.site.in_app(lambda: dial(host.bob.v4, APP_PORT)))
        assert counted(drops=True) == {"direct": 1, "direct_unadmitted": 1, "dropped_syn": 1, "direct_failed": 1}
        with host.alice.site.uproxy():
            answer = host.alice.site.in_app(lambda: dial(host.bob.v4, APP_PORT))
        assert len(answer) == TUNNELLED, "the failure has suspended the grant"
    finally:
        for key in keys:
            assert libbpf.delete(host.maps.admitted.fd, key)


def test_an_application_cannot_write_grants(host: Host):
    """Neither through the pins nor with a program of its own; nor can it read who may go where."""

    def try_it() -> list[str]:
        os.setgroups([])
        os.setuid(NOBODY)
        refused = []
        try:
            libbpf.open_pinned_map(host.pins / "maps" / "grants")
        except OSError as error:
            refused.append(type(error).__name__)
        try:
            os.listdir(host.pins)
        except PermissionError:
            refused.append("listdir")
        # BPF_MAP_GET_FD_BY_ID (14) of each map there may be.
        libc = ctypes.CDLL(None, use_errno=True)
        attribute = ctypes.create_string_buffer(struct.pack("III", 1, 0, 0) + bytes(116))
        if libc.syscall(321, 14, attribute, 128) < 0:
            refused.append("by id")
        return refused

    assert host.alice.site.in_app(try_it) == ["BpfError", "listdir", "by id"]


def test_a_namespace_of_the_applications_own_is_no_way_out(host: Host):
    def escape() -> None:
        linux.unshare(linux.CLONE_NEWNET)
        connected(host.bob.v4, APP_PORT)

    with pytest.raises(OSError, match=r"unreachable|refused"):
        host.alice.site.in_app(escape)
