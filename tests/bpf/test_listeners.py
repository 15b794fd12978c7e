"""A uProxy's listeners make themselves known, the newest is in force, and plaintext goes to it where it said so."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import time

import pytest

from bpf import layout
from bpf.loader import Loader
from bpf.maps import Admission, Tuple
from control.api.address import packed16, parse_address
from tests.bpf.dialling import dial
from tests.support import capture
from tests.support.capture import PEER_V4, VIP_V4, VIP_V6, WORKLOAD_V4, WORKLOAD_V6, Rig, background, listening
from uproxy.node.places import NetworkNamespace
from uproxy.node.workloads import Workloads

pytestmark = pytest.mark.root
SOL, OPTION = layout.constant("MESH_SOL"), layout.constant("MESH_SO_PLAINTEXT")
BOTH = [("0.0.0.0", 15006), ("::", 15006)]
ADDRESSES = [WORKLOAD_V4, WORKLOAD_V6]


def cookie(rig: Rig) -> int:
    return NetworkNamespace.of(rig.site.netns).cookie


def known(rig: Rig, netns_cookie: int) -> set[tuple[int, int]]:
    """Port and family of the listeners of a namespace."""
    return {(port, family) for netns, port, family in rig.maps.listeners.items() if netns == netns_cookie}


def uproxy(rig: Rig, ends: list[tuple[str, int]], name: bytes):
    """A stand-in whose listeners others may share."""
    listeners: list[socket.socket] = []

    def ready() -> None:
        for address, port in ends:
            listener = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
            for option in (socket.SO_REUSEADDR, socket.SO_REUSEPORT):
                listener.setsockopt(socket.SOL_SOCKET, option, 1)
            if ":" in address:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            listener.bind((address, port))
            listener.listen(64)
            listener.setblocking(False)
            listeners.append(listener)

    def serve() -> None:
        while True:
            for listener in listeners:
                with contextlib.suppress(BlockingIOError):
                    connection, _ = listener.accept()
                    connection.sendall(name)
                    connection.close()
            time.sleep(0.001)

    return background(rig.site.netns, rig.site.proxy, serve, ready)


def open_to_plaintext(rig: Rig, *ports: int, others: bool = False) -> None:
    packed = b"".join(port.to_bytes(2, sys.byteorder) for port in ports)
    value = layout.pack("mesh_plaintext", others=others, count=len(ports), ports=packed)
    rig.site.in_proxy(lambda: set_option(value))


def set_option(value: bytes) -> None:
    with socket.socket() as sock:
        sock.setsockopt(SOL, OPTION, value)


@pytest.fixture
def closed(rig):
    """Nothing is open to plaintext, at first and afterwards."""
    rig.maps.plaintext.delete(cookie(rig))
    yield
    rig.maps.plaintext.delete(cookie(rig))


def local_end(connection: socket.socket) -> bytes:
    return "{} {}".format(*connection.getsockname()[:2]).encode()


# -- who listens


def test_a_listener_is_known_until_it_is_closed(rig):
    own = cookie(rig)

    def look() -> tuple[set[tuple[int, int]], ...]:
        before = known(rig, own)
        listeners = [socket.create_server(("127.0.0.1", port)) for port in (15001, 15006, 15008, 15020)]
        during = known(rig, own)
        for listener in listeners:
            listener.close()
        return before, during, known(rig, own)

    ours = {(port, int(socket.AF_INET)) for port in (15001, 15006, 15008)}
    assert rig.site.in_proxy(look) == (set(), ours, set())


def test_a_killed_uproxys_listeners_are_gone_and_dialling_it_is_refused(rig):
    own = cookie(rig)
    with uproxy(rig, [(WORKLOAD_V4, 15008), (WORKLOAD_V6, 15008)], b"first") as child:
        assert len(known(rig, own)) == 2
        assert rig.site.at_peer(lambda: dial(WORKLOAD_V4, 15008)) == b"first"
        os.kill(child, signal.SIGKILL)
        deadline = time.monotonic() + 5
        while known(rig, own) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert known(rig, own) == set()
        for address in ADDRESSES:
            with pytest.raises(ConnectionRefusedError):
                rig.site.at_peer(lambda address=address: dial(address, 15008))


def test_a_listener_of_another_cgroup_is_not_known(rig):
    own = cookie(rig)

    def listen() -> set[tuple[int, int]]:
        with socket.create_server(("127.0.0.1", 15008)):
            return known(rig, own)

    assert capture.run_inside(rig.site.netns, None, listen) == set()


@pytest.mark.parametrize("address", ADDRESSES)
def test_a_newer_uproxy_takes_over_at_once(rig, address):
    ends = [(address, 15008)]

    def answers() -> set[bytes]:
        return {dial(address, 15008) for _ in range(40)}

    with uproxy(rig, ends, b"first"):
        with uproxy(rig, ends, b"second"):
            assert rig.site.at_peer(answers) == {b"second"}
            with uproxy(rig, ends, b"third"):
                assert rig.site.at_peer(answers) == {b"third"}
            # What it leaves is what the kernel's own look-up finds.
            assert rig.site.at_peer(answers) <= {b"first", b"second"}
        assert rig.site.at_peer(answers) == {b"first"}


@pytest.mark.parametrize("vip", [VIP_V4, VIP_V6])
def test_a_newer_uproxy_gets_what_is_captured(rig, vip):
    ends = [("127.0.0.1", 15001), ("::1", 15001)]
    with uproxy(rig, ends, b"first"), uproxy(rig, ends, b"second"):
        assert rig.site.in_app(lambda: {dial(vip) for _ in range(40)}) == {b"second"}


def test_no_connection_is_lost_while_uproxies_replace_each_other(rig):
    ends = [(WORKLOAD_V4, 15008)]
    read, write = os.pipe()

    def dial_on() -> None:
        deadline, done = time.monotonic() + 1.5, 0
        with contextlib.suppress(OSError):
            while time.monotonic() < deadline:
                done += dial(WORKLOAD_V4, 15008) in (b"0", b"1", b"2", b"3")
        os.write(write, f"{time.monotonic() >= deadline} {done}".encode())
        time.sleep(30)

    with contextlib.ExitStack() as running:
        running.enter_context(uproxy(rig, ends, b"0"))
        running.enter_context(background(rig.site.peer, None, dial_on, lambda: None))
        for number in (1, 2, 3):
            time.sleep(0.2)
            running.enter_context(uproxy(rig, ends, b"%d" % number))
        to_the_end, done = os.read(read, 64).split()
    assert to_the_end == b"True", "a connection failed"
    assert int(done) > 100


def test_without_an_agent_a_uproxy_still_makes_itself_known():
    with capture.site() as site, capture.pins() as pins:
        with Loader(pins / "maps") as loader, site.registration() as registration:
            capture.fill(loader.maps)
            Workloads(loader, pins / "links").register(registration)
        # Nobody holds the programs but their pins.
        ends = [(WORKLOAD_V4, 15008), ("0.0.0.0", 15006), ("127.0.0.1", 15001)]
        ports = layout.pack("mesh_plaintext", count=1, ports=(8080).to_bytes(2, "little"))
        for answer in (b"first", b"second"):
            with listening(site.netns, site.proxy, ends, lambda _, answer=answer: answer):
                site.in_proxy(lambda: set_option(ports))
                assert site.at_peer(lambda: dial(WORKLOAD_V4, 15008)) == answer
                assert site.at_peer(lambda: dial(WORKLOAD_V4, 8080)) == answer
                assert site.in_app(lambda: dial(VIP_V4)) == answer
            with pytest.raises(ConnectionRefusedError):
                site.at_peer(lambda: dial(WORKLOAD_V4, 8080))


# -- plaintext


@pytest.mark.parametrize("address", ADDRESSES)
def test_plaintext_goes_to_the_uproxy_and_says_where_it_was_dialled(rig, counted, closed, address):
    open_to_plaintext(rig, 8080)
    with (
        listening(rig.site.netns, rig.site.proxy, [("127.0.0.1", 15006), ("::1", 15006)], local_end),
        listening(rig.site.netns, rig.site.app, [(address, 8080), (address, 8081)], lambda _: b"the app"),
    ):
        assert rig.site.at_peer(lambda: dial(address, 8080)).decode() == f"{address} 8080"
        assert counted() == {"plaintext_syn": 1}
        for port in (8081, 15001, 15006, 15020):
            with pytest.raises(ConnectionRefusedError):
                rig.site.at_peer(lambda port=port: dial(address, port))
        assert counted(drops=True) == {"plaintext_syn": 1, "dropped_syn": 4}
        assert rig.site.in_proxy(lambda: dial(address, 8080)) == b"the app"


@pytest.mark.parametrize("address", ADDRESSES)
def test_all_but_some_ports_are_open(rig, closed, address):
    open_to_plaintext(rig, 8081, 9000, others=True)
    with listening(rig.site.netns, rig.site.proxy, BOTH, lambda _: b"uproxy"):
        assert rig.site.at_peer(lambda: dial(address, 8080)) == b"uproxy"
        for port in (8081, 9000, *range(15000, 15091, 10), 15006):
            if port != 15008:
                with pytest.raises(ConnectionRefusedError):
                    rig.site.at_peer(lambda port=port: dial(address, port))


def test_as_many_ports_as_fit_are_open_and_no_more(rig, closed):
    most = layout.constant("MESH_PLAINTEXT_PORTS")
    ports = range(2000, 2000 + most)
    open_to_plaintext(rig, *ports)
    with listening(rig.site.netns, rig.site.proxy, BOTH, lambda _: b"uproxy"):
        assert rig.site.at_peer(lambda: dial(WORKLOAD_V4, 2000 + most - 1)) == b"uproxy"
        with pytest.raises(ConnectionRefusedError):
            rig.site.at_peer(lambda: dial(WORKLOAD_V4, 2000 + most))


@pytest.mark.parametrize("address", ADDRESSES)
def test_without_a_uproxy_what_is_open_is_closed(rig, counted, closed, address):
    open_to_plaintext(rig, 8080)
    with (
        listening(rig.site.netns, rig.site.app, [(address, 8080)], lambda _: b"the app"),
        pytest.raises(ConnectionRefusedError),
    ):
        rig.site.at_peer(lambda: dial(address, 8080))
    assert counted(drops=True) == {"dropped_syn": 1}


def test_what_is_admitted_goes_to_the_app_all_the_same(rig, closed):
    open_to_plaintext(rig, 8080)

    def bound() -> bytes:
        with socket.socket() as sock:
            sock.settimeout(5)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((PEER_V4, 42000))
            sock.connect((WORKLOAD_V4, 8080))
            return sock.recv(16)

    ends = (packed16(parse_address(PEER_V4)), 42000), (packed16(WORKLOAD_V4), 8080)
    rig.maps.admitted.put(Tuple(cookie(rig), *ends), time.monotonic_ns(), Admission.PROBE)
    try:
        with (
            listening(rig.site.netns, rig.site.proxy, BOTH, lambda _: b"uproxy"),
            listening(rig.site.netns, rig.site.app, [(WORKLOAD_V4, 8080)], lambda _: b"the app"),
        ):
            assert rig.site.at_peer(bound) == b"the app"
    finally:
        rig.maps.admitted.delete(Tuple(cookie(rig), *ends))


def test_a_set_replaces_the_one_before(rig, closed):
    open_to_plaintext(rig, 8080)
    open_to_plaintext(rig, 8081)
    assert rig.maps.plaintext.items()[cookie(rig)] == (False, (8081,))
    with listening(rig.site.netns, rig.site.proxy, BOTH, lambda _: b"uproxy"):
        with pytest.raises(ConnectionRefusedError):
            rig.site.at_peer(lambda: dial(WORKLOAD_V4, 8080))
        assert rig.site.at_peer(lambda: dial(WORKLOAD_V4, 8081)) == b"uproxy"


def test_an_app_cannot_open_a_port(rig, closed):
    value = layout.pack("mesh_plaintext", others=True)
    with pytest.raises(OSError, match="Protocol not available"):
        rig.site.in_app(lambda: set_option(value))
    with pytest.raises(OSError, match="Protocol not available"):
        capture.run_inside(rig.site.netns, None, lambda: set_option(value))
    assert cookie(rig) not in rig.maps.plaintext.items()


@pytest.mark.parametrize("wrong", [b"", b"\1\0", layout.pack("mesh_plaintext", others=True, count=65)])
def test_what_makes_no_sense_closes_all_ports(rig, closed, wrong):
    open_to_plaintext(rig, 8080)
    with pytest.raises(OSError, match=r"Protocol not available|Invalid argument"):
        rig.site.in_proxy(lambda: set_option(wrong))
    assert cookie(rig) not in rig.maps.plaintext.items()


def test_other_options_are_as_ever(rig):
    def nagle() -> int:
        with socket.socket() as sock:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with pytest.raises(OSError, match="Protocol not available"):
                sock.setsockopt(SOL, OPTION + 1, b"1234")
            return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)

    assert rig.site.in_proxy(nagle) != 0


def test_a_captured_connection_is_none_of_the_plaintext_ports_business(rig, closed):
    open_to_plaintext(rig, others=True)
    with rig.site.uproxy(), listening(rig.site.netns, rig.site.proxy, BOTH, lambda _: b"uproxy"):
        assert len(rig.site.in_app(lambda: dial(VIP_V4))) == 64
        with rig.site.outside():
            assert rig.site.in_app(lambda: dial(capture.OUTSIDE_V4)) == b"outside"
