"""The kernel's half of a node, without its agent: programs, maps, and what the benchmarks write into them."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from ipaddress import ip_address
from pathlib import Path
from typing import Final

from benchmarks.lab.topology import Lab
from bpf import bpffs
from bpf.arena import Backend
from bpf.loader import Loader
from bpf.maps import Grant, Maps, Pair, RangeKind, Route, Settings, Target
from control.api.address import IpAddress, packed16, parse_address
from uproxy.node.places import Cgroup, NetworkNamespace
from uproxy.node.workloads import Captured, Registration, Workloads
from uproxy.sandbox import Sandbox

Key = tuple[bytes, int]

VIPS: Final = parse_address("240.240.0.1")
"""The first service's address; the others follow. Each has one port."""
ENDPOINTS: Final = parse_address("10.128.0.1")
"""The first endpoint's."""
PORT: Final = 80
_RANGES: Final = (("240.240.0.0", 16), ("10.128.0.0", 9))
_V4_BITS: Final = 96  # of the prefix that IPv4 is mapped behind
_GRANTED_NS: Final = 24 * 3600 * 10**9
_DRAINED_EVERY_S: Final = 0.1  # as the node agent does
_GENERATION: Final = 1


class Node:
    """Programs and maps of one node. Its pins bear the lab's name, and go with the lab."""

    def __init__(self, loader: Loader, links: Path) -> None:
        self._loader = loader
        self._links = links
        self._workloads = Workloads(loader, links)

    @property
    def maps(self) -> Maps:
        return self._loader.maps

    def capture(self, box: Sandbox) -> Captured:
        """Attach all programs to a workload's place, in which nothing runs yet. Raises RegistrationError, LoadError."""
        with ExitStack() as stack:
            netns, app, proxy = (_held(stack, path) for path in (box.netns_path, box.app_cgroup, box.proxy_cgroup))
            registration = Registration(
                box.workload,
                tuple(map(parse_address, box.addresses)),
                Cgroup.of(app, "app cgroup"),
                Cgroup.of(proxy, "proxy cgroup"),
                NetworkNamespace.of(netns),
            )
            self._workloads.register(registration)
        return next(one for one in self._workloads.captured() if one.name == box.workload)

    def pins(self, captured: Captured) -> Path:
        """Where a workload's links are pinned."""
        return self._links / captured.name

    def hold(self, services: Mapping[Key, Target], workloads: Mapping[Key, Target]) -> None:
        """A mesh of these, and the ranges that it is in. From now on the maps are whole."""
        for address, bits in _RANGES:
            self.maps.ranges.put(packed16(parse_address(address)), _V4_BITS + bits, RangeKind.MESH)
        self.maps.services.put_all(services, _GENERATION)
        self.maps.workloads.put_all(workloads, _GENERATION)
        self.maps.settings.write(Settings(_GENERATION, whole=True))

    def lead_directly(self, caller: Captured, vip: IpAddress, target: Captured, ports: Sequence[int]) -> None:
        """A service whose one backend is on this host, and is granted to the caller."""
        (address,) = map(packed16, target.addresses)
        self.maps.ranges.put(address, _V4_BITS + 32, RangeKind.MESH)
        grant = Grant(time.monotonic_ns() + _GRANTED_NS, target.netns_cookie, source_id=1, target_id=2)
        for port in ports:
            self.maps.grants.put(Pair(caller.app_cgroup, address, port), grant)
            backend = Backend(address, port, 1, target.netns_cookie, grant.target_id)
            self.maps.services.put((packed16(vip), port), Target(1, Route.TUNNEL), _GENERATION)
            self.maps.direct_services.put(caller.app_cgroup, packed16(vip), port, [backend])

    @contextmanager
    def drained(self) -> Iterator[None]:
        """The records of direct connections are read meanwhile, as the node agent reads them."""
        over = threading.Event()

        def drain() -> None:
            while not over.wait(_DRAINED_EVERY_S):
                self.maps.flows.drain()

        draining = threading.Thread(target=drain, name="flows", daemon=True)
        draining.start()
        try:
            yield
        finally:
            over.set()
            draining.join()
            self.maps.flows.drain()


@contextmanager
def node(lab: Lab, name: str) -> Iterator[Node]:
    """Raises LoadError, PinError."""
    bpffs.mount()
    directory = bpffs.node_directory(lab.names.node(name))
    with Loader(directory / "maps") as loader:
        yield Node(loader, directory / "links")


def services(count: int) -> dict[Key, Target]:
    return {(packed16(further(VIPS, number)), PORT): Target(number + 1, Route.TUNNEL) for number in range(count)}


def endpoints(count: int) -> dict[Key, Target]:
    return {(packed16(further(ENDPOINTS, number)), 0): Target(number + 1, Route.TUNNEL) for number in range(count)}


def further(address: IpAddress, by: int) -> IpAddress:
    """So many addresses after this one."""
    return IpAddress(str(ip_address(address) + by))


def _held(stack: ExitStack, path: Path) -> int:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    stack.callback(os.close, fd)
    return fd
