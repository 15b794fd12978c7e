"""Name queries go to the uProxy, and the app sees the nameservers that it asked."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import time
from collections.abc import Callable, Iterator

import pytest

from bpf import layout, libbpf, maps
from control.api.address import packed16, parse_address
from tests.support.capture import (
    EXCLUDED_V4,
    KNOWN_V4,
    OUTSIDE_V4,
    OUTSIDE_V6,
    PEER_V4,
    PEER_V6,
    UNKNOWN_V4,
    VIP_V4,
    WORKLOAD_V4,
    WORKLOAD_V6,
    Rig,
    background,
)
from uproxy.redirect import OriginalDestination, Route, parse_original_destination

pytestmark = pytest.mark.root

PORTS = range(15053, 15061)
V4 = [OUTSIDE_V4, PEER_V4, VIP_V4, UNKNOWN_V4, EXCLUDED_V4, "127.0.0.53"]
V6 = [OUTSIDE_V6, PEER_V6, "::1"]
MAPPED = [f"::ffff:{OUTSIDE_V4}"]


@pytest.fixture(autouse=True)
def captured(rig) -> Iterator[None]:
    with rig.site.registration() as registration:
        cookie = registration.netns.cookie
    rig.maps.dns_captured.put(cookie)
    yield
    rig.maps.dns_captured.delete(cookie)
    rig.maps.nameservers.forget(cookie)


@contextlib.contextmanager
def responder(
    rig: Rig, tell: Callable[[OriginalDestination], str] = lambda asked: f"{asked.address} {asked.port}"
) -> Iterator[None]:
    """Answers a query with what the kernel says of it."""
    listening: list[socket.socket] = []

    def ready() -> None:
        for family, address in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
            for port in PORTS:
                listener = socket.socket(family, socket.SOCK_DGRAM)
                listener.bind((address, port))
                listening.append(listener)

    def serve() -> None:
        while True:
            for listener in select.select(listening, [], [])[0]:
                query, app = listener.recvfrom(4096)
                level = socket.IPPROTO_IPV6 if listener.family == socket.AF_INET6 else socket.IPPROTO_IP
                asked = parse_original_destination(listener.getsockopt(level, 80, 64))
                listener.sendto(b"%s %s" % (query, tell(asked).encode()), app)

    with background(rig.site.netns, rig.site.proxy, serve, ready):
        yield


def family_of(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def ask(*nameservers: str) -> list[tuple[bytes, str, int]]:
    """The answers to queries that one unconnected socket sends to these, all before it reads one."""
    with socket.socket(family_of(nameservers[0]), socket.SOCK_DGRAM) as sock:
        sock.settimeout(5)
        for number, nameserver in enumerate(nameservers):
            sock.sendto(b"%d" % number, (nameserver, 53))
        answers = [sock.recvfrom(4096) for _ in nameservers]
        return [(answer, *sender[:2]) for answer, sender in sorted(answers)]


def ask_connected(nameserver: str) -> tuple[bytes, str, str]:
    """The answer, from whom it is said to be, and who is said to be connected."""
    with socket.socket(family_of(nameserver), socket.SOCK_DGRAM) as sock:
        sock.settimeout(5)
        sock.connect((nameserver, 53))
        sock.send(b"0")
        answer, sender = sock.recvfrom(4096)
        peer = sock.getpeername()
        assert sender[1] == peer[1] == 53
        return answer, sender[0], peer[0]


def plain(address: str) -> str:
    return address.removeprefix("::ffff:")


@pytest.mark.parametrize("nameserver", V4 + V6 + MAPPED)
def test_a_query_is_answered_by_the_uproxy_in_the_nameservers_name(rig, counted, nameserver):
    with responder(rig):
        (answer,) = rig.site.in_app(lambda: ask(nameserver))
    assert answer == (f"0 {plain(nameserver)} 53".encode(), nameserver, 53)
    assert counted() == {"dns_captured": 1}


@pytest.mark.parametrize("nameserver", V4 + V6 + MAPPED)
def test_so_is_one_on_a_connected_socket(rig, counted, nameserver):
    with responder(rig):
        answer = rig.site.in_app(lambda: ask_connected(nameserver))
    assert answer == (f"0 {plain(nameserver)} 53".encode(), nameserver, nameserver)
    assert counted() == {"dns_captured": 1}


@pytest.mark.parametrize("asked", [V4, V6, [*MAPPED, f"::ffff:{PEER_V4}", f"::ffff:{VIP_V4}"]])
def test_several_nameservers_on_one_socket_are_told_apart(rig, asked):
    with responder(rig):
        answers = rig.site.in_app(lambda: ask(*asked))
    assert answers == [
        (f"{number} {plain(nameserver)} 53".encode(), nameserver, 53) for number, nameserver in enumerate(asked)
    ]


def test_each_family_has_as_many_nameservers_as_ports_and_no_more(rig, counted):
    many = [f"192.0.2.{number}" for number in range(1, 10)]
    with responder(rig):
        answers = rig.site.in_app(lambda: ask(*many[:8]))
        assert [sender for _, sender, _ in answers] == many[:8]
        with pytest.raises(PermissionError):
            rig.site.in_app(lambda: ask(many[8]))
        assert rig.site.in_app(lambda: ask(*many[:8])) == answers
        assert [sender for _, sender, _ in rig.site.in_app(lambda: ask(OUTSIDE_V6))] == [OUTSIDE_V6]
    assert counted() == {"dns_captured": 17, "refused_nameservers": 1}


def test_one_that_was_not_asked_for_a_while_makes_room(rig):
    many = [f"192.0.2.{number}" for number in range(1, 9)]
    with responder(rig):
        rig.site.in_app(lambda: ask(*many))
        (cookie, _), *_ = rig.maps.nameservers.items()
        idle_since = time.monotonic_ns() - 31 * 10**9
        key = layout.pack("mesh_nameserver_key", netns_cookie=cookie, slot=3)
        value = layout.pack("mesh_nameserver", addr=packed16(parse_address(many[3])), used_ns=idle_since)
        libbpf.update(rig.maps.nameservers.fd, key, value)
        (answer,) = rig.site.in_app(lambda: ask("192.0.2.99"))
        assert answer == (b"0 192.0.2.99 53", "192.0.2.99", 53)
        assert rig.maps.nameservers.items()[cookie, 3] == packed16(parse_address("192.0.2.99"))


def test_without_its_uproxy_a_connected_socket_is_told_and_no_query_leaves(rig):
    """A name of the mesh may be somebody's in public DNS, too: what it leads to would be dialled in plaintext."""
    with socket_at_peer(rig) as nameserver:
        with pytest.raises(ConnectionRefusedError):
            rig.site.in_app(lambda: ask_connected(OUTSIDE_V4))
        with pytest.raises(TimeoutError):
            nameserver.recv(4096)


@contextlib.contextmanager
def socket_at_peer(rig: Rig) -> Iterator[socket.socket]:
    """A nameserver's socket, outside."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)

    def make() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.bind((OUTSIDE_V4, 53))
            socket.send_fds(theirs, [b"x"], [sock.fileno()])

    rig.site.at_peer(make)
    _, (fd,), _, _ = socket.recv_fds(ours, 1, 1)
    ours.close()
    theirs.close()
    with socket.socket(fileno=fd) as sock:
        sock.settimeout(0.5)
        yield sock


def test_a_workload_that_does_not_want_it_asks_its_nameserver_itself(rig, counted, captured):
    with rig.site.registration() as registration:
        rig.maps.dns_captured.delete(registration.netns.cookie)

    def ask_once() -> tuple[str, int]:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.sendto(b"0", (OUTSIDE_V4, 53))
            return sock.getsockname()

    with socket_at_peer(rig) as nameserver:
        rig.site.in_app(ask_once)
        assert nameserver.recv(4096) == b"0"
    assert counted() == {}


def test_the_uproxy_asks_its_nameservers_itself(rig):
    def forward() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.sendto(b"forwarded", (OUTSIDE_V4, 53))

    with socket_at_peer(rig) as nameserver:
        rig.site.in_proxy(forward)
        assert nameserver.recv(4096) == b"forwarded"


def test_other_ports_are_none_of_its_business(rig, counted):
    def send() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.sendto(b"x", (KNOWN_V4, 54))

    with pytest.raises(PermissionError):
        rig.site.in_app(send)
    assert counted() == {"refused_protocol": 1}


def test_a_socket_bound_to_a_device_is_refused(rig):
    """It would not reach the uProxy; nor may it go past it."""

    def send() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.setsockopt(socket.SOL_SOCKET, 25, b"w0")
            sock.sendto(b"x", (OUTSIDE_V4, 53))

    with pytest.raises(PermissionError):
        rig.site.in_app(send)


def test_a_connected_one_is_unbound(rig):
    def send() -> bytes:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.settimeout(5)
            sock.setsockopt(socket.SOL_SOCKET, 25, b"w0")
            sock.connect((OUTSIDE_V4, 53))
            sock.send(b"0")
            return sock.recv(4096)

    with responder(rig):
        assert rig.site.in_app(send) == f"0 {OUTSIDE_V4} 53".encode()


def test_two_processes_that_begin_at_once_are_told_apart(rig):
    def race() -> None:
        children = []
        for nameserver in [OUTSIDE_V4, PEER_V4] * 4:
            child = os.fork()
            if child == 0:
                ok = all(ask(nameserver)[0][1:] == (nameserver, 53) for _ in range(20))
                os._exit(0 if ok else 1)
            children.append(child)
        assert [os.waitpid(child, 0)[1] for child in children] == [0] * 8

    with responder(rig):
        rig.site.in_app(race)


def route_to(rig: Rig, nameserver: str) -> str:
    with responder(rig, lambda asked: asked.route.name):
        ((answer, *_),) = rig.site.in_app(lambda: ask(nameserver))
    return answer.decode().removeprefix("0 ")


@pytest.mark.parametrize("nameserver", [PEER_V4, VIP_V4, UNKNOWN_V4, PEER_V6, f"::ffff:{PEER_V4}"])
def test_no_query_is_to_go_on_into_the_mesh_unless_a_service_says_so(rig, nameserver):
    """It would be in plaintext."""
    assert route_to(rig, nameserver) == Route.TUNNEL.name
    declared = (packed16(parse_address(plain(nameserver))), 53)
    rig.maps.datagrams.put(declared, maps.Target(1, maps.Route.PLAINTEXT), 1)
    assert route_to(rig, nameserver) == Route.UNKNOWN.name
    rig.maps.datagrams.delete(declared)
    assert route_to(rig, nameserver) == Route.TUNNEL.name


@pytest.mark.parametrize("nameserver", [OUTSIDE_V4, OUTSIDE_V6, EXCLUDED_V4, "127.0.0.53", WORKLOAD_V4, WORKLOAD_V6])
def test_elsewhere_it_may(rig, nameserver):
    assert route_to(rig, nameserver) == Route.UNKNOWN.name
