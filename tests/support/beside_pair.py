"""A process of placement `sidecar` beside `db` of `pair`, in the same process and on the same plane.

As with `uproxy.beside`, each connection goes to it over loopback, and its other end through a socket pair; what is not
here is the child, which `tests/waypoint/test_beside.py` has.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from control.api.gateway import Bound, Gateway, Placement, Sidecar, Traffic
from control.api.workload import Service, ServicePort
from control.server.ca import Authority
from tests.support.certificates import DB
from tests.support.pair import DB_ADDRESS, SERVICE_PORT, VIP, connected_pair, running_pair, workload
from tests.support.through_waypoint import Between, Recorder
from uproxy import beside
from uproxy.config import Who
from uproxy.connections import Connections
from waypoint.beside import ServingBeside
from waypoint.gateway import Gateway as Served
from waypoint.upstream import Upstream


class Door:
    """What db's uProxy hands streams to: `uproxy.beside.Beside`."""

    def __init__(self) -> None:
        self._ours, self.theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.theirs.setblocking(False)

    async def ready(self, *, wait: bool) -> bool:
        return True

    def connect(self, header: bytes) -> socket.socket:
        ours, theirs = connected_pair()
        with theirs:
            assert ours.send(header) == len(header)
            socket.send_fds(self._ours, [b"s"], [theirs.fileno()])
        return ours

    def close(self) -> None:
        self._ours.close()
        self.theirs.close()


@dataclass
class Besides(Between):
    """The pair, and the process's parts."""

    gateway: Served
    upstream: Upstream
    connections: Connections
    telemetry: Recorder


@contextlib.asynccontextmanager
async def running_beside(directory: Path, authority: Authority, app_port: int, protocol: str) -> AsyncIterator[Besides]:
    """The arguments: as of `running_waypoint`."""
    door = Door()
    handed = cast("beside.Beside", door)
    async with running_pair(directory, authority, app_port, handed) as pair:
        pair.apply(
            Service("shop", "db", (VIP,), (ServicePort("", SERVICE_PORT, app_port, protocol),), {}, (DB,)),
            replace(
                workload("db", DB_ADDRESS, DB),
                bounds=(Bound(0, ("shop/wp",), (), True),),
                sidecar=Sidecar("shop/wp", (0,)),
            ),
            Gateway("shop", "wp", Traffic.SERVICE, (), ("shop/db",), (), placement=Placement.SIDECAR),
        )
        telemetry, who = Recorder(), Who("db", DB, (DB_ADDRESS,))
        serving = ServingBeside(pair.plane, who, "shop/wp", pair.state, telemetry, None, Nobody())
        serving.listen([door.theirs])
        try:
            yield Besides(pair, serving._gateway, serving._upstream, serving._connections, telemetry)
        finally:
            await serving.drain(0.1, 0.05)
            serving.close()
            door.close()


class Nobody:
    """The `Directory`: nothing has to be asked for."""

    async def destination(self, address: object) -> None: ...

    async def followed(self, service_key: str) -> None: ...

    async def introduce(self, caller: object, service_key: str) -> None: ...
