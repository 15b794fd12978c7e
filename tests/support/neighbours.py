"""Captured workloads on one host, each in a namespace of its own behind a veth that the host routes: no shared segment.

What the direct path is tested with: real namespaces, cgroups, programs and connections; grants and services are written
to the maps as the node agent writes them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bpf.arena import Backend
from bpf.flows import Flow
from bpf.loader import Loader
from bpf.maps import Grant, Maps, Pair, Route, Target
from control.api.address import IpAddress, packed16, parse_address
from tests.support import capture
from tests.support.capture import Namespace, Site, ip, run_inside
from uproxy import cgroup
from uproxy.node.places import NetworkNamespace
from uproxy.node.workloads import Workloads

NAMES: Final = ("alice", "bob", "mallory")
_ROUTER_V4, _ROUTER_V6 = "169.254.1.1", "fe80::1"
GRANTED_NS: Final = 60 * 10**9


@dataclass(frozen=True)
class Neighbour:
    """A captured workload."""

    name: str
    site: Site
    v4: IpAddress
    v6: IpAddress
    id: int
    app_cgroup: int
    netns_cookie: int

    def address(self, like: str) -> IpAddress:
        """Of the family of another address."""
        return self.v6 if ":" in like else self.v4


@dataclass(frozen=True)
class Host:
    """Three workloads, the agent's maps, and the host's own namespace."""

    loader: Loader
    workloads: Workloads
    pins: Path
    router: int
    alice: Neighbour
    bob: Neighbour
    mallory: Neighbour

    @property
    def maps(self) -> Maps:
        return self.loader.maps

    def grant(
        self, source: Neighbour, target: Neighbour, port: int, *, for_ns: int = GRANTED_NS, netns_cookie: int = 0
    ) -> list[Pair]:
        """Both families, as an agent grants them."""
        pairs = [Pair(source.app_cgroup, packed16(address), port) for address in (target.v4, target.v6)]
        expiry = time.monotonic_ns() + for_ns
        for pair in pairs:
            self.maps.grants.put(pair, Grant(expiry, netns_cookie or target.netns_cookie, source.id, target.id))
        return pairs

    def declare(self, source: Neighbour, vip: str, backends: Sequence[Backend], port: int = capture.PORT) -> None:
        self.maps.direct_services.put(source.app_cgroup, packed16(parse_address(vip)), port, backends)

    def backend(self, target: Neighbour, like: str, port: int, weight: int = 1) -> Backend:
        return Backend(packed16(target.address(like)), port, weight, target.netns_cookie, target.id)

    def flows(self, count: int = 1) -> list[Flow]:
        """The records that were written since the last call, once there are so many; the last packets may be late."""
        found = self.maps.flows.drain()
        deadline = time.monotonic() + 5
        while len(found) < count and time.monotonic() < deadline:
            time.sleep(0.01)
            found += self.maps.flows.drain()
        return found

    @contextmanager
    def black_hole(self, target: Neighbour) -> Iterator[None]:
        """What is sent to a neighbour is lost, without a word, while the block runs."""
        run_inside(self.router, None, lambda: ip(f"route replace blackhole {target.v4}/32"))
        try:
            yield
        finally:
            run_inside(self.router, None, lambda: ip(f"route replace {target.v4}/32 dev {target.name}"))

    def reset(self) -> None:
        """As at the beginning: everything in the maps, nothing granted."""
        capture.fill(self.maps)
        for one in (self.alice, self.bob, self.mallory):
            for address in (one.v4, one.v6):
                self.maps.workloads.put((packed16(address), 0), Target(one.id, Route.TUNNEL), 6)
        for pair in self.maps.grants.items():
            self.maps.grants.delete(pair)
        for service in self.maps.direct_services.items():
            self.maps.direct_services.delete(*service)
        for connection in self.maps.admitted.items():
            self.maps.admitted.delete(connection)
        self.maps.flows.drain()


@contextmanager
def host() -> Iterator[Host]:
    with ExitStack() as stack:
        router = stack.enter_context(capture.namespace())
        run_inside(router.fd, None, _forward)
        pins = stack.enter_context(capture.pins())
        loader = stack.enter_context(Loader(pins / "maps"))
        workloads = Workloads(loader, pins / "links")
        made = [
            stack.enter_context(_neighbour(router, workloads, name, number)) for number, name in enumerate(NAMES, 2)
        ]
        found = Host(loader, workloads, pins, router.fd, *made)
        found.reset()
        yield found


@contextmanager
def _neighbour(router: Namespace, workloads: Workloads, name: str, number: int) -> Iterator[Neighbour]:
    v4, v6 = parse_address(f"10.99.0.{number}"), parse_address(f"fd99::{number}")
    unique = capture.unique_name()
    directory = cgroup.mount_point() / unique
    with ExitStack() as stack:
        netns = stack.enter_context(capture.namespace())
        stack.callback(cgroup.remove, directory)
        for child in ("app", "proxy"):
            (directory / child).mkdir(parents=True)
        _wire(router, netns, name, v4, v6)
        site = Site(unique, netns.fd, router.fd, directory)
        with site.registration(addresses=(v4, v6)) as registration:
            workloads.register(registration)
        yield Neighbour(name, site, v4, v6, 100 + number, registration.app.id, NetworkNamespace.of(netns.fd).cookie)


def _forward() -> None:
    ip("link set lo up")
    for path in ("ipv4/ip_forward", "ipv6/conf/all/forwarding"):
        Path("/proc/sys/net", path).write_text("1")


def _use_ports_again() -> None:
    """Thousands of connections to one port would leave it to the kernel to look for one that is not in TIME_WAIT."""
    Path("/proc/sys/net/ipv4/tcp_tw_reuse").write_text("1")


def _wire(router: Namespace, netns: Namespace, name: str, v4: str, v6: str) -> None:
    ours = f"""
        link set lo up
        link add eth0 type veth peer name {name} netns {router.pid}
        link set eth0 up
        address add {v4}/32 dev eth0
        address add {v6}/128 dev eth0 nodad
        route add {_ROUTER_V4} dev eth0 scope link
        route add default via {_ROUTER_V4}
        -6 route add default via {_ROUTER_V6} dev eth0
    """
    theirs = f"""
        link set {name} up
        address add {_ROUTER_V4}/32 dev {name}
        address add {_ROUTER_V6}/64 dev {name} nodad
        route add {v4}/32 dev {name}
        -6 route add {v6}/128 dev {name}
    """
    run_inside(netns.fd, None, lambda: ip(ours))
    run_inside(netns.fd, None, _use_ports_again)
    run_inside(router.fd, None, lambda: ip(theirs))
