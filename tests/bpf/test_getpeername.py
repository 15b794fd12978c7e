"""An app sees the address that it dialled."""

from __future__ import annotations

import socket

import pytest

from tests.bpf.dialling import connected, disconnect
from tests.support.capture import EXCLUDED_V4, KNOWN_V6, OUTSIDE_V4, PORT, VIP_V4, VIP_V6

pytestmark = pytest.mark.root


@pytest.mark.parametrize(
    ("address", "family", "shown"),
    [
        (VIP_V4, socket.AF_INET, (VIP_V4, PORT)),
        (VIP_V6, socket.AF_INET6, (VIP_V6, PORT, 0, 0)),
        (KNOWN_V6, socket.AF_INET6, (KNOWN_V6, PORT, 0, 0)),
        (f"::ffff:{VIP_V4}", socket.AF_INET6, (f"::ffff:{VIP_V4}", PORT, 0, 0)),
    ],
)
def test_a_captured_connection_shows_what_was_dialled(rig, address, family, shown):
    def peer():
        with connected(address, family=family) as sock:
            return sock.getpeername()

    with rig.site.uproxy():
        assert rig.site.in_app(peer) == shown


@pytest.mark.parametrize("address", [OUTSIDE_V4, EXCLUDED_V4])
def test_a_connection_left_alone_shows_its_peer(rig, address):
    def peer():
        with connected(address) as sock:
            return sock.getpeername()

    with rig.site.outside():
        assert rig.site.in_app(peer) == (address, PORT)


def test_an_unconnected_socket_has_no_peer(rig):
    def peer():
        with connected(VIP_V4) as sock:
            disconnect(sock)
            sock.getpeername()

    with rig.site.uproxy(), pytest.raises(OSError, match="not connected"):
        rig.site.in_app(peer)


def test_the_uproxy_sees_the_apps_source_port(rig):
    def name():
        with connected(VIP_V4) as sock:
            return sock.getsockname()

    with rig.site.uproxy():
        address, port = rig.site.in_app(name)
    assert address == "127.0.0.1"
    assert port > 15090
