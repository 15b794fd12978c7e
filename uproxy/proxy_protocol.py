"""The header of the PROXY protocol, version 2 (HAProxy's doc/proxy-protocol.txt), which tells an application who calls.

It is written and never read: what a peer sends is the application's. No I/O.
"""

from __future__ import annotations

import socket
import struct
from typing import Final

from control.api.address import IpAddress
from control.api.identity import SpiffeId

PRINCIPAL: Final = 0xD0
"""Type of the TLV that holds the caller's SPIFFE ID: ztunnel's, and in Istio's Envoys `peer_principal`."""

_SIGNATURE: Final = b"\r\n\r\n\x00\r\nQUIT\n"
_VERSION_2_PROXY: Final = 0x21
_TCP_OVER_IPV4, _TCP_OVER_IPV6 = 0x11, 0x21
_START: Final = struct.Struct("!12sBBH")
_PORTS: Final = struct.Struct("!HH")
_TLV: Final = struct.Struct("!BH")

End = tuple[IpAddress, int]


def header(source: End, destination: End, principal: SpiffeId | None) -> bytes:
    """Who calls, from where, and what was dialled. `principal`: None where nobody has proved who that is."""
    if ":" in source[0] or ":" in destination[0]:
        family = _TCP_OVER_IPV6
        addresses = _ipv6(source[0]) + _ipv6(destination[0])
    else:
        family = _TCP_OVER_IPV4
        addresses = socket.inet_aton(source[0]) + socket.inet_aton(destination[0])
    body = addresses + _PORTS.pack(source[1], destination[1])
    if principal is not None:
        identity = str(principal).encode("ascii")
        body += _TLV.pack(PRINCIPAL, len(identity)) + identity
    return _START.pack(_SIGNATURE, _VERSION_2_PROXY, family, len(body)) + body


def _ipv6(address: IpAddress) -> bytes:
    """Beside an IPv6 address, an IPv4 address is mapped (RFC 4291 section 2.5.5.2), as HAProxy does."""
    return socket.inet_pton(socket.AF_INET6, address if ":" in address else f"::ffff:{address}")
