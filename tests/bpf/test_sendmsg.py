"""No datagram to a mesh address: there is no tunnel for it, and it would leave in plaintext."""

from __future__ import annotations

import ctypes
import os
import socket
import struct

import pytest

from tests.support.capture import (
    EXCLUDED_V4,
    KNOWN_V4,
    KNOWN_V6,
    OUTSIDE_V4,
    OUTSIDE_V6,
    PEER_V4,
    PEER_V6,
    UNKNOWN_V4,
    VIP_V4,
    VIP_V6,
    WORKLOAD_V4,
    WORKLOAD_V6,
)

pytestmark = pytest.mark.root
MESH = [VIP_V4, VIP_V6, KNOWN_V4, KNOWN_V6, UNKNOWN_V4, PEER_V4, PEER_V6, f"::ffff:{PEER_V4}"]
ELSEWHERE = [OUTSIDE_V4, OUTSIDE_V6, EXCLUDED_V4, f"::ffff:{OUTSIDE_V4}", WORKLOAD_V4, WORKLOAD_V6, "127.0.0.1", "::1"]


def datagram(address: str, port: int, *, connect: bool) -> None:
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM) as sock:
        if connect:
            sock.connect((address, port))
            sock.send(b"x")
        else:
            sock.sendto(b"x", (address, port))


@pytest.mark.parametrize("connect", [False, True])
@pytest.mark.parametrize("address", MESH)
@pytest.mark.parametrize("port", [53, 9999])
def test_to_a_mesh_address_is_refused(rig, counted, address, port, connect):
    with pytest.raises(PermissionError):
        rig.site.in_app(lambda: datagram(address, port, connect=connect))
    assert counted() == {"refused_protocol": 1}


@pytest.mark.parametrize("connect", [False, True])
@pytest.mark.parametrize("address", ELSEWHERE)
@pytest.mark.parametrize("port", [53, 9999])
def test_elsewhere_passes(rig, counted, address, port, connect):
    rig.site.in_app(lambda: datagram(address, port, connect=connect))
    assert counted() == {}


def test_sending_into_a_mesh_range_from_a_connected_socket_is_refused(rig):
    """connect() elsewhere, then sendto() with a mesh address."""

    def send() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.connect((OUTSIDE_V4, 53))
            sock.sendto(b"x", (PEER_V4, 9999))

    with pytest.raises(PermissionError):
        rig.site.in_app(send)


def send_as(made: int, named: int, address: str) -> None:
    """A datagram from a socket of one family, its IPv4 address named as of another: udpv6_sendmsg and udp_sendmsg take
    that, and Python does not make it.
    """
    end = struct.pack("=HH4s8x", named, socket.htons(9999), socket.inet_aton(address))
    with socket.socket(made, socket.SOCK_DGRAM) as sock:
        if ctypes.CDLL(None, use_errno=True).sendto(sock.fileno(), b"x", 1, 0, end, len(end)) < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


@pytest.mark.parametrize(
    ("made", "named"), [(socket.AF_INET6, socket.AF_INET), (socket.AF_INET, socket.AF_UNSPEC)], ids=["v4 on v6", "none"]
)
def test_an_address_of_another_family_than_the_sockets_is_looked_at(rig, counted, made, named):
    rig.site.in_app(lambda: send_as(made, named, OUTSIDE_V4))
    assert counted() == {}
    with pytest.raises(PermissionError):
        rig.site.in_app(lambda: send_as(made, named, PEER_V4))
    assert counted() == {"refused_protocol": 1}


def test_an_ipv4_address_that_an_ipv6_socket_is_connected_to_is_looked_at(rig, counted):
    def connect() -> None:
        made = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM, fileno=made.detach()) as named:
            named.connect((PEER_V4, 9999))

    with pytest.raises(PermissionError):
        rig.site.in_app(connect)
    assert counted() == {"refused_protocol": 1}
