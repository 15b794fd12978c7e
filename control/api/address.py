"""IP addresses and blocks as canonical text, so that equal addresses are equal strings.

A v4-mapped IPv6 address (`::ffff:10.0.0.1`) is the IPv4 address it carries: kernels hand out both forms for
one peer.
"""

from __future__ import annotations

import ipaddress
import re
from typing import Final, NewType

IpAddress = NewType("IpAddress", str)
"""Canonical text of an address: `10.0.0.1`, `fd00::1`."""

IpBlock = NewType("IpBlock", str)
"""Canonical text of a CIDR block: `10.0.0.0/8`, `fd00::1/128`."""

HBONE_PORT: Final = 15008
"""Where every mesh address takes tunnels (Istio: "Ports used by Istio")."""
FORBIDDEN_PORTS: Final = frozenset({15000, 15001, 15006, HBONE_PORT, 15053, 15080, 15090})
"""A uProxy's own: no peer and no health probe may reach the admin port, or make the proxy dial itself. 15020 (metrics)
and 15021 (readiness) are meant to be read, by whom policy allows."""

# Canonical IPv4, which most of a mesh's addresses are: `ipaddress` takes ten times as long to say the same.
_IPV4: Final = re.compile(r"(?:(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])(?:\.(?!$)|$)){4}")
_MAPPED_PREFIX: Final = bytes(10) + b"\xff\xff"
_LONGEST_TEXT: Final = 64  # the longest form, a v4-mapped address with a prefix length, has 49 characters


class AddressError(ValueError):
    """Text that is no address or block; the message says what would be."""


def parse_address(text: str) -> IpAddress:
    """Canonical form of one address. Raises AddressError: a name, a zone (`%eth0`), a port, leading zeros."""
    if _IPV4.fullmatch(text):
        return IpAddress(text)
    if len(text) > _LONGEST_TEXT:
        raise AddressError("not an IP address: too long")
    if "%" in text:
        raise AddressError(f"{text!r} has a zone; a mesh address is valid everywhere: drop the part from '%' on")
    try:
        return _canonical(ipaddress.ip_address(text))
    except ValueError:
        raise AddressError(f"{text!r} is not an IP address (such as 10.0.0.1 or fd00::1)") from None


def parse_block(text: str) -> IpBlock:
    """Canonical form of a CIDR block; a bare address is a block of one. Raises AddressError."""
    if len(text) > _LONGEST_TEXT:
        raise AddressError("not a CIDR block: too long")
    _, slash, length = text.partition("/")
    # ip_network() would take a netmask ("10.0.0.0/255.0.0.0") too; nobody else's CIDR does.
    if "%" in text or (slash and not (length.isascii() and length.isdigit())):
        raise AddressError(f"{text!r} is not a CIDR block (such as 10.0.0.0/8)")
    try:
        network = ipaddress.ip_network(text, strict=False)
    except ValueError:
        raise AddressError(f"{text!r} is not a CIDR block (such as 10.0.0.0/8)") from None
    if slash and str(network.network_address) != str(ipaddress.ip_address(text.partition("/")[0])):
        raise AddressError(f"{text!r} has bits set beyond its prefix; write {network}")
    if isinstance(network, ipaddress.IPv6Network) and network.prefixlen >= 96:
        mapped = network.network_address.ipv4_mapped
        if mapped is not None:
            return IpBlock(f"{mapped}/{network.prefixlen - 96}")
    return IpBlock(str(network))


def packed16(address: IpAddress) -> bytes:
    """The address in 16 bytes, network order, IPv4 as v4-mapped: one key shape for kernel maps."""
    if ":" in address:
        return ipaddress.IPv6Address(address).packed
    return _MAPPED_PREFIX + bytes(map(int, address.split(".")))


def from_packed(packed: bytes) -> IpAddress:
    """The address in 4 or 16 bytes, network order. Raises AddressError for any other length."""
    if len(packed) == 16 and packed.startswith(_MAPPED_PREFIX):
        packed = packed[12:]
    if len(packed) == 4:
        return IpAddress(str(ipaddress.IPv4Address(packed)))
    if len(packed) == 16:
        return IpAddress(str(ipaddress.IPv6Address(packed)))
    raise AddressError(f"an address has 4 or 16 bytes, not {len(packed)}")


def is_ipv6(address: IpAddress) -> bool:
    """Whether this canonical address is IPv6."""
    return ":" in address


def reason_not_unicast(address: IpAddress, *, loopback: bool = False) -> str:
    """Why a workload or service cannot live at this address; empty when it can.

    `loopback`: a workload may, in a mesh of one machine without capture.
    """
    ip = ipaddress.ip_address(address)
    for kind, found in (
        ("unspecified", ip.is_unspecified),
        ("a loopback address", ip.is_loopback and not loopback),
        ("a multicast address", ip.is_multicast),
        ("link-local", ip.is_link_local),
        ("the broadcast address", address == "255.255.255.255"),
    ):
        if found:
            return f"{address} is {kind}; a mesh address must be reachable from other hosts"
    return ""


def _canonical(ip: ipaddress.IPv4Address | ipaddress.IPv6Address) -> IpAddress:
    if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped is not None:
        return IpAddress(str(ip.ipv4_mapped))
    return IpAddress(str(ip))
