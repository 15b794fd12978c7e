"""What is inside of a waypoint process, however callers come to it and however it gets to backends."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence
from pathlib import Path

from control.client.state import Changes, State
from uproxy.access_log import AccessLog
from uproxy.config import Who
from uproxy.connections import Connections
from uproxy.directory import Directory
from uproxy.errors import RefusedError
from uproxy.plane import Plane
from uproxy.process import TICK_S
from uproxy.telemetry import Listing
from waypoint.gateway import Gateway
from waypoint.telemetry import WaypointTelemetry
from waypoint.upstream import Upstream
from waypoint.ways import Way


class Interior:
    """Requests, connections to backends, and how they end. Who has it lets callers in."""

    def __init__(
        self,
        data_plane: Plane,
        who: Who,
        gateway_key: str,
        state: State,
        way: Way,
        telemetry: WaypointTelemetry,
        access_log: AccessLog | None,
        directory: Directory | None,
        closed: Path | None,
    ) -> None:
        """`directory`: where what is not known is asked for, if anywhere. `closed`: as of `Gateway`."""
        self._plane = data_plane
        self._telemetry = telemetry
        self._log = access_log
        self._loop = asyncio.get_running_loop()
        self._connections = Connections()
        self._upstream = Upstream(data_plane, way)
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
            closed,
        )
        self._drain_by = math.inf
        self._timer: asyncio.TimerHandle | None = None
        telemetry.gauge(
            "uproxy_waypoint_idle_connections",
            "HTTP connections to backends that wait for a request",
            lambda: self._upstream.idle,
        )

    def take(self, batch: Sequence[tuple[str, bytes]], changes: Changes) -> None:
        """The state has changed, by this batch."""
        if changes:
            self._plane.run(lambda: self._gateway.config_changed(changes))

    def reopen_log(self) -> None:
        """The access log's file was moved away."""
        if self._log is not None:
            self._log.reopen()

    def live(self) -> Listing:
        """Connections of opaque TCP, and requests that are under way."""
        return self._telemetry.live(time.monotonic(), time.time())

    def hasten(self, timeout_s: float, grace_s: float) -> None:
        """Drain within this time, if more is left."""
        self._drain_by = min(self._drain_by, time.monotonic() + timeout_s)
        self._plane.run(lambda: self._gateway.drain(grace_s))

    async def _let_end(self) -> None:
        """What is under way, while there is time."""
        pause_s = 0.02
        while (self._plane.tasks or self._gateway.awaits) and time.monotonic() < self._drain_by:
            await asyncio.sleep(pause_s)
            pause_s = min(1.1 * pause_s, 0.5)
        self._plane.run(lambda: self._connections.cut_all("the drain time of this waypoint is over"))
        self._plane.run(self._gateway.close_idle)

    def _end(self) -> None:
        """What is left."""
        self._plane.run(lambda: self._plane.abort(RefusedError("shutting-down", "this waypoint is shutting down")))
        self._plane.run(self._upstream.close)

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._log is not None:
            self._log.close()

    def _begin_ticks(self) -> None:
        """Where it was not done yet."""
        if self._timer is None:
            self._again()

    def _again(self) -> None:
        self._timer = self._loop.call_later(TICK_S, self._again)
        now = time.monotonic()
        self._plane.run(lambda: self._tick(now))

    def _tick(self, now: float) -> None:
        self._gateway.tick(now)
        self._upstream.tick(now)
        self._connections.tick(now)
