"""The original destination's way to the accepted socket, and that nothing of it is left behind."""

from __future__ import annotations

import os
import select
import signal
import socket
import time

import pytest

from bpf import layout, libbpf
from tests.bpf.dialling import connected, dial
from tests.support.capture import (
    KNOWN_V4,
    KNOWN_V6,
    NOT_CAPTURED,
    VIP_V4,
    VIP_V6,
    Rig,
    background,
)

pytestmark = pytest.mark.root


def eventually_empty(rig: Rig) -> None:
    deadline = time.monotonic() + 5
    while len(rig.maps.orig) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(rig.maps.orig) == 0


def test_two_thousand_connections_leave_no_entry(rig, counted):
    def many() -> int:
        done = 0
        for number in range(2000):
            address = (VIP_V4, VIP_V6, KNOWN_V4, KNOWN_V6)[number % 4]
            done += len(dial(address)) == 64
        return done

    with rig.site.uproxy():
        assert rig.site.in_app(many) == 2000
    assert counted() == {"captured": 2000}
    assert len(rig.maps.orig) == 0


def test_many_at_once_do_not_mix_up_their_destinations(rig):
    def many() -> tuple[bool, int]:
        socks = []
        for number in range(250):  # of 1,024 descriptors, the usual limit, the tests hold half
            port = 1000 + number
            socks.append((port, connected(KNOWN_V4, port)))
        right = all(int.from_bytes(sock.recv(64)[2:4], "big") == port for port, sock in socks)
        return right, len(rig.maps.orig)

    with rig.site.uproxy():
        # An entry lives until the accept, not until the close: the map holds pending connections, not open ones.
        assert rig.site.in_app(many) == (True, 0)


def test_with_nobody_listening_nothing_is_left(rig):
    def many() -> int:
        refused = 0
        for _ in range(200):
            try:
                dial(VIP_V4)
            except ConnectionRefusedError:
                refused += 1
        return refused

    assert rig.site.in_app(many) == 200
    assert len(rig.maps.orig) == 0


def full_listener(rig: Rig):
    """A uProxy that does not accept: one connection fits its queue, the SYNs of the rest are dropped."""
    held: list[socket.socket] = []

    def ready() -> None:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", 15001))
        listener.listen(0)
        held.append(listener)

    return background(rig.site.netns, rig.site.proxy, lambda: time.sleep(60), ready)


def start(count: int) -> list[socket.socket]:
    socks = []
    for _ in range(count):
        sock = socket.socket()
        sock.setblocking(False)
        sock.connect_ex((VIP_V4, 80))
        socks.append(sock)
    return socks


def test_close_before_the_handshake_ends_leaves_nothing(rig):
    pending: list[int] = []

    def give_up() -> int:
        socks = start(8)
        time.sleep(0.1)
        waiting = len(rig.maps.orig)
        for sock in socks:
            sock.close()
        return waiting

    with full_listener(rig):
        pending.append(rig.site.in_app(give_up))
        assert pending[0] > 0, "no SYN was dropped: the test proves nothing"
        eventually_empty(rig)


def test_sigkill_before_the_handshake_ends_leaves_nothing(rig):
    socks: list[socket.socket] = []

    def ready() -> None:
        socks.extend(start(8))
        time.sleep(0.1)

    with full_listener(rig):
        with background(rig.site.netns, rig.site.app, signal.pause, ready) as child:
            assert len(rig.maps.orig) > 0
            os.kill(child, signal.SIGKILL)
        eventually_empty(rig)


def test_syn_cookies_carry_the_destination(rig):
    def always_cookies(value: str) -> None:
        with open("/proc/sys/net/ipv4/tcp_syncookies", "w") as sysctl:
            sysctl.write(value)

    rig.site.in_proxy(lambda: always_cookies("2"))
    try:
        with rig.site.uproxy():
            assert len(rig.site.in_app(lambda: dial(VIP_V4))) == 64
            assert len(rig.site.in_app(lambda: dial(VIP_V6))) == 64
    finally:
        rig.site.in_proxy(lambda: always_cookies("1"))
    assert len(rig.maps.orig) == 0


def test_dialling_the_uproxys_port_directly_is_not_captured(rig, counted):
    with rig.site.uproxy():
        assert rig.site.in_app(lambda: dial("127.0.0.1", 15001)) == NOT_CAPTURED
        assert rig.site.in_app(lambda: dial("::1", 15001)) == NOT_CAPTURED
    assert counted() == {"orig_missing": 2}


def test_the_same_source_port_elsewhere_does_not_take_a_destination_away(rig):
    """A connection that is left alone may share its source port with one that waits for its accept."""

    def share() -> bool:
        first = socket.socket()
        first.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        first.bind(("127.0.0.1", 20202))
        first.setblocking(False)
        first.connect_ex((VIP_V4, 80))
        second = socket.socket()
        second.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        second.bind(("127.0.0.1", 20202))
        second.connect_ex(("127.0.0.1", 9))
        second.close()
        select.select([first], [], [], 5)
        answer = first.recv(64)
        first.close()
        return answer != NOT_CAPTURED

    with rig.site.uproxy():
        assert rig.site.in_app(share)


def test_a_full_map_refuses_and_evicts_nobody(rig, counted):
    keys = [
        layout.pack("mesh_orig_key", netns_cookie=1, port=n % 65536, addr=n.to_bytes(16, "big")) for n in range(65536)
    ]
    value = bytes(layout.sizeof("struct mesh_orig_dst"))
    for key in keys:
        libbpf.update(rig.maps.orig.fd, key, value)
    try:
        with rig.site.uproxy():
            assert rig.site.in_app(lambda: dial(VIP_V4)) == NOT_CAPTURED
        assert counted() == {"captured": 1, "orig_full": 1, "orig_missing": 1}
    finally:
        for key in keys:
            assert libbpf.delete(rig.maps.orig.fd, key)
