"""The direct path to a backend of the same host: who goes there, and that nothing else about a connection changes."""

from __future__ import annotations

import errno
import os
import select
import socket
import time
from collections import Counter
from pathlib import Path

import pytest

from bpf import layout
from bpf.arena import Backend
from bpf.maps import Grant, Route, Target
from control.api.address import packed16
from tests.bpf.dialling import connected, dial
from tests.bpf.test_connect import read
from tests.support import capture
from tests.support.capture import KNOWN_V4, PORT, VIP_V4, VIP_V6, listening
from tests.support.neighbours import Host, Neighbour

pytestmark = pytest.mark.root

APP_PORT = 8080
BOB = b"bob"
TUNNELLED = 64  # bytes that the stand-in for the uProxy answers with


@pytest.fixture
def bob_serves(host: Host):
    with serving(host.bob):
        yield


@pytest.fixture
def uproxy(host: Host):
    with host.alice.site.uproxy():
        yield


def serving(who: Neighbour, *ports: int, answer: bytes = BOB):
    ends = [(address, port) for address in ("0.0.0.0", "::") for port in ports or (APP_PORT,)]
    return listening(who.site.netns, who.site.app, ends, lambda _: answer)


def declare_bob(host: Host, vip: str, port: int = APP_PORT) -> None:
    host.declare(host.alice, vip, [host.backend(host.bob, vip, port)])


@pytest.mark.parametrize("like", ["v4", "v6"])
def test_a_granted_workload_is_dialled_directly(host: Host, counted, bob_serves, like):
    host.grant(host.alice, host.bob, APP_PORT)
    target = getattr(host.bob, like)

    def talk() -> tuple[bytes, object]:
        with connected(target, APP_PORT) as sock:
            return sock.recv(64), sock.getpeername()[:2]

    assert host.alice.site.in_app(talk) == (BOB, (target, APP_PORT))
    assert counted() == {"direct": 1, "admitted_syn": 1}
    assert len(host.maps.admitted) == 0
    (flow,) = host.flows()
    assert (flow.source_id, flow.target_id, flow.service_id) == (host.alice.id, host.bob.id, 0)


@pytest.mark.parametrize(
    ("vip", "family", "shown"),
    [
        (VIP_V4, socket.AF_INET, VIP_V4),
        (VIP_V6, socket.AF_INET6, VIP_V6),
        (f"::ffff:{VIP_V4}", socket.AF_INET6, f"::ffff:{VIP_V4}"),
    ],
)
def test_a_service_leads_to_its_backend_and_looks_like_itself(host: Host, counted, vip, family, shown):
    host.grant(host.alice, host.bob, APP_PORT)
    real = vip.removeprefix("::ffff:")
    declare_bob(host, real)
    ends = [("0.0.0.0", APP_PORT), ("::", APP_PORT)]
    see_caller = lambda sock: sock.getpeername()[0].encode()  # noqa: E731

    def talk() -> tuple[bytes, object]:
        with connected(vip, family=family) as sock:
            return sock.recv(64), sock.getpeername()[:2]

    with listening(host.bob.site.netns, host.bob.site.app, ends, see_caller):
        caller, peer = host.alice.site.in_app(talk)
    assert (caller.decode(), peer) == (host.alice.address(real), (shown, PORT))
    assert counted() == {"direct": 1, "admitted_syn": 1}
    (flow,) = host.flows()
    assert (flow.service_id, flow.dialled, flow.dialled_port) == (capture.SERVICE.id, packed16(real), PORT)
    assert (flow.target, flow.target_port) == (packed16(host.bob.address(real)), APP_PORT)


class TestWhatIsTunnelled:
    """Nothing here may reach bob: his listener would answer."""

    @pytest.fixture(autouse=True)
    def ready(self, host: Host, uproxy, bob_serves):
        self.host = host
        self.pairs = host.grant(host.alice, host.bob, APP_PORT)
        declare_bob(host, VIP_V4)

    def assert_tunnelled(self, address: str, port: int, route: Route = Route.TUNNEL) -> bytes:
        answer = self.host.alice.site.in_app(lambda: dial(address, port))
        assert len(answer) == TUNNELLED
        assert read(answer)[:3] == (address, port, route)
        assert self.host.maps.flows.drain() == []
        return answer

    def put(self, **changes: int) -> None:
        for pair in self.pairs:
            values = {
                "expiry_ns": time.monotonic_ns() + 10**10,
                "target_netns": self.host.bob.netns_cookie,
                "source_id": 1,
                "target_id": 2,
            }
            self.host.maps.grants.put(pair, Grant(**(values | changes)))

    def test_what_is_not_granted(self, counted):
        for pair in self.pairs:
            self.host.maps.grants.delete(pair)
        self.assert_tunnelled(self.host.bob.v4, APP_PORT)
        self.assert_tunnelled(VIP_V4, PORT)
        assert counted() == {"captured": 2}

    def test_another_port(self):
        self.assert_tunnelled(self.host.bob.v4, APP_PORT + 1)

    def test_an_expired_grant(self):
        self.put(expiry_ns=time.monotonic_ns())
        self.assert_tunnelled(self.host.bob.v4, APP_PORT)
        self.assert_tunnelled(VIP_V4, PORT)

    def test_a_grant_that_ends_while_we_wait(self):
        self.put(expiry_ns=time.monotonic_ns() + 10**9)
        assert self.host.alice.site.in_app(lambda: dial(self.host.bob.v4, APP_PORT)) == BOB
        time.sleep(1)
        self.host.flows()
        self.assert_tunnelled(self.host.bob.v4, APP_PORT)

    def test_a_suspended_grant(self):
        self.put(suspended_ns=1)
        self.assert_tunnelled(self.host.bob.v4, APP_PORT)

    def test_a_service_that_the_caller_has_not_declared(self):
        for service in self.host.maps.direct_services.items():
            self.host.maps.direct_services.delete(*service)
        answer = self.assert_tunnelled(VIP_V4, PORT)
        assert layout.unpack("mesh_orig_dst", answer).drawn == 0

    def test_a_bound_service(self):
        self.host.maps.services.put((packed16(VIP_V4), PORT), Target(77, Route.WAYPOINT), 10)
        self.assert_tunnelled(VIP_V4, PORT, Route.WAYPOINT)

    def test_a_bound_workload(self):
        self.host.maps.workloads.put((packed16(self.host.bob.v4), 0), Target(1, Route.WAYPOINT), 10)
        self.assert_tunnelled(self.host.bob.v4, APP_PORT, Route.WAYPOINT)

    def test_a_service_that_the_mesh_no_longer_knows_is_refused(self):
        self.host.maps.services.delete((packed16(VIP_V4), PORT))
        with pytest.raises(ConnectionRefusedError):
            self.host.alice.site.in_app(lambda: dial(VIP_V4))

    def test_a_backend_elsewhere_that_is_drawn(self):
        away = Backend(packed16(KNOWN_V4), APP_PORT, 1, 0, 4711)
        self.host.declare(self.host.alice, VIP_V4, [away])
        answer = self.assert_tunnelled(VIP_V4, PORT)
        assert layout.unpack("mesh_orig_dst", answer).drawn == 4711

    def test_a_backend_of_the_other_family(self):
        self.host.declare(self.host.alice, VIP_V4, [self.host.backend(self.host.bob, VIP_V6, APP_PORT)])
        self.assert_tunnelled(VIP_V4, PORT)

    def test_a_backend_whose_namespace_is_not_the_granted_one(self):
        self.put(target_netns=self.host.bob.netns_cookie + 1)
        self.assert_tunnelled(VIP_V4, PORT)

    def test_another_caller(self):
        with self.host.mallory.site.uproxy():
            answer = self.host.mallory.site.in_app(lambda: dial(self.host.bob.v4, APP_PORT))
            assert len(answer) == TUNNELLED
            assert len(self.host.mallory.site.in_app(lambda: dial(VIP_V4))) == TUNNELLED


def test_backends_are_drawn_by_weight(host: Host, uproxy):
    """Three here, two elsewhere, one without a weight: what is drawn elsewhere is tunnelled, and says so."""
    weights = {"b1": 1, "b2": 5, "m1": 10, "away": 3, "far": 1}
    ports = {"b1": 8081, "b2": 8082, "m1": 8083}
    for name, target in (("b1", host.bob), ("b2", host.bob), ("m1", host.mallory)):
        host.grant(host.alice, target, ports[name])
    backends = [
        host.backend(host.bob, VIP_V4, ports["b1"], weights["b1"]),
        host.backend(host.bob, VIP_V4, ports["b2"], weights["b2"]),
        host.backend(host.mallory, VIP_V4, ports["m1"], weights["m1"]),
        host.backend(host.mallory, VIP_V4, 8084, 0),
        Backend(packed16(KNOWN_V4), 80, weights["away"], 0, 901),
        Backend(packed16(KNOWN_V4), 81, weights["far"], 0, 902),
    ]
    host.declare(host.alice, VIP_V4, backends)
    rounds = 3000

    def dial_often() -> Counter[str]:
        seen: Counter[str] = Counter()
        names = {901: "away", 902: "far"}
        for _ in range(rounds):
            answer = dial(VIP_V4)
            direct = len(answer) != TUNNELLED
            seen[answer.decode() if direct else names[layout.unpack("mesh_orig_dst", answer).drawn]] += 1
        return seen

    with (
        listening(host.bob.site.netns, host.bob.site.app, [("0.0.0.0", 8081)], lambda _: b"b1"),
        listening(host.bob.site.netns, host.bob.site.app, [("0.0.0.0", 8082)], lambda _: b"b2"),
        listening(host.mallory.site.netns, host.mallory.site.app, [("0.0.0.0", 8083)], lambda _: b"m1"),
    ):
        seen = host.alice.site.in_app(dial_often)
    assert set(seen) == set(weights)
    for name, weight in weights.items():
        share = weight / sum(weights.values())
        allowed = 5 * (share * (1 - share) / rounds) ** 0.5  # five standard deviations
        assert seen[name] / rounds == pytest.approx(share, abs=allowed)


def test_a_change_of_backends_holds_from_the_next_dial_on(host: Host, uproxy):
    host.grant(host.alice, host.bob, 8081)
    host.grant(host.alice, host.bob, 8082)
    with (
        listening(host.bob.site.netns, host.bob.site.app, [("0.0.0.0", 8081)], lambda _: b"old"),
        listening(host.bob.site.netns, host.bob.site.app, [("0.0.0.0", 8082)], lambda _: b"new"),
    ):
        for port, answer in ((8081, b"old"), (8082, b"new")) * 5:
            declare_bob(host, VIP_V4, port)
            assert host.alice.site.in_app(lambda: dial(VIP_V4)) == answer
    for service in host.maps.direct_services.items():
        host.maps.direct_services.delete(*service)
    assert len(host.alice.site.in_app(lambda: dial(VIP_V4))) == TUNNELLED


def test_a_non_blocking_connect(host: Host, bob_serves):
    host.grant(host.alice, host.bob, APP_PORT)
    declare_bob(host, VIP_V4)

    def dial_slowly() -> tuple[int, int, bytes]:
        with socket.socket() as sock:
            sock.setblocking(False)
            started = sock.connect_ex((VIP_V4, PORT))
            select.select([], [sock], [], 5)
            done = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            select.select([sock], [], [], 5)
            return started, done, sock.recv(64)

    started, done, answer = host.alice.site.in_app(dial_slowly)
    assert started in (0, errno.EINPROGRESS)
    assert (done, answer) == (0, BOB)


@pytest.mark.parametrize("sysctl", ["0x1", "0x607"])  # the default; both ends, without cookies: data in the SYN
def test_fast_open(host: Host, sysctl):
    host.grant(host.alice, host.bob, APP_PORT)

    def dial_fast() -> tuple[bytes, int]:
        with socket.socket() as sock:
            sock.sendto(b"hello", socket.MSG_FASTOPEN, (host.bob.v4, APP_PORT))
            answer = sock.recv(64)
            return answer, sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 8)[5] >> 5 & 1  # TCPI_OPT_SYN_DATA

    for site in (host.alice.site, host.bob.site):
        site.in_proxy(lambda: Path("/proc/sys/net/ipv4/tcp_fastopen").write_text(sysctl))
    with serving(host.bob):
        answer, in_syn = host.alice.site.in_app(dial_fast)
    assert answer == BOB
    assert in_syn == (sysctl == "0x607")
    assert len(host.maps.admitted) == 0
    (flow,) = host.flows()
    assert (flow.sent, flow.received) == (5, len(BOB))


def test_mptcp(host: Host, bob_serves):
    host.grant(host.alice, host.bob, APP_PORT)

    def dial_mptcp() -> bytes:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262) as sock:
            sock.settimeout(5)
            sock.connect((host.bob.v4, APP_PORT))
            return sock.recv(64)

    try:
        answer = host.alice.site.in_app(dial_mptcp)
    except OSError as error:
        if error.errno in (errno.EPROTONOSUPPORT, errno.ENOPROTOOPT, errno.EINVAL):
            pytest.skip("this kernel has no MPTCP")
        raise
    assert answer == BOB


def test_syn_cookies(host: Host, bob_serves):
    """The listener is looked up twice then: the admission must outlive the SYN."""
    host.grant(host.alice, host.bob, APP_PORT)

    def cookies(value: str) -> None:
        Path("/proc/sys/net/ipv4/tcp_syncookies").write_text(value)

    host.bob.site.in_proxy(lambda: cookies("2"))
    try:
        for address in (host.bob.v4, host.bob.v6):
            assert host.alice.site.in_app(lambda a=address: dial(a, APP_PORT)) == BOB
    finally:
        host.bob.site.in_proxy(lambda: cookies("1"))
    assert len(host.maps.admitted) == 0


@pytest.mark.soak  # thousands of connections
def test_two_thousand_connections_leave_nothing_behind(host: Host, counted, bob_serves):
    host.grant(host.alice, host.bob, APP_PORT)
    declare_bob(host, VIP_V4)
    declare_bob(host, VIP_V6)

    def many() -> int:
        addresses = (VIP_V4, VIP_V6)
        return sum(dial(addresses[number % 2]) == BOB for number in range(2000))

    assert host.alice.site.in_app(many) == 2000
    assert len(host.flows(2000)) == 2000
    risen = counted()
    risen.pop("dropped_syn", 0)  # an ACK that comes when its connection is over asks for a listener, as a SYN does
    assert risen == {"direct": 2000, "admitted_syn": 2000}
    assert len(host.maps.admitted) == 0
    assert all(grant.suspended_ns == 0 for grant in host.maps.grants.items().values())


class TestFailure:
    """A native connect has no other backend to try: the first failure is the application's, and the last."""

    @pytest.fixture(autouse=True)
    def ready(self, host: Host, uproxy):
        self.host = host
        host.grant(host.alice, host.bob, APP_PORT)

    def suspended(self) -> int:
        return sum(grant.suspended_ns > 0 for grant in self.host.maps.grants.items().values())

    def test_a_refused_dial_suspends_the_grant(self, counted):
        with pytest.raises(ConnectionRefusedError):
            self.host.alice.site.in_app(lambda: dial(self.host.bob.v4, APP_PORT))
        assert self.suspended() == 1, "the other family's grant holds"
        assert counted() == {"direct": 1, "admitted_syn": 1, "direct_failed": 1}
        assert len(self.host.alice.site.in_app(lambda: dial(self.host.bob.v4, APP_PORT))) == TUNNELLED
        (flow,) = self.host.flows()
        assert (flow.end.name, flow.sent, flow.received) == ("FAILED", 0, 0)
        assert len(self.host.maps.admitted) == 0

    def test_a_dial_that_is_given_up_suspends_the_grant(self):
        """Nobody answers, and the application closes; as the kernel does after its retransmissions."""

        def give_up() -> None:
            with socket.socket() as sock:
                sock.settimeout(0.2)
                sock.connect((self.host.bob.v4, APP_PORT))

        with self.host.black_hole(self.host.bob), pytest.raises(TimeoutError):
            self.host.alice.site.in_app(give_up)
        assert self.suspended() == 1
        assert len(self.host.maps.admitted) == 0
        assert len(self.host.alice.site.in_app(lambda: dial(self.host.bob.v4, APP_PORT))) == TUNNELLED

    def test_a_renewal_does_not_lift_a_suspension_and_a_new_grant_does(self):
        with pytest.raises(ConnectionRefusedError):
            self.host.alice.site.in_app(lambda: dial(self.host.bob.v4, APP_PORT))
        for pair in self.host.maps.grants.items():
            assert self.host.maps.grants.renew(pair, time.monotonic_ns() + 10**10)
        assert len(self.host.alice.site.in_app(lambda: dial(self.host.bob.v4, APP_PORT))) == TUNNELLED
        self.host.grant(self.host.alice, self.host.bob, APP_PORT)
        with serving(self.host.bob):
            assert self.host.alice.site.in_app(lambda: dial(self.host.bob.v4, APP_PORT)) == BOB

    def test_a_connection_that_breaks_later_suspends_nothing(self):
        with serving(self.host.bob) as pid:

            def break_it() -> None:
                with connected(self.host.bob.v4, APP_PORT) as sock:
                    sock.recv(64)
                    os.kill(pid, 9)
                    sock.recv(64)

            self.host.alice.site.in_app(break_it)
        assert self.suspended() == 0
