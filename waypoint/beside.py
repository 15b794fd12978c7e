"""The data plane of a waypoint's process beside one workload (placement `sidecar`): no tunnels, no key.

Connections come from the workload's uProxy, which proved who calls, through a door that nobody else has
(`uproxy.beside`). Each says first, in a PROXY protocol header, who that is and what was dialled.
"""

from __future__ import annotations

import asyncio
import logging
import math
import socket
import sys
import time
from collections.abc import Sequence
from functools import partial
from typing import Final

from control.client.state import Changes, State
from uproxy import plane, proxy_protocol
from uproxy.access_log import AccessLog
from uproxy.config import Who
from uproxy.connections import Connections
from uproxy.directory import Directory
from uproxy.errors import RefusedError
from uproxy.health import Health
from uproxy.listener import ACCEPTS_PER_TURN
from uproxy.plane import Plane
from uproxy.process import TICK_S
from uproxy.telemetry import Listing
from waypoint.byte_stream import ByteStream
from waypoint.caller import Caller
from waypoint.gateway import Gateway
from waypoint.line import Line
from waypoint.telemetry import WaypointTelemetry
from waypoint.upstream import Upstream
from waypoint.ways import Beside

HEADER_TIMEOUT_S: Final = 5.0

log = logging.getLogger("waypoint")


class ServingBeside:
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
        self._plane = data_plane
        self._telemetry = telemetry
        self._log = access_log
        self._loop = asyncio.get_running_loop()
        self._connections = Connections()
        self._upstream = Upstream(data_plane, Beside(data_plane, state, who.key, Health(time.monotonic)))
        self._gateway = Gateway(
            data_plane,
            state,
            gateway_key,
            who.identity,
            self._upstream,
            self._connections,
            telemetry,
            directory,
            who.key,
        )
        self._doors: list[socket.socket] = []
        self._drain_by = math.inf
        self._timer: asyncio.TimerHandle | None = None
        telemetry.gauge(
            "uproxy_waypoint_idle_connections",
            "HTTP connections to backends that wait for a request",
            lambda: self._upstream.idle,
        )

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
        if self._timer is None:
            self._tick()

    def take(self, batch: Sequence[tuple[str, bytes]], changes: Changes) -> None:
        """The state has changed, by this batch."""
        if changes:
            self._plane.run(lambda: self._gateway.config_changed(changes))

    def renewed(self) -> None:
        """There is no certificate here."""

    def reopen_log(self) -> None:
        """The access log's file was moved away."""
        if self._log is not None:
            self._log.reopen()

    def live(self) -> Listing:
        """Connections of opaque TCP, and requests that are under way."""
        return self._telemetry.live(time.monotonic(), time.time())

    async def drain(self, timeout_s: float, grace_s: float) -> None:
        """As `Serving.drain`."""
        self.listen(())
        self.hasten(timeout_s, grace_s)
        pause_s = 0.02
        while (self._plane.tasks or self._gateway.awaits) and time.monotonic() < self._drain_by:
            await asyncio.sleep(pause_s)
            pause_s = min(1.1 * pause_s, 0.5)
        self._plane.run(lambda: self._connections.cut_all("the drain time of this waypoint is over"))
        self._plane.run(self._gateway.close_idle)
        self._plane.run(lambda: self._plane.abort(RefusedError("shutting-down", "this waypoint is shutting down")))
        self._plane.run(self._upstream.close)
        await asyncio.sleep(0)  # what was closed is flushed

    def hasten(self, timeout_s: float, grace_s: float) -> None:
        """Drain within this time, if more is left."""
        self._drain_by = min(self._drain_by, time.monotonic() + timeout_s)
        self._plane.run(lambda: self._gateway.drain(grace_s))

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._log is not None:
            self._log.close()

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

    def _tick(self) -> None:
        now = time.monotonic()

        def tick() -> None:
            self._gateway.tick(now)
            self._upstream.tick(now)
            self._connections.tick(now)

        self._timer = self._loop.call_later(TICK_S, self._tick)
        self._plane.run(tick)
