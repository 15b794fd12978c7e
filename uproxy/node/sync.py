"""Keeps the kernel maps equal to the state: what is captured, and what is refused because nobody knows it.

What the maps should hold is a function of who lives at which address; what is written is the difference. New entries
go in before old ones go out, so that an address that moves is never unknown in between. The maps become whole only
after everything is in.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Final

from bpf.maps import Maps, RangeKind, Route, Target, Targets
from control.api.address import IpAddress, from_packed, packed16
from control.api.index import Resident, ResidentService, ResidentWorkload
from control.client.state import State
from uproxy.capture.ranges import MeshRanges, Network

Key = tuple[bytes, int]
"""16 packed bytes of address and a port; port 0 for a workload, which has them all."""
Range = tuple[bytes, int]
"""16 packed bytes of address and prefix bits of 128."""

_ANY_PORT: Final = 0


class SyncError(Exception):
    """The configuration cannot be put into the kernel. Nothing was written; the text says what to change."""


def range_entries(ranges: MeshRanges) -> dict[Range, RangeKind]:
    """As the map `ranges` holds them."""
    return {
        _range(network): RangeKind.MESH if of_mesh else RangeKind.EXCLUDED
        for network, of_mesh in ranges.networks().items()
    }


def _range(network: Network) -> Range:
    return packed16(IpAddress(str(network.network_address))), network.prefixlen + (96 if network.version == 4 else 0)


@dataclass(frozen=True, slots=True)
class Entries:
    """What the maps hold, or should."""

    services: dict[Key, Target]
    """Virtual addresses, each with its ports."""
    workloads: dict[Key, Target]
    """Addresses of workloads, at any port."""
    datagrams: dict[Key, Target]
    """Addresses of either, each with the ports to which datagrams may go."""


def desired(residents: Mapping[IpAddress, Resident]) -> Entries:
    """The entries of these addresses."""
    found = Entries({}, {}, {})
    for ip, resident in residents.items():
        address = packed16(ip)
        match resident:
            case ResidentService():
                target = _target(resident, bound=resident.bound)
                found.services.update({(address, port): target for port in resident.ports})
            case ResidentWorkload():
                found.workloads[address, _ANY_PORT] = _target(resident, bound=bool(resident.bindings))
        plaintext = Target(stable_id(resident.key), Route.PLAINTEXT)
        found.datagrams.update({(address, port): plaintext for port in resident.datagrams})
    return found


def _target(resident: Resident, *, bound: bool) -> Target:
    return Target(stable_id(resident.key), Route.WAYPOINT if bound else Route.TUNNEL)


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


class _Mirror:
    """A kernel map and what it holds, read once: from then on this process is its one writer."""

    def __init__(self, kernel: Targets) -> None:
        self._kernel = kernel
        self._capacity = kernel.capacity()
        self.entries: dict[Key, Target] = {}
        self._ports: dict[bytes, tuple[int, ...]] = {}
        self._read()

    def _read(self) -> None:
        self.entries = self._kernel.items()
        self._ports = {}
        for address, port in self.entries:
            self._ports[address] = (*self._ports.get(address, ()), port)

    def at(self, addresses: Iterable[bytes]) -> dict[Key, Target]:
        """What it holds at some addresses."""
        keys = [(address, port) for address in addresses for port in self._ports.get(address, ())]
        return {key: self.entries[key] for key in keys}

    def check_room(self, difference: Difference) -> None:
        """Raises SyncError when not everything would fit."""
        wanted = self._union(difference) - len(difference.delete)
        if wanted > self._capacity:
            raise SyncError(
                f"the configuration needs {wanted:,} entries in the kernel's map `{self._kernel.name}`, which has room "
                f"for {self._capacity:,}. What is not there is refused, never open. Give this node fewer services, "
                "ports or workloads"
            )

    def make_room(self, difference: Difference) -> None:
        """Deletes what goes anyway when old and new do not fit together: then an address may be unknown for a moment,
        and is refused.
        """
        if self._union(difference) > self._capacity:
            self.delete(difference)

    def _union(self, difference: Difference) -> int:
        """How many entries old and new are together."""
        return len(self.entries) + sum(key not in self.entries for key in difference.put)

    def put(self, difference: Difference, generation: int) -> None:
        if not difference.put:
            return
        with self._in_step():
            self._kernel.put_all(difference.put, generation)
        for key in difference.put:
            if key not in self.entries:
                address, port = key
                self._ports[address] = (*self._ports.get(address, ()), port)
        self.entries.update(difference.put)

    def delete(self, difference: Difference) -> None:
        """Nothing to do for what `make_room` has deleted."""
        gone = [key for key in difference.delete if key in self.entries]
        if not gone:
            return
        with self._in_step():
            self._kernel.delete_all(gone)
        for key in gone:
            del self.entries[key]
            address, port = key
            left = tuple(other for other in self._ports.pop(address) if other != port)
            if left:
                self._ports[address] = left

    @contextmanager
    def _in_step(self) -> Iterator[None]:
        """After a failure, which may have come half way, the kernel is asked what it holds."""
        try:
            yield
        except OSError:
            self._read()
            raise


class Sync:
    """The one writer of `ranges`, `services`, `workloads`, `datagrams`, `answering` and `settings`."""

    def __init__(self, maps: Maps, ranges: MeshRanges, *, registry_only: bool = False) -> None:
        """Puts ranges and egress in force and takes over what an earlier agent left in the maps."""
        self._maps = maps
        self._ranges = ranges
        self._write_ranges()
        maps.settings.write(replace(maps.settings.read(), registry_only=registry_only))
        self._services = _Mirror(maps.services)
        self._workloads = _Mirror(maps.workloads)
        self._datagrams = _Mirror(maps.datagrams)
        self._answering = maps.answering.items()
        self._own: frozenset[IpAddress] = frozenset()
        """Addresses of this host's workloads, as `apply_answering` has seen them last."""
        self.narrowed = True
        """Whether datagrams may have fewer ways to go than before; whoever has seen to what is connected takes it back.
        At first an earlier agent may have been killed before it did."""

    def apply(self, state: State, changed: Collection[IpAddress] | None = None) -> int:
        """Makes the maps equal to the state; returns how many entries it wrote or deleted. Raises SyncError.

        `changed`: where the state may differ from what was applied last; None: anywhere, which takes a second for each
        100,000 addresses.
        """
        if changed is None:
            residents = state.residents()
            services, workloads, datagrams = (
                mirror.entries for mirror in (self._services, self._workloads, self._datagrams)
            )
        else:
            residents = {ip: resident for ip in changed if (resident := state.resident_at(ip)) is not None}
            addresses = [packed16(ip) for ip in changed]
            services, workloads, datagrams = (
                mirror.at(addresses) for mirror in (self._services, self._workloads, self._datagrams)
            )
        self._check(residents)
        wanted = desired(residents)
        changes = (
            (self._services, Difference.between(services, wanted.services)),
            (self._workloads, Difference.between(workloads, wanted.workloads)),
            (self._datagrams, Difference.between(datagrams, wanted.datagrams)),
        )
        for mirror, difference in changes:
            mirror.check_room(difference)
        settings = self._maps.settings.read()
        generation = settings.generation + any(difference for _, difference in changes)
        for mirror, difference in changes:
            mirror.make_room(difference)
        for mirror, difference in changes:
            mirror.put(difference, generation)
        for mirror, difference in changes:
            mirror.delete(difference)
        self.narrowed |= any(difference.delete for mirror, difference in changes if mirror is self._datagrams)
        if changed is None or not self._own.isdisjoint(changed):
            self.apply_answering(state)
        whole = replace(settings, generation=generation, whole=settings.whole or state.whole)
        if whole != settings:
            self._maps.settings.write(whole)
        return sum(len(difference.put) + len(difference.delete) for _, difference in changes)

    def apply_answering(self, state: State) -> None:
        """Lets the workloads of this host answer in datagrams from the ports that services say; to be called when
        workloads come and go, too.
        """
        own = [(netns_cookie, from_packed(address)) for netns_cookie, address in self._maps.own.items()]
        self._own = frozenset(address for _, address in own)
        wanted = {
            (netns_cookie, port)
            for netns_cookie, address in own
            if isinstance(resident := state.resident_at(address), ResidentWorkload)
            for port in resident.datagrams
        }
        for one in wanted - self._answering:
            self._maps.answering.put(*one)
            self._answering.add(one)
        for one in self._answering - wanted:
            self._maps.answering.delete(*one)
            self._answering.remove(one)
            self.narrowed = True

    def passes(self, address: IpAddress, port: int) -> bool:
        """Whether datagrams may go to an address and port, as far as the mesh is asked."""
        return not self._ranges.captures(address) or (packed16(address), port) in self._datagrams.entries

    def answers(self, netns_cookie: int, port: int) -> bool:
        """Whether a workload may answer in datagrams from a port."""
        return (netns_cookie, port) in self._answering

    def sizes(self) -> dict[str, int]:
        """How many entries the maps have that nobody else writes: {map: entries}."""
        mirrors = {"services": self._services, "workloads": self._workloads, "datagrams": self._datagrams}
        return {name: len(mirror.entries) for name, mirror in mirrors.items()} | {"answering": len(self._answering)}

    def _check(self, residents: Mapping[IpAddress, Resident]) -> None:
        """An address outside the ranges would be dialled in plaintext: the kernel asks the ranges first."""
        homeless = sorted(ip for ip in residents if not self._ranges.captures(ip))
        if homeless:
            resident = residents[homeless[0]]
            kind = "service" if isinstance(resident, ResidentService) else "workload"
            more = f" (and {len(homeless) - 1} more)" if len(homeless) > 1 else ""
            raise SyncError(
                f"{kind} {resident.key} has address {homeless[0]}{more}, outside the mesh's ranges "
                f"({', '.join(self._ranges.mesh)}), where connections are left in plaintext. Start the agent with a "
                "--mesh-cidr that has it, or change the address"
            )

    def _write_ranges(self) -> None:
        wanted = range_entries(self._ranges)
        current = self._maps.ranges.items()
        for (address, bits), kind in wanted.items():
            if current.get((address, bits)) is not kind:
                self._maps.ranges.put(address, bits, kind)
        for address, bits in current.keys() - wanted.keys():
            self._maps.ranges.delete(address, bits)
