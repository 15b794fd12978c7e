"""Where a captured connection was going: getsockopt(SO_ORIGINAL_DST) on the accepted socket.

The kernel's answer is `struct mesh_orig_dst` of bpf/mesh.h when our eBPF hook gave it, or a bare sockaddr when NAT
brought it here (nftables): then the route is unknown and is resolved here like any other.
"""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import lru_cache

from control.api.address import IpAddress, from_packed
from uproxy.errors import Flag, RefusedError

OUTBOUND_PORT = 15001
# Dialling these from a captured workload is captured always: a uProxy that dials them proves capture (bpf/mesh.h).
PROBE_V4, PROBE_V6 = IpAddress("240.240.255.255"), IpAddress("fd75:5072:6f78::ffff")
PROBE_PORT = 15021

# linux/netfilter_ipv4.h and netfilter_ipv6/ip6_tables.h: the same number at the level of each family.
_SO_ORIGINAL_DST = 80

# sockaddr[28], magic, version, route, service_id, backend, drawn, generation, reserved (bpf/mesh.h; tests compare it).
ORIG_DST = struct.Struct("=28sIHHIIIQQ")
ORIG_DST_MAGIC = 0x75505859
ORIG_DST_VERSION = 1

# Of conntrack's answers; it copies a sockaddr and leaves the rest of a larger buffer as it was.
_SOCKADDR_IN_BYTES, _SOCKADDR_IN6_BYTES = 16, 28


class Route(IntEnum):
    """What the kernel decided at connect(): a hint, which the proxy checks."""

    UNKNOWN = 0
    TUNNEL = 1
    WAYPOINT = 2
    PROBE = 3


@dataclass(frozen=True, slots=True)
class OriginalDestination:
    address: IpAddress
    port: int
    route: Route
    drawn: int = 0
    """`resolve.backend_id` of the service's endpoint that the kernel drew by weight; 0: it drew none."""


def original_destination(sock: socket.socket) -> OriginalDestination:
    """Ask eBPF where this accepted connection was going. No entry is a refusal: it was never captured."""
    return _asked(sock, ORIG_DST.size)


def redirected_destination(sock: socket.socket) -> OriginalDestination:
    """Ask conntrack, where nftables captures. It knows untouched connections too, which are refused here."""
    found = _asked(sock, _SOCKADDR_IN6_BYTES if sock.family == socket.AF_INET6 else _SOCKADDR_IN_BYTES)
    if (found.address, found.port) == sock.getsockname()[:2]:
        raise _not_captured(f"{found.address} itself was dialled")
    if found.port == PROBE_PORT and found.address in (PROBE_V4, PROBE_V6):
        return replace(found, route=Route.PROBE)
    return found


def _asked(sock: socket.socket, size: int) -> OriginalDestination:
    level = socket.IPPROTO_IPV6 if sock.family == socket.AF_INET6 else socket.IPPROTO_IP
    try:
        return parse_original_destination(sock.getsockopt(level, _SO_ORIGINAL_DST, size))
    except (OSError, ValueError) as error:
        raise _not_captured(str(error)) from error


def _not_captured(why: str) -> RefusedError:
    return RefusedError(
        "not-captured",
        f"the kernel knows no original destination ({why}); only captured connections may come here",
        flag=Flag.DENY,
    )


@lru_cache(maxsize=1024)  # of one destination the kernel says the same each time
def parse_original_destination(answer: bytes) -> OriginalDestination:
    """Read the kernel's answer: 16 or 28 bytes of sockaddr, or the whole structure. Raises ValueError."""
    if len(answer) < 16:
        raise ValueError(f"{len(answer)} bytes are no sockaddr")
    family = int.from_bytes(answer[:2], "little" if socket.htons(1) != 1 else "big")
    port = int.from_bytes(answer[2:4], "big")
    if family == socket.AF_INET:
        packed = answer[4:8]
    elif family == socket.AF_INET6 and len(answer) >= 28:
        packed = answer[8:24]
    else:
        raise ValueError(f"address family {family} in {len(answer)} bytes")
    route, drawn = Route.UNKNOWN, 0
    if len(answer) == ORIG_DST.size:
        _, magic, version, number, _, _, drawn_id, *_ = ORIG_DST.unpack(answer)
        if magic == ORIG_DST_MAGIC:
            if version != ORIG_DST_VERSION:
                raise ValueError(f"mesh_orig_dst version {version}; this uProxy reads {ORIG_DST_VERSION}")
            route, drawn = Route(number), drawn_id
    return OriginalDestination(from_packed(packed), port, route, drawn)
