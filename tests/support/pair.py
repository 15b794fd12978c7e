"""Two uProxies in one process, on one plane: real sockets, real TLS, no kernel capture.

`web` (127.0.77.1) may dial `db` (127.0.77.2) and its service `shop/db` (240.240.9.9:6379 -> the application's port).
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from control.api import index, messages, records, topics
from control.api.address import IpAddress, parse_address
from control.api.gateway import Binding
from control.api.identity import SpiffeId
from control.api.index import AddressShard, Resident, ResidentWorkload
from control.api.messages import Envelope
from control.api.policy import AuthorizationPolicy
from control.api.records import Record
from control.api.topics import AddressesTopic, address_shard
from control.api.workload import Endpoint, Service, ServicePort, Workload
from control.client.state import State
from control.server.ca import Authority
from tests.support.certificates import DB, WEB, identity_dir
from uproxy import plane
from uproxy.beside import Beside
from uproxy.connections import Connections
from uproxy.inbound import Inbound
from uproxy.outbound import Outbound, Self
from uproxy.plane import Plane
from uproxy.pool import Pool
from uproxy.redirect import OriginalDestination, Route
from uproxy.telemetry import Connection, Telemetry
from uproxy.tls import Credentials, client_context, server_context

WEB_ADDRESS, DB_ADDRESS = parse_address("127.0.77.1"), parse_address("127.0.77.2")
VIP, SERVICE_PORT = parse_address("240.240.9.9"), 6379


class Recorder(Telemetry):
    """Keeps what was recorded of each connection that ended."""

    def __init__(self) -> None:
        super().__init__("test")
        self.ended: list[Connection] = []

    def closed(self, connection: Connection, now: float) -> None:
        super().closed(connection, now)
        self.ended.append(connection)


class Proxy:
    """One of the two."""

    def __init__(
        self, data_plane: Plane, state: State, own: Self, identity: Path, beside: Beside | None = None
    ) -> None:
        credentials = Credentials.load(identity)
        contexts = client_context(credentials), server_context(credentials)
        self.telemetry = Recorder()
        self.connections = Connections()
        self.pool = Pool(data_plane, lambda: contexts[0], own.addresses)
        self.outbound = Outbound(data_plane, state, self.pool, self.connections, self.telemetry, own)
        self.inbound = Inbound(
            data_plane, state, lambda: contexts[1], self.connections, self.telemetry, own, beside=beside
        )


@dataclass
class Pair:
    """The two proxies, and the way in and out for an application."""

    plane: Plane
    state: State
    web: Proxy
    db: Proxy
    app_port: int
    version: int = 1

    def dial(self, address: str = VIP, port: int = SERVICE_PORT, route: Route = Route.TUNNEL) -> socket.socket:
        """An application's connection, as capture would hand it over."""
        app, proxied = connected_pair()
        destination = OriginalDestination(parse_address(address), port, route)
        self.plane.spawn(self.web.outbound.serve(proxied, destination))
        return app

    def apply(self, *changes: Record) -> None:
        self.version += 1
        self._take([published(record, self.version) for record in changes])

    def withdraw(self, record: Record) -> None:
        self.version += 1
        self._take([withdrawn(record, self.version)])

    def bind_address(self, address: IpAddress, *bindings: tuple[int, Binding]) -> None:
        """Say how ports of db are reached at an address of its own."""
        self.version += 1
        resident = ResidentWorkload("shop", "db", "db", {}, bindings)
        self._take([published_addresses({address: resident}, self.version)])

    def _take(self, batch: Sequence[tuple[str, bytes]]) -> None:
        changed = self.state.apply(batch)

        def configure() -> None:
            self.db.inbound.config_changed(changed)
            self.web.outbound.config_changed(changed)

        self.plane.run(configure)

    def apply_policy(self, policy: AuthorizationPolicy) -> None:
        self.apply(policy)


def connected_pair() -> tuple[socket.socket, socket.socket]:
    """A real TCP connection over loopback, both ends non-blocking."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        app = socket.create_connection(listener.getsockname())
        proxied, _ = listener.accept()
    for sock in (app, proxied):
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return app, proxied


def published(record: Record, version: int) -> tuple[str, bytes]:
    """A record as the control plane publishes it."""
    topic = topics.format_topic(DB.trust_domain, records.topic_of(record))
    return topic, messages.encode(Envelope(epoch=1, version=version, issued_at=0, body=records.write(record)))


def withdrawn(record: Record, version: int) -> tuple[str, bytes]:
    """A record's tombstone as the control plane publishes it."""
    topic = topics.format_topic(DB.trust_domain, records.topic_of(record))
    return topic, messages.encode(Envelope(epoch=1, version=version, issued_at=0, body=None))


def published_addresses(residents: dict[IpAddress, Resident], version: int) -> tuple[str, bytes]:
    """The shard of some addresses, which must be of one."""
    (shard,) = {address_shard(ip) for ip in residents}
    topic = topics.format_topic(DB.trust_domain, AddressesTopic(shard))
    body = index.write(AddressShard(residents))
    return topic, messages.encode(Envelope(epoch=1, version=version, issued_at=0, body=body))


def workload(name: str, address: str, identity: object) -> Workload:
    return Workload("shop", name, name, identity, (parse_address(address),), {"app": name}, {}, "", 1)  # type: ignore


def issued(authority: Authority, directory: Path, identity: SpiffeId) -> Path:
    """An identity directory, the one from the last time if there was one: keys take longer than a connection."""
    return directory if directory.exists() else identity_dir(authority, directory, identity)


@contextlib.asynccontextmanager
async def running_pair(
    directory: Path, authority: Authority, app_port: int, beside: Beside | None = None
) -> AsyncIterator[Pair]:
    """Start both; `app_port` is where db's application listens, on 127.0.77.2. `beside`: what stands beside db."""
    data_plane = Plane(asyncio.get_running_loop())
    state = State("cluster.local")
    service = Service("shop", "db", (VIP,), (ServicePort("", SERVICE_PORT, app_port, ""),), {}, (DB,))
    endpoint = Endpoint("shop/db", "shop/db", DB_ADDRESS, DB, {SERVICE_PORT: app_port}, 1, True, {})
    known = (workload("web", WEB_ADDRESS, WEB), workload("db", DB_ADDRESS, DB), service, endpoint)
    changes = state.apply([published(record, 1) for record in known])
    web, db = (
        Proxy(
            data_plane,
            state,
            Self(f"shop/{name}", str(identity), identity.trust_domain, (address,)),
            issued(authority, directory / name, identity),
            stands,
        )
        for name, identity, address, stands in (("web", WEB, WEB_ADDRESS, None), ("db", DB, DB_ADDRESS, beside))
    )
    db.inbound.config_changed(changes)
    listener = socket.create_server((DB_ADDRESS, 15008))
    listener.setblocking(False)

    def accept(_: int) -> None:
        with contextlib.suppress(BlockingIOError):
            sock, _address = listener.accept()
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            data_plane.spawn(db.inbound.server.serve(sock))

    data_plane.watch(listener.fileno(), plane.READ, accept)
    try:
        yield Pair(data_plane, state, web, db, app_port)
    finally:
        data_plane.unwatch(listener.fileno())
        listener.close()
        data_plane.run(web.pool.close)
        data_plane.run(db.inbound.server.close)
        await asyncio.sleep(0.01)
        data_plane.close()
