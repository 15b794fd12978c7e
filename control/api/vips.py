"""Virtual addresses for services that ask for none: of the name's hash, so that without a store every host finds the
same; with one, the address that was allocated first.
"""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Container, Iterable, Mapping
from typing import Final

from control.api.address import IpAddress, IpBlock, is_ipv6
from control.api.declared import DeclaredService, Family

Vips = Mapping[tuple[str, Family], IpAddress]
"""Service key and family -> the virtual address that was allocated."""

RANGES: Final = {Family.IPV4: IpBlock("240.240.0.0/16"), Family.IPV6: IpBlock("fd75:5072:6f78::/112")}
"""240/4 is reserved (RFC 1112 section 4), so nobody routes it; the ULA prefix (RFC 4193) is ours. Both hold 65,536."""

_FIRST: Final = 1  # the network's own address stays free
_LAST: Final = 0xFEFF  # the top 256 are the mesh's own; the last of all is where a uProxy proves its capture


def allocate(service_key: str, family: Family, taken: Container[IpAddress]) -> IpAddress | None:
    """The address that the service's name hashes to, or the next free one; None when the range is full."""
    network = ipaddress.ip_network(RANGES[family])
    size = _LAST - _FIRST + 1
    start = int.from_bytes(hashlib.sha256(service_key.encode()).digest()[:8]) % size
    for step in range(size):
        address = IpAddress(str(network.network_address + _FIRST + (start + step) % size))
        if address not in taken:
            return address
    return None


class Addresses:
    """Who holds which address, so that no two hold one."""

    def __init__(self, services: Iterable[DeclaredService], elsewhere: Mapping[IpAddress, str], earlier: Vips) -> None:
        """`elsewhere`: address -> holder, of those that are not claimed here. A service that still asks for no address
        has the one it was given earlier, before anybody can claim it.
        """
        self.allocated: dict[tuple[str, Family], IpAddress] = {}
        self._elsewhere = elsewhere
        self._here: dict[IpAddress, str] = {}
        for service in services:
            for family in service.families:
                address = earlier.get((service.key, family))
                if address is not None and asked(service, family) is None and not self.claim(address, holder(service)):
                    self.allocated[service.key, family] = address

    def __contains__(self, address: object) -> bool:
        return address in self._here or address in self._elsewhere

    def claim(self, address: IpAddress, claimant: str) -> str:
        """Takes an address for somebody; returns who has it already, and keeps it, or an empty string."""
        if address in self._elsewhere:
            return self._elsewhere[address]
        first = self._here.setdefault(address, claimant)
        return "" if first == claimant else first

    def vip(self, service: DeclaredService, family: Family) -> IpAddress | None:
        """The address of a service in one of its families, allocated when it has none; None when the range is full."""
        address = asked(service, family) or self.allocated.get((service.key, family))
        if address is None:
            address = allocate(service.key, family, self)
            if address is not None:
                self._here[address] = holder(service)
                self.allocated[service.key, family] = address
        return address


def holder(service: DeclaredService) -> str:
    """How a service that holds an address is named."""
    return f"Service {service.key}"


def asked(service: DeclaredService, family: Family) -> IpAddress | None:
    """The address of a family that a service asks for."""
    return next((ip for ip in service.cluster_ips if is_ipv6(ip) == (family is Family.IPV6)), None)
