"""What becomes of a connection that an app dials, in the order in which the kernel decides."""

from __future__ import annotations

import errno
import os
import select
import socket
from pathlib import Path

import pytest

from bpf import layout
from bpf.maps import RangeKind, Route, Settings
from control.api.address import IpAddress, packed16
from tests.bpf.dialling import dial, disconnect
from tests.support import capture
from tests.support.capture import (
    EXCLUDED_V4,
    KNOWN_V4,
    KNOWN_V6,
    NOT_CAPTURED,
    OUTSIDE_V4,
    OUTSIDE_V6,
    PEER_V4,
    PEER_V6,
    PORT,
    SERVICE,
    UNKNOWN_V4,
    UNKNOWN_V6,
    VIP_V4,
    VIP_V6,
    WORKLOAD,
    WORKLOAD_V4,
    WORKLOAD_V6,
    Rig,
    listening,
)
from uproxy.node.client import PROBE_V4, PROBE_V6

pytestmark = pytest.mark.root


def read(answer: bytes):
    """(address, port, route, service id, backend, generation) of a struct mesh_orig_dst."""
    assert len(answer) == 64, answer
    dst = layout.unpack("mesh_orig_dst", answer)
    assert (dst.magic, dst.version) == (0x75505859, 1)
    raw = bytes(layout.ffi.buffer(dst.sockaddr))
    family = int.from_bytes(raw[:2], "little")
    packed = raw[4:8] if family == socket.AF_INET else raw[8:24]
    unused = raw[8:] if family == socket.AF_INET else raw[4:8] + raw[24:]
    assert not any(unused)
    address = socket.inet_ntop(family, packed)
    return address, int.from_bytes(raw[2:4], "big"), dst.route, dst.service_id, dst.backend, dst.generation


def assert_refused(rig: Rig, address: str, port: int = PORT) -> None:
    with pytest.raises(ConnectionRefusedError):
        rig.site.in_app(lambda: dial(address, port))


@pytest.mark.parametrize("vip", [VIP_V4, VIP_V6])
def test_a_service_goes_to_the_uproxy_with_its_destination(rig, counted, vip):
    with rig.site.uproxy():
        answer = rig.site.in_app(lambda: dial(vip))
    assert read(answer) == (vip, PORT, Route.TUNNEL, SERVICE.id, 0, 5)
    assert counted() == {"captured": 1}


@pytest.mark.parametrize("address", [KNOWN_V4, KNOWN_V6])
@pytest.mark.parametrize("port", [1, 8080, 65535])
def test_a_workload_is_captured_at_every_port(rig, address, port):
    with rig.site.uproxy():
        answer = rig.site.in_app(lambda: dial(address, port))
    assert read(answer) == (address, port, Route.TUNNEL, 0, WORKLOAD.id, 6)


def test_a_waypoint_route_is_passed_on(rig):
    rig.maps.services.put((packed16(VIP_V4), PORT), capture.Target(78, Route.WAYPOINT), 10)
    with rig.site.uproxy():
        answer = rig.site.in_app(lambda: dial(VIP_V4))
    assert read(answer) == (VIP_V4, PORT, Route.WAYPOINT, 78, 0, 10)


def test_a_v4_mapped_address_is_its_v4_address(rig):
    with rig.site.uproxy():
        answer = rig.site.in_app(lambda: dial(f"::ffff:{VIP_V4}", family=socket.AF_INET6))
    assert read(answer) == (VIP_V4, PORT, Route.TUNNEL, SERVICE.id, 0, 5)


def test_a_v6_only_socket_reaches_the_uproxy(rig):
    def dial_v6_only() -> bytes:
        with socket.socket(socket.AF_INET6) as sock:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.settimeout(5)
            sock.connect((VIP_V6, PORT))
            return sock.recv(4096)

    with rig.site.uproxy():
        assert read(rig.site.in_app(dial_v6_only))[0] == VIP_V6


@pytest.mark.parametrize("address", [UNKNOWN_V4, UNKNOWN_V6, PEER_V4, PEER_V6])
def test_unknown_inside_a_range_is_refused(rig, counted, address):
    with rig.site.uproxy(), rig.site.outside():
        assert_refused(rig, address)
    assert counted() == {"refused_no_config": 1}


def test_an_unknown_port_of_a_known_service_is_refused(rig, counted):
    with rig.site.uproxy():
        assert_refused(rig, VIP_V4, PORT + 1)
    assert counted() == {"refused_no_config": 1}


@pytest.mark.parametrize("address", [OUTSIDE_V4, OUTSIDE_V6])
def test_outside_all_ranges_is_left_alone(rig, counted, address):
    with rig.site.uproxy(), rig.site.outside():
        assert rig.site.in_app(lambda: dial(address)) == b"outside"
    assert counted() == {}


def test_an_excluded_range_inside_a_mesh_range_is_left_alone(rig):
    with rig.site.outside():
        assert rig.site.in_app(lambda: dial(EXCLUDED_V4)) == b"outside"


def test_a_mesh_range_inside_an_excluded_range_is_captured(rig):
    rig.maps.ranges.put(packed16(IpAddress("10.99.5.1")), 128, RangeKind.MESH)
    with rig.site.outside():
        assert_refused(rig, EXCLUDED_V4)


@pytest.mark.parametrize("address", ["127.0.0.1", "127.9.9.9", "::1", "0.0.0.0", "::", WORKLOAD_V4, WORKLOAD_V6])
def test_loopback_and_own_addresses_are_left_alone(rig, counted, address):
    ends = [("0.0.0.0", 8080), ("::", 8080)]
    with listening(rig.site.netns, rig.site.app, ends, lambda _: b"myself"):
        assert rig.site.in_app(lambda: dial(address, 8080)) == b"myself"
    assert counted() == {}


class TestBeforeTheMapsAreWhole:
    @pytest.fixture(autouse=True)
    def not_whole(self, rig):
        rig.maps.settings.write(Settings(9, whole=False))

    @pytest.mark.parametrize("address", [VIP_V4, VIP_V6, KNOWN_V4, UNKNOWN_V4, OUTSIDE_V4, OUTSIDE_V6])
    def test_everything_is_refused(self, rig, counted, address):
        with rig.site.uproxy(), rig.site.outside():
            assert_refused(rig, address)
        assert counted() == {"refused_not_whole": 1}

    def test_but_excluded_ranges_loopback_and_probes(self, rig):
        with rig.site.uproxy(), rig.site.outside():
            assert rig.site.in_app(lambda: dial(EXCLUDED_V4)) == b"outside"
            for address in ("127.0.0.1", "0.0.0.0", "::1", "::", "::ffff:127.0.0.1"):
                family = socket.AF_INET6 if ":" in address else socket.AF_INET
                assert rig.site.in_app(lambda a=address, f=family: dial(a, 15001, family=f)) == NOT_CAPTURED
            assert read(rig.site.in_app(lambda: dial(*PROBE_V4)))[2] == Route.PROBE

    def test_names_may_be_looked_up_and_no_other_datagram_leaves(self, rig, counted):
        def send(port: int) -> None:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                sock.sendto(b"x", (OUTSIDE_V4, port))

        rig.site.in_app(lambda: send(53))
        with pytest.raises(PermissionError):
            rig.site.in_app(lambda: send(5353))
        assert counted() == {"refused_not_whole": 1}


@pytest.mark.parametrize("probe", [PROBE_V4, PROBE_V6])
def test_a_probe_is_captured_with_a_route_of_its_own(rig, counted, probe):
    with rig.site.uproxy():
        answer = rig.site.in_app(lambda: dial(*probe))
    assert read(answer) == (*probe, Route.PROBE, 0, 0, 0)
    assert counted() == {"probed": 1}


@pytest.mark.parametrize("probe", [PROBE_V4, PROBE_V6])
def test_another_port_of_the_probes_address_is_nothing_special(rig, probe):
    with rig.site.uproxy():
        assert_refused(rig, probe[0], probe[1] + 1)


def test_a_probe_socket_can_be_used_again(rig):
    """As the uProxy uses the one that the launcher made: of the app cgroup, dialled by the proxy again and again."""
    probe = capture_socket(rig)
    with rig.site.uproxy():
        for _ in range(3):

            def once() -> bytes:
                probe.connect(PROBE_V4)
                answer = probe.recv(64)
                disconnect(probe)
                return answer

            assert read(rig.site.in_proxy(once))[2] == Route.PROBE
    probe.close()


def capture_socket(rig: Rig) -> socket.socket:
    """A TCP socket made in the app cgroup, in this process."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:

        def make() -> None:
            with socket.socket(socket.AF_INET) as made:
                socket.send_fds(theirs, [b"x"], [made.fileno()])

        rig.site.in_app(make)
        _, fds, _, _ = socket.recv_fds(ours, 1, 1)
    return socket.socket(fileno=fds[0])


def test_a_non_blocking_connect_is_captured(rig):
    def dial_slowly() -> tuple[int, int, bytes]:
        with socket.socket() as sock:
            sock.setblocking(False)
            started = sock.connect_ex((VIP_V4, PORT))
            select.select([], [sock], [], 5)
            done = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            select.select([sock], [], [], 5)
            return started, done, sock.recv(64)

    with rig.site.uproxy():
        started, done, answer = rig.site.in_app(dial_slowly)
    assert (started, done) == (errno.EINPROGRESS, 0)
    assert read(answer)[0] == VIP_V4


def test_a_sub_cgroup_is_captured(rig):
    below = rig.site.app / "below" / "further"
    below.mkdir(parents=True)
    try:
        with rig.site.uproxy():
            answer = capture.run_inside(rig.site.netns, below, lambda: dial(VIP_V4))
            assert read(answer)[0] == VIP_V4
            with pytest.raises(ConnectionRefusedError):
                capture.run_inside(rig.site.netns, below, lambda: dial(UNKNOWN_V4))
    finally:
        below.rmdir()
        below.parent.rmdir()


def test_a_socket_stays_captured_whoever_uses_it(rig):
    made = capture_socket(rig)

    def use() -> bytes:
        made.connect((VIP_V4, PORT))
        return made.recv(64)

    with rig.site.uproxy():
        assert read(rig.site.in_proxy(use))[0] == VIP_V4
    made.close()


def test_the_proxys_own_connections_are_not_captured(rig, counted):
    with rig.site.outside():
        assert rig.site.in_proxy(lambda: dial(PEER_V4)) == b"outside"
    assert counted() == {}


def test_a_connection_left_alone_keeps_nothing_of_an_earlier_one(rig):
    """connect(service), connect(AF_UNSPEC), connect(127.0.0.1:15001): the uProxy must not think of the service."""

    def dial_twice() -> tuple[bytes, bytes, tuple[str, int]]:
        with socket.socket() as sock:
            sock.settimeout(5)
            sock.connect((VIP_V4, PORT))
            first = sock.recv(64)
            disconnect(sock)
            sock.connect(("127.0.0.1", 15001))
            return first, sock.recv(64), sock.getpeername()

    with rig.site.uproxy():
        first, second, peer = rig.site.in_app(dial_twice)
    assert read(first)[0] == VIP_V4
    assert second == NOT_CAPTURED
    assert peer == ("127.0.0.1", 15001)


def test_a_reused_socket_tells_its_newest_destination(rig):
    def dial_twice() -> tuple[bytes, bytes]:
        with socket.socket() as sock:
            sock.settimeout(5)
            sock.connect((VIP_V4, PORT))
            first = sock.recv(64)
            disconnect(sock)
            sock.connect((KNOWN_V4, 7))
            return first, sock.recv(64)

    with rig.site.uproxy():
        first, second = rig.site.in_app(dial_twice)
    assert read(first)[:2] == (VIP_V4, PORT)
    assert read(second)[:2] == (KNOWN_V4, 7)


@pytest.mark.parametrize(("address", "vip"), [(WORKLOAD_V4, VIP_V4), (WORKLOAD_V6, VIP_V6)])
def test_a_socket_bound_to_the_workloads_address_is_captured(rig, address, vip):
    def dial_bound() -> tuple[bytes, str]:
        with socket.socket(socket.AF_INET6 if ":" in vip else socket.AF_INET) as sock:
            sock.settimeout(5)
            sock.bind((address, 0))
            sock.connect((vip, PORT))
            return sock.recv(64), sock.getsockname()[0]

    with rig.site.uproxy():
        answer, name = rig.site.in_app(dial_bound)
    assert read(answer)[0] == vip
    assert name == address


@pytest.mark.parametrize("vip", [VIP_V4, VIP_V6])
def test_a_socket_bound_to_a_device_is_captured(rig, vip):
    def dial_bound() -> bytes:
        with socket.socket(socket.AF_INET6 if ":" in vip else socket.AF_INET) as sock:
            sock.settimeout(5)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"w0")
            sock.connect((vip, PORT))
            return sock.recv(64)

    with rig.site.uproxy():
        assert read(rig.site.in_app(dial_bound))[0] == vip


@pytest.mark.parametrize("sysctl", ["0x1", "0x607"])  # the default; both ends, without cookies: data in the SYN
def test_fast_open_is_captured(rig, sysctl):
    def dial_fast() -> tuple[bytes, int]:
        with socket.socket() as sock:
            sock.sendto(b"hello", socket.MSG_FASTOPEN, (VIP_V4, PORT))
            data_acked = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 8)[5] >> 5 & 1  # TCPI_OPT_SYN_DATA
            return sock.recv(64), data_acked

    rig.site.in_proxy(lambda: Path("/proc/sys/net/ipv4/tcp_fastopen").write_text(sysctl))
    with rig.site.uproxy():
        answer, in_syn = rig.site.in_app(dial_fast)
    assert read(answer)[0] == VIP_V4
    assert in_syn == (sysctl == "0x607")
    assert len(rig.maps.orig) == 0


def test_mptcp_is_captured(rig):
    def dial_mptcp() -> bytes:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262) as sock:
            sock.settimeout(5)
            sock.connect((VIP_V4, PORT))
            return sock.recv(64)

    with rig.site.uproxy():
        try:
            answer = rig.site.in_app(dial_mptcp)
        except OSError as error:
            if error.errno in (errno.EPROTONOSUPPORT, errno.ENOPROTOOPT, errno.EINVAL):
                pytest.skip("this kernel has no MPTCP")
            raise
    assert read(answer)[0] == VIP_V4


def test_mptcp_to_an_unknown_address_is_refused(rig):
    def dial_mptcp() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262) as sock:
            sock.connect((PEER_V4, PORT))

    with rig.site.outside(), pytest.raises(OSError, match=r"refused|not supported|not available"):
        rig.site.in_app(dial_mptcp)


def test_a_dead_uproxy_means_refused_and_nothing_leaves(rig):
    with rig.site.outside():
        with rig.site.uproxy() as pid:
            assert read(rig.site.in_app(lambda: dial(VIP_V4)))[0] == VIP_V4
            os.kill(pid, 9)
        for address in (VIP_V4, VIP_V6, KNOWN_V4):
            assert_refused(rig, address)
    with rig.site.uproxy():
        assert read(rig.site.in_app(lambda: dial(VIP_V4)))[0] == VIP_V4


def test_a_namespace_of_the_apps_own_is_no_way_out(rig):
    """An app that may unshare its network finds no uProxy there, and no way past it."""

    def escape() -> None:
        from uproxy import linux

        linux.unshare(linux.CLONE_NEWNET)
        dial(VIP_V4)

    with rig.site.uproxy(), pytest.raises(OSError, match=r"unreachable|refused"):
        rig.site.in_app(escape)
