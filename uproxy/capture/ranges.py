"""Which addresses are the mesh's: what a capture brings to the uProxy, or refuses, and never lets out in the open."""

from __future__ import annotations

import functools
import ipaddress
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from control.api.address import IpAddress, IpBlock, parse_block

MAX_RANGES: Final = 1024  # max_entries of the map `ranges` of bpf/maps.h

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


@dataclass(frozen=True, slots=True)
class MeshRanges:
    """The mesh's address ranges, and those that are left alone. Fixed while a capture is in force."""

    mesh: tuple[IpBlock, ...]
    excluded: tuple[IpBlock, ...] = ()

    @classmethod
    def parse(cls, mesh: Iterable[str], excluded: Iterable[str] = ()) -> MeshRanges:
        """Raises ValueError (AddressError) for text that is no CIDR block, and for a block given as both."""
        ranges = cls(tuple(map(parse_block, mesh)), tuple(map(parse_block, excluded)))
        for block in ranges.mesh:
            if block in ranges.excluded:
                raise ValueError(f"{block} is both a mesh range and excluded; drop one of the two")
        if len(ranges.networks()) > MAX_RANGES:
            raise ValueError(f"more than {MAX_RANGES} ranges; use larger blocks")
        return ranges

    def networks(self) -> Mapping[Network, bool]:
        """Every range, and whether it is the mesh's."""
        return dict(self._networks())

    def _networks(self) -> Iterator[tuple[Network, bool]]:
        for block in self.mesh:
            yield _network(block), True
        for block in self.excluded:
            yield _network(block), False

    def captures(self, address: IpAddress) -> bool:
        """Whether connections to an address are the mesh's business: the longest prefix decides, as in the kernel."""
        ip = ipaddress.ip_address(address)
        best = max(
            ((network.prefixlen, of_mesh) for network, of_mesh in self._networks() if ip in network),
            default=(0, False),
        )
        return best[1]


@functools.lru_cache(MAX_RANGES)  # asked for each address, and parsing is most of the work
def _network(block: IpBlock) -> Network:
    return ipaddress.ip_network(block)
