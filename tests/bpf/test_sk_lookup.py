"""What may reach a workload's listeners: the HBONE port from outside, and the workload itself."""

from __future__ import annotations

import socket
import struct
import subprocess
import time
from dataclasses import replace

import pytest

from bpf import layout
from bpf.maps import Admission, Tuple
from control.api.address import packed16, parse_address
from tests.bpf.dialling import dial
from tests.support.capture import PEER_V4, PEER_V6, WORKLOAD_V4, WORKLOAD_V6, background, listening
from uproxy.node.places import NetworkNamespace

pytestmark = pytest.mark.root
ADDRESSES = [WORKLOAD_V4, WORKLOAD_V6]
PORTS = (8080, 15001, 15006, 15008, 15020, 15021)


@pytest.fixture
def listeners(rig):
    """The app on 8080 and whatever else a uProxy might have, at every address."""
    ends = [(address, port) for address in ("0.0.0.0", "::") for port in PORTS]
    with listening(rig.site.netns, rig.site.proxy, ends, lambda _: b"inside"):
        yield


@pytest.mark.parametrize("address", ADDRESSES)
@pytest.mark.parametrize("port", [8080, 15001, 15006, 15020, 15021])
def test_from_outside_every_port_is_reset_at_the_syn(rig, counted, listeners, address, port):
    with pytest.raises(ConnectionRefusedError):
        rig.site.at_peer(lambda: dial(address, port))
    assert counted(drops=True) == {"dropped_syn": 1}


@pytest.mark.parametrize("address", ADDRESSES)
def test_from_outside_the_hbone_port_is_open(rig, counted, listeners, address):
    assert rig.site.at_peer(lambda: dial(address, 15008)) == b"inside"
    assert counted(drops=True) == {}


def test_a_syn_cookie_does_not_open_a_port(rig, listeners):
    def always_cookies(value: str) -> None:
        with open("/proc/sys/net/ipv4/tcp_syncookies", "w") as sysctl:
            sysctl.write(value)

    rig.site.in_proxy(lambda: always_cookies("2"))
    try:
        assert rig.site.at_peer(lambda: dial(WORKLOAD_V4, 15008)) == b"inside"
        with pytest.raises(ConnectionRefusedError):
            rig.site.at_peer(lambda: dial(WORKLOAD_V4, 8080))
    finally:
        rig.site.in_proxy(lambda: always_cookies("1"))


@pytest.mark.parametrize("address", [*ADDRESSES, "127.0.0.1", "::1"])
def test_the_workload_reaches_itself(rig, counted, listeners, address):
    assert rig.site.in_app(lambda: dial(address, 8080)) == b"inside"
    assert rig.site.in_proxy(lambda: dial(address, 8080)) == b"inside"
    assert counted(drops=True) == {}


@pytest.mark.parametrize(("source", "target"), [(WORKLOAD_V4, "127.0.0.1"), (WORKLOAD_V6, "::1")])
def test_own_address_and_loopback_reach_each_other(rig, listeners, source, target):
    def bound() -> bytes:
        with socket.socket(socket.AF_INET6 if ":" in source else socket.AF_INET) as sock:
            sock.settimeout(5)
            sock.bind((source, 0))
            sock.connect((target, 8080))
            return sock.recv(16)

    assert rig.site.in_proxy(bound) == b"inside"


def test_an_address_that_is_not_registered_is_closed_even_from_inside(rig, counted, listeners):
    def bound() -> None:
        subprocess.run(["ip", "address", "replace", "10.98.0.1/32", "dev", "lo"], check=True)
        with socket.socket() as sock:
            sock.bind((WORKLOAD_V4, 0))
            sock.connect(("10.98.0.1", 8080))

    with pytest.raises(ConnectionRefusedError):
        rig.site.in_proxy(bound)
    assert counted(drops=True) == {"dropped_syn": 1}


ADMITTED_PORT = 21000  # not one that the kernel chooses by itself


@pytest.fixture(params=[(PEER_V4, WORKLOAD_V4), (PEER_V6, WORKLOAD_V6)], ids=["v4", "v6"])
def connection(rig, request):
    """From a port of the neighbour to the app's port."""
    source, target = request.param
    cookie = NetworkNamespace.of(rig.site.netns).cookie
    yield Tuple(cookie, (packed16(parse_address(source)), ADMITTED_PORT), (packed16(target), 8080))
    for left in rig.maps.admitted.items():
        rig.maps.admitted.delete(left)


def dial_from_port(target: str, port: int = 8080) -> bytes:
    with socket.socket(socket.AF_INET6 if ":" in target else socket.AF_INET) as sock:
        sock.settimeout(5)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # no TIME_WAIT in the next's way
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("::" if ":" in target else "0.0.0.0", ADMITTED_PORT))
        sock.connect((target, port))
        return sock.recv(16)


def target_of(connection: Tuple) -> str:
    return WORKLOAD_V4 if connection.destination[0] == packed16(WORKLOAD_V4) else WORKLOAD_V6


@pytest.mark.parametrize("kind", Admission)
def test_an_admitted_connection_reaches_the_app_and_no_other_does(rig, counted, listeners, connection, kind):
    rig.maps.admitted.put(connection, time.monotonic_ns(), kind)
    target = target_of(connection)
    assert rig.site.at_peer(lambda: dial_from_port(target)) == b"inside"
    assert counted() == {"admitted_syn": 1}
    with pytest.raises(ConnectionRefusedError):
        rig.site.at_peer(lambda: dial(target, 8080))  # from another port
    with pytest.raises(ConnectionRefusedError):
        rig.site.at_peer(lambda: dial_from_port(target, 15020))  # to another port
    assert counted(drops=True) == {"admitted_syn": 1, "dropped_syn": 2}


def test_an_admission_outlives_every_retransmission_and_no_more(rig, counted, listeners, connection):
    seconds = layout.constant("MESH_ADMITTED_S")
    target = target_of(connection)

    def ago(seconds: int) -> int:
        return (time.monotonic_ns() - seconds * 10**9) % 2**64  # as the kernel counts, also just after it has booted

    rig.maps.admitted.put(connection, ago(seconds - 2), Admission.DIRECT)
    assert rig.site.at_peer(lambda: dial_from_port(target)) == b"inside"
    rig.maps.admitted.put(connection, ago(seconds), Admission.DIRECT)
    with pytest.raises(ConnectionRefusedError):
        rig.site.at_peer(lambda: dial_from_port(target))
    assert counted(drops=True) == {"admitted_syn": 1, "dropped_syn": 1}


def test_an_admission_from_the_future_holds_not(rig, listeners, connection):
    rig.maps.admitted.put(connection, time.monotonic_ns() + 10**12, Admission.DIRECT)
    with pytest.raises(ConnectionRefusedError):
        rig.site.at_peer(lambda: dial_from_port(target_of(connection)))


def test_an_admission_is_for_one_namespace(rig, listeners, connection):
    elsewhere = replace(connection, netns_cookie=connection.netns_cookie + 1)
    rig.maps.admitted.put(elsewhere, time.monotonic_ns(), Admission.DIRECT)
    with pytest.raises(ConnectionRefusedError):
        rig.site.at_peer(lambda: dial_from_port(target_of(connection)))


def test_an_admitted_connection_survives_syn_cookies(rig, listeners, connection):
    """The listeners are looked up twice then: for the SYN, and for the ACK of the cookie."""

    def always_cookies(value: str) -> None:
        with open("/proc/sys/net/ipv4/tcp_syncookies", "w") as sysctl:
            sysctl.write(value)

    rig.site.in_proxy(lambda: always_cookies("2"))
    try:
        rig.maps.admitted.put(connection, time.monotonic_ns(), Admission.DIRECT)
        assert rig.site.at_peer(lambda: dial_from_port(target_of(connection))) == b"inside"
    finally:
        rig.site.in_proxy(lambda: always_cookies("1"))


def test_what_the_uproxy_dials_comes_back(rig):
    with rig.site.outside():
        assert rig.site.in_proxy(lambda: dial(PEER_V4)) == b"outside"
        assert rig.site.in_proxy(lambda: dial(PEER_V6)) == b"outside"


def test_datagrams_pass(rig, counted):
    """Answers to a resolver on an unconnected socket, for one."""

    def exchange() -> bytes:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.settimeout(5)
            sock.bind(("0.0.0.0", 9053))
            sock.sendto(b"ping", ("192.0.2.1", 9053))
            return sock.recv(16)

    sockets: list[socket.socket] = []

    def ready() -> None:
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.bind(("192.0.2.1", 9053))
        sockets.append(sock)

    def serve() -> None:
        while True:
            data, sender = sockets[0].recvfrom(64)
            sockets[0].sendto(data, sender)

    with background(rig.site.peer, None, serve, ready):
        assert rig.site.in_app(exchange) == b"ping"
    assert counted(drops=True) == {}


@pytest.mark.parametrize("forged", [WORKLOAD_V4, "127.0.0.1", WORKLOAD_V6, "::1"])
def test_a_source_of_our_own_cannot_be_forged_from_the_wire(rig, counted, forged):
    """A SYN from outside that claims to come from the workload itself opens nothing."""
    v6 = ":" in forged
    target = WORKLOAD_V6 if v6 else WORKLOAD_V4

    def established() -> int:
        with open("/proc/net/tcp6" if v6 else "/proc/net/tcp") as table:
            rows = [line.split() for line in table]
        return sum(row[3] == "01" and f":{FORGED_PORT:04X}" in row[2] for row in rows[1:])

    with listening(rig.site.netns, rig.site.app, [(target, 8080)], lambda _: b"inside"):
        rig.site.at_peer(lambda: send_syn(PEER_V6 if v6 else PEER_V4, target))
        assert counted(drops=True) == {"dropped_syn": 1}, "the packet is not one that arrives: the test proves nothing"
        rig.site.at_peer(lambda: send_syn(forged, target))
        assert rig.site.in_proxy(established) == 0
        assert counted(drops=True) == {"dropped_syn": 1}


FORGED_PORT = 21100


def send_syn(source: str, target: str) -> None:
    """One SYN to port 8080 with any source, past the sender's own IP layer."""
    v6 = ":" in target
    family, ethertype = (socket.AF_INET6, 0x86DD) if v6 else (socket.AF_INET, 0x0800)
    ends = socket.inet_pton(family, source) + socket.inet_pton(family, target)
    tcp = struct.pack("!HHIIHHHH", FORGED_PORT, 8080, 1, 0, 5 << 12 | 2, 65535, 0, 0)
    pseudo = ends + (struct.pack("!II", 20, 6) if v6 else struct.pack("!HH", 6, 20))
    tcp = tcp[:16] + struct.pack("!H", checksum(pseudo + tcp)) + tcp[18:]
    if v6:
        header = struct.pack("!IHBB", 6 << 28, 20, 6, 64)
    else:
        header = struct.pack("!BBHHHBBH", 0x45, 0, 40, 1, 0, 64, 6, 0)
        header = header[:10] + struct.pack("!H", checksum(header + ends))
    with socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, 0) as sock:
        sock.sendto(header + ends + tcp, ("p0", ethertype, 0, 0, hardware_address(target)))


def hardware_address(neighbour: str) -> bytes:
    with socket.socket(socket.AF_INET6 if ":" in neighbour else socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.sendto(b"x", (neighbour, 9))
    for _ in range(100):
        shown = subprocess.run(["ip", "neigh", "show", neighbour], check=True, capture_output=True, text=True).stdout
        if "lladdr" in shown:
            return bytes.fromhex(shown.split("lladdr ")[1].split()[0].replace(":", ""))
    raise AssertionError(f"no neighbour: {shown}")


def checksum(data: bytes) -> int:
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF
