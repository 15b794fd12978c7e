"""The header of the PROXY protocol, version 2 (HAProxy's doc/proxy-protocol.txt), which tells an application who calls.

What a peer sends is the application's, so an application's is written and never read. A waypoint's process beside a
workload gets one with each connection, from its uProxy, and reads it. No I/O.
"""

from __future__ import annotations

import ipaddress
import socket
import struct
from dataclasses import dataclass
from typing import Final

from control.api.address import IpAddress
from control.api.identity import IdentityError, SpiffeId

PRINCIPAL: Final = 0xD0
"""Type of the TLV that holds the caller's SPIFFE ID: ztunnel's, and in Istio's Envoys `peer_principal`."""

AUTHORITY: Final = 0x02
"""Of the TLV that holds the name that the caller dialled."""
UNIQUE_ID: Final = 0x05
"""Of the TLV that holds the id by which proxies' records name the connection."""
MAX_BODY: Final = 4096
"""Bytes behind the first 16, of a header that is read: what we write has some 400."""

_SIGNATURE: Final = b"\r\n\r\n\x00\r\nQUIT\n"
_VERSION_2_PROXY: Final = 0x21
_TCP_OVER_IPV4, _TCP_OVER_IPV6 = 0x11, 0x21
_MAPPED: Final = bytes(10) + b"\xff\xff"
_WIDTHS: Final = {_TCP_OVER_IPV4: 4, _TCP_OVER_IPV6: 16}
"""Family -> bytes of an address."""
_START: Final = struct.Struct("!12sBBH")
_PORTS: Final = struct.Struct("!HH")
_TLV: Final = struct.Struct("!BH")

End = tuple[IpAddress, int]


class HeaderError(ValueError):
    """What comes first is no header of ours."""


@dataclass(frozen=True, slots=True)
class Header:
    """One that was read."""

    length: int
    """Of all of it, in bytes."""
    source: End
    destination: End
    principal: SpiffeId
    authority: bytes
    """Empty: not said."""
    unique_id: str


def header(
    source: End, destination: End, principal: SpiffeId | None, *, authority: bytes = b"", unique_id: bytes = b""
) -> bytes:
    """Who calls, from where, and what was dialled. `principal`: None where nobody has proved who that is.

    `authority`, `unique_id`: left out where they are empty.
    """
    if ":" in source[0] or ":" in destination[0]:
        family = _TCP_OVER_IPV6
        addresses = _ipv6(source[0]) + _ipv6(destination[0])
    else:
        family = _TCP_OVER_IPV4
        addresses = socket.inet_aton(source[0]) + socket.inet_aton(destination[0])
    body = addresses + _PORTS.pack(source[1], destination[1])
    identity = str(principal).encode("ascii") if principal is not None else b""
    for kind, value in ((AUTHORITY, authority), (UNIQUE_ID, unique_id), (PRINCIPAL, identity)):
        if value:
            body += _TLV.pack(kind, len(value)) + value
    return _START.pack(_SIGNATURE, _VERSION_2_PROXY, family, len(body)) + body


def read(start: bytes) -> Header | None:
    """The header that a connection begins with; None while more of it is to come. Raises HeaderError."""
    if start[: len(_SIGNATURE)] != _SIGNATURE[: len(start)]:
        raise HeaderError("it does not begin as a header of version 2 does")
    if len(start) < _START.size:
        return None
    _, version, family, length = _START.unpack_from(start)
    if version != _VERSION_2_PROXY or family not in _WIDTHS or length > MAX_BODY:
        raise HeaderError(f"version and command {version:#x}, family {family:#x}, {length} bytes: not what we write")
    if len(start) < _START.size + length:
        return None
    body = start[_START.size : _START.size + length]
    width = _WIDTHS[family]
    if length < 2 * width + _PORTS.size:
        raise HeaderError("it is too short for its addresses")
    source, destination = (_address(body[at : at + width]) for at in (0, width))
    source_port, destination_port = _PORTS.unpack_from(body, 2 * width)
    values = _values(body[2 * width + _PORTS.size :])
    try:
        principal = SpiffeId.parse(values.get(PRINCIPAL, b"").decode("ascii"))
        unique_id = values.get(UNIQUE_ID, b"").decode("ascii")
    except (ValueError, IdentityError) as error:
        raise HeaderError(f"it does not say who calls: {error}") from None
    return Header(
        _START.size + length,
        (source, source_port),
        (destination, destination_port),
        principal,
        values.get(AUTHORITY, b""),
        unique_id,
    )


def _values(body: bytes) -> dict[int, bytes]:
    """Raises HeaderError."""
    found: dict[int, bytes] = {}
    at = 0
    while at < len(body):
        if len(body) - at < _TLV.size:
            raise HeaderError("its last value is cut short")
        kind, length = _TLV.unpack_from(body, at)
        at += _TLV.size
        if length > len(body) - at:
            raise HeaderError("its last value is cut short")
        if kind in found:
            raise HeaderError(f"it says value {kind:#x} twice")
        found[kind] = body[at : at + length]
        at += length
    return found


def _address(packed: bytes) -> IpAddress:
    """An IPv4 address that is mapped is one."""
    return IpAddress(str(ipaddress.ip_address(packed[12:] if packed[:12] == _MAPPED else packed)))


def _ipv6(address: IpAddress) -> bytes:
    """Beside an IPv6 address, an IPv4 address is mapped (RFC 4291 section 2.5.5.2), as HAProxy does."""
    return socket.inet_pton(socket.AF_INET6, address if ":" in address else f"::ffff:{address}")
