"""Datagrams in the mesh: to what services declare, from what they declare, and nowhere else."""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path

import pytest

from bpf.maps import Route, Target
from control.api.address import IpAddress, packed16
from tests.bpf.dialling import dial
from tests.bpf.test_sendmsg import datagram
from tests.support import capture
from tests.support.capture import (
    KNOWN_V4,
    PEER_V4,
    PEER_V6,
    UNKNOWN_V4,
    VIP_V4,
    VIP_V6,
    Rig,
    run_inside,
)
from tests.support.udp import connected
from uproxy import linux
from uproxy.node import datagrams

pytestmark = pytest.mark.root
UDP_PORT = 5353
DECLARED = Target(55, Route.PLAINTEXT)
ADDRESSES = [PEER_V4, PEER_V6, f"::ffff:{PEER_V4}"]
SENDS = pytest.mark.parametrize("connect", [False, True], ids=["sendto", "connect"])


def declare(rig: Rig, *addresses: str, port: int = UDP_PORT, target: Target = DECLARED) -> None:
    for address in addresses:
        rig.maps.datagrams.put((packed16(IpAddress(address)), port), target, 7)


@pytest.fixture
def declared(rig):
    """The port of the neighbour's two addresses, and of the two virtual ones."""
    declare(rig, PEER_V4, PEER_V6, VIP_V4, VIP_V6)
    return rig


def cookie_of(rig: Rig) -> int:
    return rig.workloads.captured()[0].netns_cookie


def exchange(rig: Rig, address: str, *, connect: bool, port: int = UDP_PORT) -> tuple[bytes, bytes]:
    """What the neighbour gets of the application, and the application of the neighbour."""
    ended, told = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(told, run_inside(rig.site.peer, None, lambda: _answer(port)))
        finally:
            os._exit(0)
    try:
        got = rig.site.in_app(lambda: _ask(address, port, connect=connect))
        return os.read(ended, 100), got
    finally:
        os.close(ended)
        os.close(told)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def _answer(port: int) -> bytes:
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
        sock.settimeout(5)
        sock.bind(("::", port))
        got, source = sock.recvfrom(100)
        sock.sendto(b"answer", source)
        return got


def _ask(address: str, port: int, *, connect: bool) -> bytes:
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(0.2)
        if connect:
            sock.connect((address, port))
        for _ in range(20):  # until the other end is there
            try:
                sock.send(b"question") if connect else sock.sendto(b"question", (address, port))
                return sock.recv(100)
            except (TimeoutError, ConnectionRefusedError):
                continue
    return b""


@SENDS
@pytest.mark.parametrize("address", ADDRESSES)
def test_to_a_declared_port_they_pass_unchanged(declared, counted, address, connect):
    assert exchange(declared, address, connect=connect) == (b"question", b"answer")
    assert counted() == {}


@SENDS
@pytest.mark.parametrize("address", [VIP_V4, VIP_V6])
def test_to_a_virtual_address_they_leave_as_they_are(declared, counted, address, connect):
    declared.site.in_app(lambda: datagram(address, UDP_PORT, connect=connect))
    assert counted() == {}


@SENDS
@pytest.mark.parametrize(
    ("address", "port"),
    [(PEER_V4, UDP_PORT + 1), (PEER_V6, UDP_PORT + 1), (PEER_V4, 53), (KNOWN_V4, UDP_PORT), (UNKNOWN_V4, UDP_PORT)],
)
def test_to_another_port_or_address_they_are_refused(declared, counted, address, port, connect):
    with pytest.raises(PermissionError):
        declared.site.in_app(lambda: datagram(address, port, connect=connect))
    assert counted() == {"refused_protocol": 1}


@SENDS
@pytest.mark.parametrize("address", ADDRESSES)
def test_while_the_maps_are_not_whole_they_are_refused(rig, counted, address, connect):
    capture.fill(rig.maps, whole=False)
    declare(rig, PEER_V4, PEER_V6)
    with pytest.raises(PermissionError):
        rig.site.in_app(lambda: datagram(address, UDP_PORT, connect=connect))
    assert counted() == {"refused_protocol": 1}


@SENDS
@pytest.mark.parametrize("route", [Route.TUNNEL, Route.WAYPOINT])
def test_an_entry_of_another_kind_lets_none_pass(rig, route, connect):
    declare(rig, PEER_V4, target=Target(55, route))
    with pytest.raises(PermissionError):
        rig.site.in_app(lambda: datagram(PEER_V4, UDP_PORT, connect=connect))


@SENDS
@pytest.mark.parametrize("address", ADDRESSES)
def test_once_it_is_taken_away_they_are_refused(declared, address, connect):
    declared.site.in_app(lambda: datagram(address, UDP_PORT, connect=connect))
    for key in declared.maps.datagrams.items():
        declared.maps.datagrams.delete(key)
    with pytest.raises(PermissionError):
        declared.site.in_app(lambda: datagram(address, UDP_PORT, connect=connect))


def test_a_connection_there_is_none(declared, counted):
    """The same address and port in TCP: what the mesh does not know is refused."""
    with declared.site.outside(UDP_PORT), pytest.raises(ConnectionRefusedError):
        declared.site.in_app(lambda: dial(PEER_V4, UDP_PORT))
    assert counted() == {"refused_no_config": 1}


def test_nor_an_echo_request(declared, counted):
    """A ping socket takes a port, too, and means nothing by it."""

    def ping() -> None:
        Path("/proc/sys/net/ipv4/ping_group_range").write_text("0 0")  # else nobody may, mesh or not
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM, socket.IPPROTO_ICMP) as sock:
            sock.connect((PEER_V4, UDP_PORT))

    with pytest.raises(PermissionError):
        declared.site.in_app(ping)
    assert counted() == {"refused_protocol": 1}


def send_from(port: int, to: tuple[str, int], *, connect: bool) -> None:
    with socket.socket(socket.AF_INET6 if ":" in to[0] else socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("", port))
        if connect:
            sock.connect(to)
            sock.send(b"x")
        else:
            sock.sendto(b"x", to)


@SENDS
@pytest.mark.parametrize("address", ADDRESSES)
def test_from_a_declared_port_they_are_answered(rig, counted, address, connect):
    rig.maps.answering.put(cookie_of(rig), UDP_PORT)
    rig.site.in_app(lambda: send_from(UDP_PORT, (address, 40_000), connect=connect))
    assert counted() == {}


@SENDS
@pytest.mark.parametrize("address", ADDRESSES)
def test_from_another_port_or_as_another_workload_they_are_not(rig, counted, address, connect):
    cookie = cookie_of(rig)
    rig.maps.answering.put(cookie, UDP_PORT + 1)
    rig.maps.answering.put(cookie + 1, UDP_PORT)
    rig.maps.answering.put(0, UDP_PORT)
    with pytest.raises(PermissionError):
        rig.site.in_app(lambda: send_from(UDP_PORT, (address, 40_000), connect=connect))
    assert counted() == {"refused_protocol": 1}


@SENDS
def test_a_declared_port_answers_for_no_other(rig, counted, connect):
    rig.maps.answering.put(cookie_of(rig), UDP_PORT)
    with pytest.raises(PermissionError):
        rig.site.in_app(lambda: send_from(UDP_PORT + 1, (PEER_V4, 40_000), connect=connect))
    assert counted() == {"refused_protocol": 1}


def test_a_connected_socket_is_ended_when_its_port_is_not_declared_any_more(declared):
    ends = [(PEER_V4, UDP_PORT), (PEER_V6, UDP_PORT), (f"::ffff:{PEER_V4}", UDP_PORT), (capture.OUTSIDE_V4, UDP_PORT)]
    refused = {PEER_V4, PEER_V6}
    workload = declared.workloads.captured()[0]
    with connected(declared.site, ends) as ended:
        assert datagrams.end(workload, lambda _, found: False) == 0
        assert datagrams.end(workload, lambda _, found: found.remote[0] in refused) == 3
        assert ended() == [True, True, True, False]


@pytest.mark.parametrize("address", ADDRESSES)
def test_those_that_share_both_ends_are_ended_all(declared, address):
    with connected(declared.site, [(address, UDP_PORT)] * 20, port=40_000) as ended:
        assert datagrams.end(declared.workloads.captured()[0], lambda _, found: True) == 20
        assert ended() == [True] * 20


def test_the_uproxys_own_are_left_alone(declared):
    workload = declared.workloads.captured()[0]

    def connected() -> None:
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.connect((PEER_V4, UDP_PORT))
        kept.append(sock)

    kept: list[socket.socket] = []
    with capture.background(declared.site.netns, declared.site.proxy, signal.pause, connected):
        assert datagrams.end(workload, lambda _, found: True) == 0


def test_a_workload_whose_namespace_cannot_be_found_is_told(declared):
    """Its one process has gone into another, and could send by a socket that it had before."""

    def leave() -> None:
        linux.unshare(linux.CLONE_NEWNET)

    with (
        capture.background(declared.site.netns, declared.site.app, signal.pause, leave),
        pytest.raises(OSError, match="none of its processes is in its network namespace"),
    ):
        datagrams.end(declared.workloads.captured()[0], lambda _, found: True)


def test_a_workload_without_a_process_has_nothing_to_end(rig):
    assert datagrams.end(rig.workloads.captured()[0], lambda _, found: True) == 0
