"""Virtual addresses for services that ask for none: the same for the same service on every host, without a store."""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Container
from typing import Final

from control.api.address import IpAddress, IpBlock
from control.api.declared import Family

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
