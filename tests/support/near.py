"""Two workloads on a host of their own, as their launcher makes them, and what their uProxies would hold."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from control.api.address import HBONE_PORT, IpAddress
from control.api.identity import SpiffeId, make_id, parse_trust_domain
from tests.support import capture
from uproxy import cgroup, linux, sandbox
from uproxy.entrance import sockets_inside
from uproxy.node.channel import Allowed, Backend, Choice
from uproxy.node.peers import Peer
from uproxy.node.places import NetworkNamespace
from uproxy.node.workloads import Captured
from uproxy.sandbox import Sandbox

READY_PORT = 15021
PORT = 9000


@dataclass(frozen=True)
class Place:
    """A workload's sandbox, as the node agent knows it."""

    box: Sandbox
    netns: int
    captured: Captured

    @property
    def address(self) -> IpAddress:
        return self.captured.addresses[0]

    @property
    def identity(self) -> SpiffeId:
        return make_id(parse_trust_domain("cluster.local"), "near", self.captured.name)

    def socket(self, directory: str) -> socket.socket:
        """Made in one of its cgroups, `app` or `proxy`."""
        family = socket.AF_INET6 if ":" in self.address else socket.AF_INET
        (made,) = sockets_inside(self.box.cgroup / directory, self.netns, [family])
        made.settimeout(30)
        return made

    def listen(self, directory: str, port: int) -> socket.socket:
        made = self.socket(directory)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((self.address, port))
        made.listen()
        return made

    def peer(self) -> tuple[Peer, socket.socket]:
        """Its uProxy as the agent sees it, and the uProxy's end of the channel."""
        theirs, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.settimeout(30)
        theirs.setblocking(False)
        return Peer(self.captured, theirs, os.dup(self.netns)), ours


@dataclass(frozen=True)
class Pair:
    """`web` calls, `db` serves; a tunnel between their uProxies is open."""

    web: Place
    db: Place
    tunnel: socket.socket
    """The caller's end."""
    tunnel_port: int

    def identity_at(self, address: IpAddress) -> SpiffeId | None:
        return {place.address: place.identity for place in (self.web, self.db)}.get(address)

    def allowed(self, **changes: object) -> Allowed:
        """What the destination's uProxy says."""
        fields = {
            "identity": self.web.identity,
            "tunnel": (self.web.address, self.tunnel_port),
            "address": self.db.address,
            "port": PORT,
            **changes,
        }
        return Allowed(**fields)  # type: ignore[arg-type]  # each is one of the fields

    def choice(self) -> Choice:
        """What the caller's uProxy says."""
        return Choice(IpAddress("240.240.0.9"), PORT, (Backend(self.db.address, PORT, 1, self.db.identity),))


@contextlib.contextmanager
def pair(web: str = "10.97.0.10", db: str = "10.97.0.11") -> Iterator[Pair]:
    """In a network namespace of its own, which is the caller's while the block runs."""
    root = cgroup.mount_point() / capture.unique_name()
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, home)
        linux.unshare(linux.CLONE_NEWNET)
        stack.callback(linux.setns, home)
        sandbox.run_ip(["link set lo up"])
        sandbox.write_sysctls({"net/ipv4/ip_forward": "1", "net/ipv6/conf/all/forwarding": "1"})
        stack.callback(cgroup.remove, root)
        places = []
        for name, address in (("web", web), ("db", db)):
            box = Sandbox.below(root, cgroup.mount_point(), name, [address])
            stack.callback(sandbox.remove, box)
            sandbox.build(box)
            places.append(stack.enter_context(_place(name, box)))
        made_web, made_db = places
        listener = stack.enter_context(made_db.listen("proxy", HBONE_PORT))
        stack.enter_context(made_db.listen("proxy", READY_PORT))
        tunnel = stack.enter_context(made_web.socket("proxy"))
        tunnel.connect((made_db.address, HBONE_PORT))
        stack.enter_context(listener.accept()[0])
        yield Pair(made_web, made_db, tunnel, tunnel.getsockname()[1])


@contextlib.contextmanager
def _place(name: str, box: Sandbox) -> Iterator[Place]:
    netns = os.open(box.netns_path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        found = NetworkNamespace.of(netns)
        addresses = tuple(map(IpAddress, box.addresses))
        ids = (_id(box.app_cgroup), _id(box.proxy_cgroup))
        yield Place(box, netns, Captured(name, addresses, *ids, found.ino, found.cookie, dns=False))
    finally:
        os.close(netns)


def _id(directory: Path) -> int:
    return directory.stat().st_ino
