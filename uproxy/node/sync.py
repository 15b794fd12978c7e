"""Keeps the kernel maps equal to the state: what is captured, and what is refused because nobody knows it.

What the maps should hold is a function of the state; what is written is the difference. New entries go in before old
ones go out, so that an address that moves is never unknown in between. The maps become whole only after everything is
in.
"""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from bpf.maps import Maps, RangeKind, Route, Settings, Target, Targets
from control.api.address import IpAddress, IpBlock, packed16, parse_block
from control.client.state import State

Key = tuple[bytes, int]
"""16 packed bytes of address and a port; port 0 for a workload, which has them all."""
Range = tuple[bytes, int]
"""16 packed bytes of address and prefix bits of 128."""

MAX_RANGES: Final = 1024  # max_entries of the map `ranges`
_ANY_PORT: Final = 0


class SyncError(Exception):
    """The configuration cannot be put into the kernel. Nothing was written; the text says what to change."""


@dataclass(frozen=True, slots=True)
class MeshRanges:
    """The mesh's address ranges, and those that are left alone. Fixed while the agent runs."""

    mesh: tuple[IpBlock, ...]
    excluded: tuple[IpBlock, ...] = ()

    @classmethod
    def parse(cls, mesh: Iterable[str], excluded: Iterable[str] = ()) -> MeshRanges:
        """Raises ValueError (AddressError) for text that is no CIDR block, and for a block given as both."""
        ranges = cls(tuple(map(parse_block, mesh)), tuple(map(parse_block, excluded)))
        for block in ranges.mesh:
            if block in ranges.excluded:
                raise ValueError(f"{block} is both a mesh range and excluded; drop one of the two")
        if len(ranges.entries()) > MAX_RANGES:
            raise ValueError(f"more than {MAX_RANGES} ranges; use larger blocks")
        return ranges

    def entries(self) -> dict[Range, RangeKind]:
        """As the map `ranges` holds them."""
        return {_range(block): RangeKind.MESH for block in self.mesh} | {
            _range(block): RangeKind.EXCLUDED for block in self.excluded
        }

    def captures(self, address: IpAddress) -> bool:
        """Whether connections to an address are the mesh's business: the longest prefix decides, as in the kernel."""
        ip = ipaddress.ip_address(address)
        best = max(
            ((network.prefixlen, kind) for network, kind in self._networks() if ip in network),
            default=(0, RangeKind.EXCLUDED),
        )
        return best[1] is RangeKind.MESH

    def _networks(self) -> Iterable[tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, RangeKind]]:
        for block in self.mesh:
            yield ipaddress.ip_network(block), RangeKind.MESH
        for block in self.excluded:
            yield ipaddress.ip_network(block), RangeKind.EXCLUDED


def _range(block: IpBlock) -> Range:
    network = ipaddress.ip_network(block)
    return packed16(IpAddress(str(network.network_address))), network.prefixlen + (96 if network.version == 4 else 0)


def desired_services(state: State) -> dict[Key, Target]:
    """Every virtual address and port. Of two services that claim an address, the state says who has it."""
    found: dict[Key, Target] = {}
    for service in state.services():
        target = Target(stable_id(service.key), Route.TUNNEL)
        for vip in service.vips:
            address = packed16(vip)
            for port in service.ports:
                holder = state.service_at(vip, port.port)
                if holder is not None and holder[0].key == service.key:
                    found[address, port.port] = target
    return found


def desired_workloads(state: State) -> dict[Key, Target]:
    """Every address of a workload, at any port."""
    found: dict[Key, Target] = {}
    for workload in state.workloads():
        target = Target(stable_id(workload.key), Route.TUNNEL)
        for address in workload.addresses:
            holder = state.workload_at(address)
            if holder is not None and holder.key == workload.key:
                found[packed16(address), _ANY_PORT] = target
    return found


def stable_id(key: str) -> int:
    """32 bits, not 0, the same in every agent and after every restart, so that a restart rewrites nothing.

    A hint for logs and counters: two names may share one, and nothing is decided by it.
    """
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") or 1


@dataclass(frozen=True, slots=True)
class Difference:
    """What turns a map's content into another; deletions come last."""

    put: Mapping[Key, Target]
    delete: frozenset[Key]

    @classmethod
    def between(cls, current: Mapping[Key, Target], wanted: Mapping[Key, Target]) -> Difference:
        return cls(
            {key: target for key, target in wanted.items() if current.get(key) != target},
            frozenset(key for key in current if key not in wanted),
        )

    def __bool__(self) -> bool:
        return bool(self.put or self.delete)


class Sync:
    """The one writer of `ranges`, `services`, `workloads` and `settings`."""

    def __init__(self, maps: Maps, ranges: MeshRanges) -> None:
        """Puts the ranges in force and takes over what an earlier agent left in the maps."""
        self._maps = maps
        self._ranges = ranges
        self._write_ranges()
        # Read once: this is the one writer from here on.
        self._services = maps.services.items()
        self._workloads = maps.workloads.items()

    def apply(self, state: State) -> int:
        """Makes the maps equal to the state; returns how many entries it wrote or deleted. Raises SyncError."""
        self._check(state)
        services = Difference.between(self._services, desired_services(state))
        workloads = Difference.between(self._workloads, desired_workloads(state))
        settings = self._maps.settings.read()
        generation = settings.generation + bool(services or workloads)
        for kernel, mirror, difference in (
            (self._maps.services, self._services, services),
            (self._maps.workloads, self._workloads, workloads),
        ):
            _put(kernel, mirror, difference, generation)
        for kernel, mirror, difference in (
            (self._maps.services, self._services, services),
            (self._maps.workloads, self._workloads, workloads),
        ):
            _delete(kernel, mirror, difference)
        wanted = Settings(generation, whole=settings.whole or state.whole)
        if wanted != settings:
            self._maps.settings.write(wanted)
        return sum(len(change.put) + len(change.delete) for change in (services, workloads))

    def sizes(self) -> dict[str, int]:
        """How many entries the maps have."""
        return {"services": len(self._services), "addresses": len(self._workloads)}

    def _check(self, state: State) -> None:
        """An address outside the ranges would be dialled in plaintext: the kernel asks the ranges first."""
        homeless = [
            f"service {service.key} has address {vip}"
            for service in state.services()
            for vip in service.vips
            if not self._ranges.captures(vip)
        ] + [
            f"workload {workload.key} has address {address}"
            for workload in state.workloads()
            for address in workload.addresses
            if not self._ranges.captures(address)
        ]
        if homeless:
            more = f" (and {len(homeless) - 1} more)" if len(homeless) > 1 else ""
            raise SyncError(
                f"{homeless[0]}{more}, outside the mesh's ranges ({', '.join(self._ranges.mesh)}), where connections "
                "are left in plaintext. Start the agent with a --mesh-cidr that has it, or change the address"
            )

    def _write_ranges(self) -> None:
        wanted = self._ranges.entries()
        current = self._maps.ranges.items()
        for (address, bits), kind in wanted.items():
            if current.get((address, bits)) is not kind:
                self._maps.ranges.put(address, bits, kind)
        for address, bits in current.keys() - wanted.keys():
            self._maps.ranges.delete(address, bits)


def _put(kernel: Targets, mirror: dict[Key, Target], difference: Difference, generation: int) -> None:
    for key, target in difference.put.items():
        kernel.put(key, target, generation)
        mirror[key] = target


def _delete(kernel: Targets, mirror: dict[Key, Target], difference: Difference) -> None:
    for key in difference.delete:
        kernel.delete(key)
        del mirror[key]
