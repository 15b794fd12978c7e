"""Whether a workload's address is reached over a link that nobody else is on (rtnetlink(7)).

The direct path is native TCP, and only the way there keeps it from a neighbour's hands: on a segment that others share,
such as a bridge, one of them could take the address by ARP. So the host's route to the address must end in a veth
that is no bridge's port, and its other end must be in the workload's namespace.
"""

from __future__ import annotations

import socket
import struct
import sys
from typing import Final

from control.api.address import IpAddress
from uproxy.node import netlink
from uproxy.node.netlink import Netlink, attribute, attributes

# <linux/rtnetlink.h>, <linux/if_link.h>, <linux/net_namespace.h>
_GET_LINK, _GET_ROUTE, _GET_NSID = 18, 26, 90
_ROUTE: Final = struct.Struct("=BBBBBBBBI")  # struct rtmsg: the type is the last of the bytes
_LINK: Final = struct.Struct("=BxHiII")  # struct ifinfomsg
_TO_ONE: Final = 1  # RTN_UNICAST
_DESTINATION, _OUT, _GATEWAY, _NEXT_HOPS, _VIA = 1, 4, 5, 9, 18  # RTA_
_PEER, _MASTER, _INFO, _PEER_NAMESPACE = 5, 10, 18, 37  # IFLA_
_KIND: Final = 1  # IFLA_INFO_KIND
_NSID, _FD = 1, 3  # NETNSA_
_GENERIC_BYTES: Final = 4  # struct rtgenmsg, padded


def shared(address: IpAddress, netns_fd: int) -> str:
    """Why others may be on the way to this address of that namespace; empty when it is theirs alone.

    Of the calling thread's namespace, which is the host's. Raises OSError.
    """
    with Netlink(netlink.ROUTE) as ask:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        raw = socket.inet_pton(family, address)
        request = _ROUTE.pack(family, 8 * len(raw), 0, 0, 0, 0, 0, 0, 0) + attribute(_DESTINATION, raw)
        (route, *_) = ask.ask(_GET_ROUTE, request)
        fields = attributes(route[_ROUTE.size :])
        if (
            _ROUTE.unpack_from(route)[7] != _TO_ONE
            or fields.keys() & {_GATEWAY, _NEXT_HOPS, _VIA}
            or _OUT not in fields
        ):
            return f"this host's route to {address} does not end at an interface of its own"
        index = _number(fields[_OUT])
        (link, *_) = ask.ask(_GET_LINK, _LINK.pack(0, 0, index, 0, 0))
        found = attributes(link[_LINK.size :])
        kind = attributes(found.get(_INFO, b"")).get(_KIND, b"").rstrip(b"\0")
        if kind != b"veth":
            return f"{address} is reached over an interface that is no veth"
        if _MASTER in found:
            return f"{address} is reached over a port of a bridge, where a neighbour could take the address"
        nsid = ask.ask(_GET_NSID, bytes(_GENERIC_BYTES) + attribute(_FD, _packed(netns_fd)))
        expected = attributes(nsid[0][_GENERIC_BYTES:]).get(_NSID) if nsid else None
        if expected is None or _number(expected) < 0 or found.get(_PEER_NAMESPACE) != expected:
            return f"the veth to {address} does not end in the workload's namespace"
    return ""


def _number(raw: bytes) -> int:
    return int.from_bytes(raw[:4], sys.byteorder, signed=True)


def _packed(number: int) -> bytes:
    return number.to_bytes(4, sys.byteorder)
