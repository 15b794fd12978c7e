"""Sockets that the other hooks could not see are not made."""

from __future__ import annotations

import os
import socket

import pytest

from uproxy import linux

pytestmark = pytest.mark.root
_CLONE_NEWUSER = 0x10000000  # <linux/sched.h>


def make(family: int, kind: int, protocol: int) -> int:
    with socket.socket(family, kind, protocol) as sock:
        return sock.fileno()


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
@pytest.mark.parametrize("protocol", [socket.IPPROTO_TCP, socket.IPPROTO_UDP, socket.IPPROTO_RAW])
def test_raw_is_refused(rig, counted, family, protocol):
    with pytest.raises(PermissionError):
        rig.site.in_app(lambda: make(family, socket.SOCK_RAW, protocol))
    assert counted() == {"refused_protocol": 1}


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_SEQPACKET])
@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_sctp_is_refused_or_unknown(rig, family, kind):
    with pytest.raises(OSError, match=r"not permitted|not supported"):
        rig.site.in_app(lambda: make(family, kind, 132))


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_udp_lite_is_refused_or_unknown(rig, family):
    with pytest.raises(OSError, match=r"not permitted|not supported"):
        rig.site.in_app(lambda: make(family, socket.SOCK_DGRAM, 136))


@pytest.mark.parametrize(
    ("family", "kind", "protocol"),
    [
        (socket.AF_INET, socket.SOCK_STREAM, 0),
        (socket.AF_INET6, socket.SOCK_STREAM, 0),
        (socket.AF_INET, socket.SOCK_STREAM, 262),  # MPTCP
        (socket.AF_INET, socket.SOCK_DGRAM, 0),
        (socket.AF_INET6, socket.SOCK_DGRAM, 0),
        (socket.AF_UNIX, socket.SOCK_STREAM, 0),
        (socket.AF_NETLINK, socket.SOCK_RAW, 0),
    ],
)
def test_what_apps_use_is_made(rig, counted, family, kind, protocol):
    rig.site.in_app(lambda: make(family, kind, protocol))
    assert counted() == {}


@pytest.mark.parametrize("unshared", [0, _CLONE_NEWUSER], ids=["as it is", "in a user namespace"])
def test_packets_are_made_by_nobody_without_privileges(rig, unshared):
    """No hook is asked about packet sockets. They take CAP_NET_RAW over the network namespace."""

    def make_packets() -> None:
        os.setuid(65534)
        linux.unshare(unshared)
        make(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0800))

    with pytest.raises(PermissionError):
        rig.site.in_app(make_packets)


def test_the_uproxy_is_not_restricted(rig):
    rig.site.in_proxy(lambda: make(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_TCP))
