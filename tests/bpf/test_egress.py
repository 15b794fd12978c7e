"""Registry-only egress: what is neither the mesh nor excluded from it cannot be reached."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from bpf.maps import Settings
from tests.bpf.dialling import dial
from tests.bpf.test_sendmsg import datagram
from tests.support.capture import (
    EXCLUDED_V4,
    OUTSIDE_V4,
    OUTSIDE_V6,
    VIP_V4,
    VIP_V6,
    WORKLOAD_V4,
    WORKLOAD_V6,
    listening,
)

pytestmark = pytest.mark.root


@pytest.fixture(autouse=True)
def registry_only(rig):
    rig.maps.settings.write(Settings(9, whole=True, registry_only=True))


@pytest.mark.parametrize("address", [OUTSIDE_V4, OUTSIDE_V6, f"::ffff:{OUTSIDE_V4}"])
def test_a_connection_that_leaves_the_mesh_is_refused(rig, counted, address):
    with rig.site.outside(), pytest.raises(ConnectionRefusedError):
        rig.site.in_app(lambda: dial(address))
    assert counted() == {"refused_egress": 1}


@pytest.mark.parametrize("connect", [False, True])
@pytest.mark.parametrize("port", [53, 9999])
@pytest.mark.parametrize("address", [OUTSIDE_V4, OUTSIDE_V6, f"::ffff:{OUTSIDE_V4}"])
def test_so_is_a_datagram(rig, counted, address, port, connect):
    with pytest.raises(PermissionError):
        rig.site.in_app(lambda: datagram(address, port, connect=connect))
    assert counted() == {"refused_egress": 1}


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_no_ping_socket_is_made(rig, counted, family):
    protocol = socket.IPPROTO_ICMP if family == socket.AF_INET else socket.IPPROTO_ICMPV6

    def make() -> None:
        Path("/proc/sys/net/ipv4/ping_group_range").write_text("0 0")  # else nobody may, mesh or not
        socket.socket(family, socket.SOCK_DGRAM, protocol).close()

    with pytest.raises(PermissionError):
        rig.site.in_app(make)
    assert counted() == {"refused_egress": 1}


@pytest.mark.parametrize("vip", [VIP_V4, VIP_V6])
def test_the_mesh_is_captured_as_ever(rig, counted, vip):
    with rig.site.uproxy():
        assert len(rig.site.in_app(lambda: dial(vip))) == 64
    assert counted() == {"captured": 1}


def test_what_is_excluded_is_left_alone(rig, counted):
    with rig.site.outside():
        assert rig.site.in_app(lambda: dial(EXCLUDED_V4)) == b"outside"
    rig.site.in_app(lambda: datagram(EXCLUDED_V4, 9999, connect=False))
    assert counted() == {}


@pytest.mark.parametrize("address", ["127.0.0.1", "::1", "0.0.0.0", WORKLOAD_V4, WORKLOAD_V6])
def test_so_are_loopback_and_own_addresses(rig, counted, address):
    with listening(rig.site.netns, rig.site.app, [("0.0.0.0", 8080), ("::", 8080)], lambda _: b"myself"):
        assert rig.site.in_app(lambda: dial(address, 8080)) == b"myself"
    assert counted() == {}


def test_the_uproxy_may_leave(rig):
    with rig.site.outside():
        assert rig.site.in_proxy(lambda: dial(OUTSIDE_V4)) == b"outside"
