"""`waypoint.beside`: what becomes of connections that wait at the door when a process beside a workload drains."""

from __future__ import annotations

import asyncio
import contextlib
import socket

from control.api.address import parse_address
from control.client.state import State
from tests.support.certificates import DB
from uproxy import plane
from uproxy.config import Who
from uproxy.plane import Plane
from waypoint.beside import ServingBeside
from waypoint.telemetry import WaypointTelemetry

COUNT = 100


class _Nobody:
    async def destination(self, address): ...

    async def followed(self, service_key): ...

    async def introduce(self, caller, service_key): ...


def test_what_was_handed_over_before_the_drain_is_taken_and_nothing_waits_for_ever():
    async def main() -> None:
        data_plane = Plane(asyncio.get_running_loop())
        who = Who("shop/db", DB, (parse_address("127.0.0.1"),))
        state = State(DB.trust_domain)
        serving = ServingBeside(data_plane, who, "shop/wp", state, WaypointTelemetry("1"), None, _Nobody())
        ours, door = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        door.setblocking(False)
        serving.listen([door])
        handed = []
        for _ in range(COUNT):
            mine, theirs = socket.socketpair()
            with theirs:
                socket.send_fds(ours, [b"s"], [theirs.fileno()])
            mine.setblocking(False)
            handed.append(mine)
        await serving.drain(0.1, 0.05)
        serving.close()
        async with asyncio.timeout(30):
            for one in handed:
                with contextlib.suppress(ConnectionResetError):
                    assert await asyncio.get_running_loop().sock_recv(one, 1) == b""
                one.close()
        ours.close()
        door.close()
        data_plane.close()

    plane.run(main())
