"""The shared maps with types: addresses as 16 packed bytes (IPv4 v4-mapped), ports and ids as integers."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any, Final

from bpf import layout, libbpf
from bpf.arena import Arena, Backend, alias_table
from bpf.flows import Flows

KINDS: Final[Mapping[str, tuple[str, str]]] = {
    "ranges": ("struct mesh_range_key", "struct mesh_range"),
    "services": ("struct mesh_service_key", "struct mesh_service"),
    "workloads": ("struct mesh_workload_key", "struct mesh_workload"),
    "datagrams": ("struct mesh_service_key", "struct mesh_service"),
    "answering": ("struct mesh_answering_key", "__u32"),
    "own": ("struct mesh_own_key", "struct mesh_own"),
    "settings": ("__u32", "struct mesh_settings"),
    "captured": ("int", "struct mesh_orig_dst"),
    "orig": ("struct mesh_orig_key", "struct mesh_orig_dst"),
    "admitted": ("struct mesh_admitted_key", "struct mesh_admitted"),
    "dns_captured": ("__u64", "__u32"),
    "nameservers": ("struct mesh_nameserver_key", "struct mesh_nameserver"),
    "grants": ("struct mesh_grant_key", "struct mesh_grant"),
    "direct_services": ("struct mesh_direct_key", "struct mesh_direct_service"),
    "backends": ("__u32", "struct mesh_backend"),
    "direct": ("int", "struct mesh_direct"),
    "flows": ("", ""),
    "probe_ports": ("struct mesh_probe_key", "struct mesh_probe"),
    "probing": ("int", "struct mesh_admitted_key"),
    "listeners": ("struct mesh_listener_key", "__u64"),
    "plaintext": ("__u64", "struct mesh_plaintext"),
    "counters": ("__u32", "__u64"),
}
"""Key and value of every map of maps.h; a ring has none. The loader refuses an object or a pin with other sizes."""

CHANGED: Final[Mapping[str, int]] = {}
"""Map → the schema that gave its entries another meaning and left their size. What an earlier version pinned is carried
over to this one unless its shape differs, or it is older than it may be here."""

_NEVER_FULL: Final = ("settings", "counters")  # arrays, with all their entries from the beginning
_ONLY_KEY: Final = bytes(4)
_ROUTES: Final = layout.members("mesh_route")
_RANGE_KINDS: Final = layout.members("mesh_range_kind")
_ADMISSIONS: Final = layout.members("mesh_admission")


class Route(IntEnum):
    """Where the kernel sends a captured connection."""

    TUNNEL = _ROUTES["MESH_ROUTE_TUNNEL"]
    WAYPOINT = _ROUTES["MESH_ROUTE_WAYPOINT"]
    PROBE = _ROUTES["MESH_ROUTE_PROBE"]
    PLAINTEXT = _ROUTES["MESH_ROUTE_PLAINTEXT"]


class RangeKind(IntEnum):
    """What an address range is to the mesh."""

    MESH = _RANGE_KINDS["MESH_RANGE_MESH"]
    EXCLUDED = _RANGE_KINDS["MESH_RANGE_EXCLUDED"]


class Admission(IntEnum):
    """Why a connection may come in without a tunnel."""

    DIRECT = _ADMISSIONS["MESH_ADMISSION_DIRECT"]
    PROBE = _ADMISSIONS["MESH_ADMISSION_PROBE"]


@dataclass(frozen=True, slots=True)
class Tuple:
    """A connection as it is on the wire, and the namespace of its destination."""

    netns_cookie: int
    source: tuple[bytes, int]
    """16-byte address and port."""
    destination: tuple[bytes, int]


@dataclass(frozen=True, slots=True)
class Target:
    """What is at a mesh address: the value of `services` and `workloads`."""

    id: int
    """32 bits, not 0."""
    route: Route


@dataclass(frozen=True, slots=True)
class Settings:
    generation: int
    whole: bool
    registry_only: bool = False
    """Whether only the mesh, and what is excluded from it, may be reached."""


def size_of(name: str) -> libbpf.MapSize:
    """What mesh.h says of a map's key and value."""
    key, value = (layout.sizeof(kind) if kind else 0 for kind in KINDS[name])
    return libbpf.MapSize(key, value)


@dataclass(frozen=True, slots=True)
class Level:
    """How full a map is."""

    entries: int
    capacity: int


class _Map:
    """A pinned map by its descriptor, which the caller keeps open."""

    name = ""

    def __init__(self, fds: Mapping[str, int]) -> None:
        self.fd = fds[self.name]
        self.size = size_of(self.name)

    def keys(self) -> Iterator[bytes]:
        return libbpf.keys(self.fd, self.size.key)

    def __len__(self) -> int:
        return libbpf.count(self.fd, self.size)

    def capacity(self) -> int:
        return libbpf.map_capacity(self.fd)


class Ranges(_Map):
    """LPM: address range → kind."""

    name = "ranges"

    def items(self) -> dict[tuple[bytes, int], RangeKind]:
        """{(16-byte address, prefix bits of 128): kind}."""
        found = {}
        for raw in self.keys():
            key = layout.unpack("mesh_range_key", raw)
            value = libbpf.lookup(self.fd, raw, self.size.value)
            if value is not None:
                kind = RangeKind(layout.unpack("mesh_range", value).kind)
                found[bytes(layout.ffi.buffer(key.addr)), int(key.prefix_bits)] = kind
        return found

    def put(self, address: bytes, prefix_bits: int, kind: RangeKind) -> None:
        libbpf.update(self.fd, self._key(address, prefix_bits), layout.pack("mesh_range", kind=kind))

    def delete(self, address: bytes, prefix_bits: int) -> bool:
        return libbpf.delete(self.fd, self._key(address, prefix_bits))

    @staticmethod
    def _key(address: bytes, prefix_bits: int) -> bytes:
        return layout.pack("mesh_range_key", prefix_bits=prefix_bits, addr=address)


class Targets(_Map, ABC):
    """Mesh address → target. Keys are (16-byte address, port); the port is 0 in `workloads`, which have them all."""

    _key_struct = ""
    _value_struct = ""

    def items(self) -> dict[tuple[bytes, int], Target]:
        found = {}
        for raw, value in libbpf.entries(self.fd, self.size):
            record = layout.unpack(self._value_struct, value)
            found[self._unpack_key(raw)] = Target(int(record.id), Route(record.route))
        return found

    def put(self, key: tuple[bytes, int], target: Target, generation: int) -> None:
        """Readers see the old entry or the new one, never a mixture."""
        libbpf.update(self.fd, self._pack_key(key), self._pack_value(target, generation))

    def put_all(self, targets: Mapping[tuple[bytes, int], Target], generation: int) -> None:
        """As `put`, for each. When the map is full, some are in."""
        keys = [self._pack_key(key) for key in targets]
        values = [self._pack_value(target, generation) for target in targets.values()]
        libbpf.update_all(self.fd, self.size, keys, values)

    def delete(self, key: tuple[bytes, int]) -> bool:
        return libbpf.delete(self.fd, self._pack_key(key))

    def delete_all(self, keys: Collection[tuple[bytes, int]]) -> None:
        """Those are all there."""
        libbpf.delete_all(self.fd, self.size, [self._pack_key(key) for key in keys])

    def generation_of(self, key: tuple[bytes, int]) -> int | None:
        """Of the maps, when this entry was last written."""
        value = libbpf.lookup(self.fd, self._pack_key(key), self.size.value)
        return None if value is None else int(layout.unpack(self._value_struct, value).generation)

    def _pack_value(self, target: Target, generation: int) -> bytes:
        return layout.pack(self._value_struct, generation=generation, id=target.id, route=target.route)

    @abstractmethod
    def _pack_key(self, key: tuple[bytes, int]) -> bytes: ...

    @abstractmethod
    def _unpack_key(self, raw: bytes) -> tuple[bytes, int]: ...


class Services(Targets):
    """Virtual address and port → target."""

    name = "services"
    _key_struct = "mesh_service_key"
    _value_struct = "mesh_service"

    def _pack_key(self, key: tuple[bytes, int]) -> bytes:
        return layout.pack("mesh_service_key", addr=key[0], port=key[1])

    def _unpack_key(self, raw: bytes) -> tuple[bytes, int]:
        record = layout.unpack("mesh_service_key", raw)
        return bytes(layout.ffi.buffer(record.addr)), int(record.port)


class Workloads(Targets):
    """A workload's own address → target."""

    name = "workloads"
    _key_struct = "mesh_workload_key"
    _value_struct = "mesh_workload"

    def _pack_key(self, key: tuple[bytes, int]) -> bytes:
        return key[0]

    def _unpack_key(self, raw: bytes) -> tuple[bytes, int]:
        return raw, 0


class Datagrams(Services):
    """Mesh address and port → a target with the route PLAINTEXT: where datagrams may go as they are."""

    name = "datagrams"


class Answering(_Map):
    """Ports of this host's workloads from which they answer in datagrams."""

    name = "answering"

    def put(self, netns_cookie: int, port: int) -> None:
        libbpf.update(self.fd, self._key(netns_cookie, port), bytes(self.size.value))

    def delete(self, netns_cookie: int, port: int) -> bool:
        return libbpf.delete(self.fd, self._key(netns_cookie, port))

    def items(self) -> set[tuple[int, int]]:
        """{(netns cookie, port)}."""
        keys = (layout.unpack("mesh_answering_key", raw) for raw in self.keys())
        return {(int(key.netns_cookie), int(key.port)) for key in keys}

    @staticmethod
    def _key(netns_cookie: int, port: int) -> bytes:
        return layout.pack("mesh_answering_key", netns_cookie=netns_cookie, port=port)


class Own(_Map):
    """Addresses of the workloads on this node, by the network namespace that has them."""

    name = "own"

    def put(self, netns_cookie: int, address: bytes, netns_ino: int) -> None:
        libbpf.update(self.fd, self._key(netns_cookie, address), layout.pack("mesh_own", netns_ino=netns_ino))

    def delete(self, netns_cookie: int, address: bytes) -> bool:
        return libbpf.delete(self.fd, self._key(netns_cookie, address))

    def items(self) -> dict[tuple[int, bytes], int]:
        """{(netns cookie, 16-byte address): inode of the namespace}."""
        found = {}
        for raw in self.keys():
            key = layout.unpack("mesh_own_key", raw)
            value = libbpf.lookup(self.fd, raw, self.size.value)
            if value is not None:
                netns_ino = int(layout.unpack("mesh_own", value).netns_ino)
                found[int(key.netns_cookie), bytes(layout.ffi.buffer(key.addr))] = netns_ino
        return found

    @staticmethod
    def _key(netns_cookie: int, address: bytes) -> bytes:
        return layout.pack("mesh_own_key", netns_cookie=netns_cookie, addr=address)


class SettingsMap(_Map):
    """The one entry that says whether the maps are whole."""

    name = "settings"

    def read(self) -> Settings:
        value = libbpf.lookup(self.fd, _ONLY_KEY, self.size.value)
        record: Any = layout.unpack("mesh_settings", value or bytes(self.size.value))
        return Settings(int(record.generation), bool(record.whole), bool(record.registry_only))

    def write(self, settings: Settings) -> None:
        value = layout.pack(
            "mesh_settings",
            generation=settings.generation,
            whole=settings.whole,
            registry_only=settings.registry_only,
        )
        libbpf.update(self.fd, _ONLY_KEY, value)


class Counters(_Map):
    """What the programs count, summed over CPUs, since the maps were made."""

    name = "counters"

    def read(self) -> dict[str, int]:
        """{"captured": 3, "refused_no_config": 0, ...}: enum mesh_counter without its prefix, in lower case."""
        size = libbpf.possible_cpus() * self.size.value
        found = {}
        for name, index in layout.members("mesh_counter").items():
            if name == "MESH_COUNTERS":
                continue
            values = libbpf.lookup(self.fd, index.to_bytes(4, sys.byteorder), size) or b""
            per_cpu = (values[at : at + self.size.value] for at in range(0, len(values), self.size.value))
            found[name.removeprefix("MESH_").lower()] = sum(int.from_bytes(value, sys.byteorder) for value in per_cpu)
        return found


class Admitted(_Map):
    """Connections that may come in without a tunnel."""

    name = "admitted"

    def items(self) -> dict[Tuple, tuple[int, Admission]]:
        """{connection: (since when, in ns of the monotonic clock; why)}."""
        found = {}
        for raw in self.keys():
            value = libbpf.lookup(self.fd, raw, self.size.value)
            if value is not None:
                record = layout.unpack("mesh_admitted", value)
                found[self._unpack_key(raw)] = int(record.since_ns), Admission(record.kind)
        return found

    def put(self, connection: Tuple, since_ns: int, kind: Admission) -> None:
        value = layout.pack("mesh_admitted", since_ns=since_ns, kind=kind)
        libbpf.update(self.fd, self._key(connection), value)

    def delete(self, connection: Tuple) -> bool:
        return libbpf.delete(self.fd, self._key(connection))

    @staticmethod
    def _key(connection: Tuple) -> bytes:
        (source, source_port), (destination, destination_port) = connection.source, connection.destination
        return layout.pack(
            "mesh_admitted_key",
            netns_cookie=connection.netns_cookie,
            source=source,
            source_port=source_port,
            destination=destination,
            destination_port=destination_port,
        )

    @staticmethod
    def _unpack_key(raw: bytes) -> Tuple:
        key = layout.unpack("mesh_admitted_key", raw)
        source, destination = bytes(layout.ffi.buffer(key.source)), bytes(layout.ffi.buffer(key.destination))
        return Tuple(int(key.netns_cookie), (source, int(key.source_port)), (destination, int(key.destination_port)))


class ProbePorts(_Map):
    """Ports of workloads that health probes may dial."""

    name = "probe_ports"

    def put(self, address: bytes, port: int, netns_cookie: int) -> None:
        libbpf.update(self.fd, self._key(address, port), layout.pack("mesh_probe", netns_cookie=netns_cookie))

    def delete(self, address: bytes, port: int) -> bool:
        return libbpf.delete(self.fd, self._key(address, port))

    def items(self) -> dict[tuple[bytes, int], int]:
        """{(16-byte address, port): netns cookie}."""
        found = {}
        for raw in self.keys():
            key = layout.unpack("mesh_probe_key", raw)
            value = libbpf.lookup(self.fd, raw, self.size.value)
            if value is not None:
                address = bytes(layout.ffi.buffer(key.addr))
                found[address, int(key.port)] = int(layout.unpack("mesh_probe", value).netns_cookie)
        return found

    @staticmethod
    def _key(address: bytes, port: int) -> bytes:
        return layout.pack("mesh_probe_key", addr=address, port=port)


class Listeners(_Map):
    """The uProxies' listeners. The kernel's hooks keep it."""

    name = "listeners"

    def items(self) -> dict[tuple[int, int, int], int]:
        """{(netns cookie, port, address family): cookie of the socket}."""
        found = {}
        for raw in self.keys():
            value = libbpf.lookup(self.fd, raw, self.size.value)
            if value is not None:
                key = layout.unpack("mesh_listener_key", raw)
                found[int(key.netns_cookie), int(key.port), int(key.family)] = int.from_bytes(value, sys.byteorder)
        return found


class Plaintext(_Map):
    """Which ports of workloads are open to plaintext, as their uProxies have said."""

    name = "plaintext"

    def items(self) -> dict[int, tuple[bool, tuple[int, ...]]]:
        """{netns cookie: (whether all but these ports are open, or only these; the ports)}."""
        found = {}
        for raw in self.keys():
            value = libbpf.lookup(self.fd, raw, self.size.value)
            if value is not None:
                record = layout.unpack("mesh_plaintext", value)
                found[int.from_bytes(raw, sys.byteorder)] = bool(record.others), tuple(record.ports)[: record.count]
        return found

    def delete(self, netns_cookie: int) -> bool:
        return libbpf.delete(self.fd, netns_cookie.to_bytes(8, sys.byteorder))


class DnsCaptured(_Map):
    """Network namespaces whose name queries go to their uProxy."""

    name = "dns_captured"

    def put(self, netns_cookie: int) -> None:
        libbpf.update(self.fd, self._key(netns_cookie), bytes(self.size.value))

    def delete(self, netns_cookie: int) -> bool:
        return libbpf.delete(self.fd, self._key(netns_cookie))

    def items(self) -> set[int]:
        return {int.from_bytes(raw, sys.byteorder) for raw in self.keys()}

    @staticmethod
    def _key(netns_cookie: int) -> bytes:
        return netns_cookie.to_bytes(8, sys.byteorder)


class Nameservers(_Map):
    """Whom the apps ask, by the port of their uProxy."""

    name = "nameservers"

    def items(self) -> dict[tuple[int, int], bytes]:
        """{(netns cookie, slot): 16-byte address}."""
        found = {}
        for raw in self.keys():
            key = layout.unpack("mesh_nameserver_key", raw)
            value = libbpf.lookup(self.fd, raw, self.size.value)
            if value is not None:
                record = layout.unpack("mesh_nameserver", value)
                found[int(key.netns_cookie), int(key.slot)] = bytes(layout.ffi.buffer(record.addr))
        return found

    def forget(self, netns_cookie: int) -> None:
        """Removes those of a namespace."""
        for slot in range(2 * layout.constant("MESH_NAMESERVERS")):
            libbpf.delete(self.fd, layout.pack("mesh_nameserver_key", netns_cookie=netns_cookie, slot=slot))


class Orig(_Map):
    """Connections between their SYN and their accept."""

    name = "orig"


@dataclass(frozen=True, slots=True)
class Pair:
    """Who may dial what directly: the key of a grant."""

    source_cgroup: int
    """Inode of the caller's app cgroup."""
    address: bytes
    """16 packed bytes, of the destination workload."""
    port: int


@dataclass(frozen=True, slots=True)
class Grant:
    """What the kernel asks of a grant at each connect()."""

    expiry_ns: int
    """CLOCK_MONOTONIC, as time.monotonic_ns() tells it."""
    target_netns: int
    """Cookie of the destination's network namespace."""
    source_id: int
    target_id: int
    suspended_ns: int = 0
    """When a direct connection last was not established, CLOCK_MONOTONIC; 0: none has failed. No other goes direct."""


class Grants(_Map):
    """The grants of the same-host direct path. What is not granted goes through the tunnel."""

    name = "grants"

    def put(self, pair: Pair, grant: Grant) -> None:
        """In force from the next connect(). Raises BpfError when the map is full: then nothing has changed."""
        value = layout.pack(
            "mesh_grant",
            expiry_ns=grant.expiry_ns,
            target_netns=grant.target_netns,
            suspended_ns=grant.suspended_ns,
            source_id=grant.source_id,
            target_id=grant.target_id,
        )
        libbpf.update(self.fd, self._key(pair), value)

    def get(self, pair: Pair) -> Grant | None:
        value = libbpf.lookup(self.fd, self._key(pair), self.size.value)
        return None if value is None else self._grant(value)

    def renew(self, pair: Pair, expiry_ns: int) -> bool:
        """Moves the end of a grant that is there; a suspension stays. Whether it is there.

        The kernel may suspend it between the reading and the writing: then the next failure suspends it.
        """
        grant = self.get(pair)
        if grant is not None:
            self.put(pair, replace(grant, expiry_ns=expiry_ns))
        return grant is not None

    def delete(self, pair: Pair) -> bool:
        """No connection is admitted from now on. Those that are open, or whose SYN is under way, go on."""
        return libbpf.delete(self.fd, self._key(pair))

    def items(self) -> dict[Pair, Grant]:
        found = {}
        for raw in self.keys():
            value = libbpf.lookup(self.fd, raw, self.size.value)
            if value is not None:
                key = layout.unpack("mesh_grant_key", raw)
                pair = Pair(int(key.source_cgroup), bytes(layout.ffi.buffer(key.addr)), int(key.port))
                found[pair] = self._grant(value)
        return found

    @staticmethod
    def _key(pair: Pair) -> bytes:
        return layout.pack("mesh_grant_key", source_cgroup=pair.source_cgroup, addr=pair.address, port=pair.port)

    @staticmethod
    def _grant(value: bytes) -> Grant:
        record = layout.unpack("mesh_grant", value)
        return Grant(
            int(record.expiry_ns),
            int(record.target_netns),
            int(record.source_id),
            int(record.target_id),
            int(record.suspended_ns),
        )


class DirectServices(_Map):
    """Services that a caller may dial directly, each with all its backends: the kernel draws one by weight."""

    name = "direct_services"

    def __init__(self, fds: Mapping[str, int]) -> None:
        super().__init__(fds)
        self.backends_fd = fds["backends"]
        self._slot_size = size_of("backends").value
        self._arena = Arena(self.backends_fd, libbpf.map_capacity(self.backends_fd), self._slot_size)
        for raw in self.keys():
            self._arena.claim(*self._range(raw))

    def put(self, source_cgroup: int, address: bytes, port: int, backends: Sequence[Backend]) -> None:
        """From the next connect() on, exactly these backends are drawn.

        Raises ValueError for no backend with a weight, ArenaFullError or BpfError when there is no room; then what was
        in force stays.
        """
        key = self._key(source_cgroup, address, port)
        slots = alias_table(backends)
        old = self._range(key)
        base = self._arena.store(slots)
        try:
            libbpf.update(self.fd, key, layout.pack("mesh_direct_service", base=base, count=len(slots)))
        except libbpf.BpfError:
            self._arena.release(base, len(slots))
            raise
        self._arena.release(*old)

    def delete(self, source_cgroup: int, address: bytes, port: int) -> bool:
        key = self._key(source_cgroup, address, port)
        old = self._range(key)
        found = libbpf.delete(self.fd, key)
        self._arena.release(*old)
        return found

    def items(self) -> dict[tuple[int, bytes, int], int]:
        """{(source cgroup, address, port): number of backends}."""
        found = {}
        for raw in self.keys():
            key = layout.unpack("mesh_direct_key", raw)
            service = int(key.source_cgroup), bytes(layout.ffi.buffer(key.addr)), int(key.port)
            found[service] = self._range(raw)[1]
        return found

    def read(self, source_cgroup: int, address: bytes, port: int) -> list[int]:
        """Ids of the backends of a service, as the kernel has them."""
        base, count = self._range(self._key(source_cgroup, address, port))
        slots = (
            libbpf.lookup(self.backends_fd, at.to_bytes(4, sys.byteorder), self._slot_size)
            for at in range(base, base + count)
        )
        return [int(layout.unpack("mesh_backend", slot).id) for slot in slots if slot is not None]

    def backends_level(self) -> Level:
        """Of the map `backends`: slots that are in use, or rest before they are used again."""
        return Level(self._arena.used, self._arena.capacity)

    def close(self) -> None:
        self._arena.close()

    def _range(self, key: bytes) -> tuple[int, int]:
        """(base, count) of a service's backends; count 0 when there is no such service."""
        value = libbpf.lookup(self.fd, key, self.size.value)
        record = layout.unpack("mesh_direct_service", value or bytes(self.size.value))
        return int(record.base), int(record.count)

    @staticmethod
    def _key(source_cgroup: int, address: bytes, port: int) -> bytes:
        return layout.pack("mesh_direct_key", source_cgroup=source_cgroup, addr=address, port=port)


class Maps:
    """All maps of a node that the agent reads or writes."""

    def __init__(self, fds: Mapping[str, int]) -> None:
        self.fds = fds
        self.ranges = Ranges(fds)
        self.services = Services(fds)
        self.workloads = Workloads(fds)
        self.datagrams = Datagrams(fds)
        self.answering = Answering(fds)
        self.own = Own(fds)
        self.settings = SettingsMap(fds)
        self.counters = Counters(fds)
        self.orig = Orig(fds)
        self.admitted = Admitted(fds)
        self.probe_ports = ProbePorts(fds)
        self.listeners = Listeners(fds)
        self.plaintext = Plaintext(fds)
        self.dns_captured = DnsCaptured(fds)
        self.nameservers = Nameservers(fds)
        self.grants = Grants(fds)
        self.direct_services = DirectServices(fds)
        self.flows = Flows(fds["flows"])

    def levels(self, known: Mapping[str, int] | None = None) -> dict[str, Level]:
        """Of each map that can become full. `known`: entries of those whose writer knows them; to count 100,000 in the
        kernel takes 30 ms of processor time.
        """
        sizes = known or {}
        found = {
            one.name: Level(sizes[one.name] if one.name in sizes else len(one), one.capacity())
            for one in vars(self).values()
            if isinstance(one, _Map) and one.name not in _NEVER_FULL
        }
        found["backends"] = self.direct_services.backends_level()
        return found

    def close(self) -> None:
        """Lets go of the memory that is mapped; the maps stay."""
        self.direct_services.close()
        self.flows.close()
