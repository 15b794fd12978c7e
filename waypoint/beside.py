"""The data plane of a waypoint's process beside one workload (placement `sidecar`): no tunnels, no key.

Connections come from the workload's uProxy, which proved who calls, through a door that nobody else has
(`uproxy.beside`). Each says first, in a PROXY protocol header, who that is and what was dialled.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
import time
from collections.abc import Sequence
from functools import partial
from typing import Final

from control.client.state import State
from uproxy import plane, proxy_protocol
from uproxy.access_log import AccessLog
from uproxy.config import Who
from uproxy.directory import Directory
from uproxy.errors import RefusedError
from uproxy.health import Health
from uproxy.listener import ACCEPTS_PER_TURN
from uproxy.plane import Plane
from waypoint.byte_stream import ByteStream
from waypoint.caller import Caller
from waypoint.interior import Interior
from waypoint.line import Line
from waypoint.telemetry import WaypointTelemetry
from waypoint.ways import Beside

HEADER_TIMEOUT_S: Final = 5.0

log = logging.getLogger("waypoint")


class ServingBeside(Interior):
    """As `serving.Serving`, beside a workload."""

    exporter = None
    """It has no way to a collector of spans."""

    def __init__(
        self,
        data_plane: Plane,
        who: Who,
        gateway_key: str,
        state: State,
        telemetry: WaypointTelemetry,
        access_log: AccessLog | None,
        directory: Directory,
    ) -> None:
        """`who`: the workload."""
        way = Beside(data_plane, state, who.key, Health(time.monotonic))
        super().__init__(data_plane, who, gateway_key, state, way, telemetry, access_log, directory, None)
        self._doors: list[socket.socket] = []

    def listen(self, sockets: Sequence[socket.socket]) -> None:
        """Take connections at these doors, and no more at any other than have come there already."""
        for door in [one for one in self._doors if one not in sockets]:
            self._plane.run(partial(self._accept, door, sys.maxsize))
            if door in self._doors:
                self._doors.remove(door)
                self._plane.unwatch(door.fileno())
        for door in sockets:
            if door not in self._doors:
                self._doors.append(door)
                self._watch(door)
        self._begin_ticks()

    def renewed(self) -> None:
        """There is no certificate here."""

    async def drain(self, timeout_s: float, grace_s: float) -> None:
        """As `Serving.drain`."""
        self.listen(())
        self.hasten(timeout_s, grace_s)
        await self._let_end()
        self._end()
        await asyncio.sleep(0)  # what was closed is flushed

    # -- connections

    def _watch(self, door: socket.socket) -> None:
        self._plane.watch(door.fileno(), plane.READ, lambda _: self._accept(door))

    def _accept(self, door: socket.socket, most: int = ACCEPTS_PER_TURN) -> None:
        for _ in range(most):
            try:
                message, fds, _, _ = socket.recv_fds(door, 1, 1, socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            if not message:  # the uProxy is gone, and we with it
                self._plane.unwatch(door.fileno())
                self._doors.remove(door)
                return
            for fd in fds:
                sock = socket.socket(fileno=fd)
                sock.setblocking(False)
                line = Line(self._plane, sock)
                self._plane.spawn(self._serve(line.open()))

    async def _serve(self, stream: ByteStream) -> None:
        """Never raises."""
        try:
            header = await stream.told_by(proxy_protocol.read, HEADER_TIMEOUT_S, HEADER_TIMEOUT_S)
            if header is None:
                raise proxy_protocol.HeaderError("it ended before its header did")
            data = await stream.receive(None)
        except (proxy_protocol.HeaderError, OSError, RefusedError) as error:
            log.warning("a connection from this workload's uProxy: %s", error)
            stream.abort(str(error))
            return
        stream.put_back(data[header.length :])
        caller = Caller(header.principal, *header.source)
        asked = self._gateway.dialled(*header.destination, header.authority.decode("latin-1"))
        await self._gateway.serve(stream, caller, asked, header.unique_id)
