"""The data plane of one waypoint process: its parts, its listener, its drain."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from control.api.status import Knowledge
from control.client.state import State
from uproxy import config_dump, process
from uproxy.access_log import AccessLog
from uproxy.config import Collector, Who
from uproxy.credentials import CurrentCredentials
from uproxy.directory import Directory
from uproxy.doors import doors
from uproxy.errors import RefusedError
from uproxy.listener import HANDSHAKES_PER_TURN, Inherited, Listeners, TunnelServer
from uproxy.plane import Plane
from uproxy.pool import Pool
from uproxy.process import FAREWELL_S
from uproxy.telemetry import Connection, Peer
from uproxy.tls import Context, client_context, server_context
from waypoint.interior import Interior
from waypoint.telemetry import WaypointTelemetry
from waypoint.ways import Tunnels

if TYPE_CHECKING:
    from uproxy.otlp import Exporter

log = logging.getLogger("waypoint")


class Serving(Interior):
    """Serves callers in this process, by `state`, which somebody else brings up to date."""

    def __init__(
        self,
        data_plane: Plane,
        who: Who,
        gateway_key: str,
        state: State,
        credentials: CurrentCredentials,
        telemetry: WaypointTelemetry,
        access_log: AccessLog | None,
        directory: Directory | None = None,
        collector: Collector | None = None,
    ) -> None:
        """`directory`: where what is not known is asked for, if anywhere. `collector`: of spans, if there are any."""
        self._who = who
        self._credentials = credentials
        self._use_credentials()
        self._pool = Pool(data_plane, lambda: self._client_context, who.addresses)
        way = Tunnels(self._pool)
        super().__init__(
            data_plane, who, gateway_key, state, way, telemetry, access_log, directory, credentials.directory
        )
        self.exporter: Exporter | None = None
        """Somebody runs it."""
        if collector is not None:
            self._record_spans(collector)
        self._server = TunnelServer(
            data_plane,
            lambda: self._server_context,
            who.identity.trust_domain,
            self._gateway.on_request,
            self._not_a_tunnel,
            queues=True,
        )
        self._listeners = Listeners(data_plane)
        self._client_context: Context
        self._server_context: Context
        self._register_gauges()

    async def start(self, group: asyncio.TaskGroup, inherited: Inherited) -> None:
        """Take callers, also at the sockets that another process has handed over. Raises StartError."""
        if self.exporter is not None:
            group.create_task(self.exporter.run())
        self.listen([sock for door in doors(self._who.addresses, inherited, 1) for sock in door])

    def listen(self, sockets: Sequence[socket.socket]) -> None:
        """Take callers at these, and no more at any other."""
        for sock in [one for one in self._listeners.sockets if one not in sockets]:
            self._listeners.drop(sock)
        for sock in sockets:
            if sock not in self._listeners.sockets:
                self._listeners.add(sock, self._server.serve, HANDSHAKES_PER_TURN)
        self._begin_ticks()

    def sockets(self) -> list[socket.socket]:
        """Where callers are taken."""
        return self._listeners.sockets

    def interrupt(self) -> None:
        """`start` has returned at once."""

    def progressed(self, known: Callable[[], Knowledge]) -> None:
        """What the state has taken is in force at once."""

    def in_force(self, known: Knowledge) -> Knowledge:
        """What of all that is known holds for every connection."""
        return known

    def problems(self) -> tuple[str, ...]:
        """What somebody should look at."""
        return ()

    def waiting(self) -> tuple[str, ...]:
        """What keeps it from serving, once it was started."""
        return ()

    def renewed(self) -> None:
        """There is a new certificate."""
        self._use_credentials()
        # Streams that are open stay on their tunnels; new ones use the new certificate.
        self._plane.run(self._pool.retire)
        self._plane.run(self._pool.end_revoked)
        self._plane.run(self._server.end_revoked)

    def render(self) -> bytes:
        """All metrics of this process."""
        return self._telemetry.render()

    def dump(self) -> dict[str, object]:
        """For operators."""
        return {
            "tunnels": config_dump.of_tunnels(self._pool.tunnels()),
            "tunnels_inbound": config_dump.of_tunnels(self._server.tunnels()),
            "idle_connections": self._upstream.idle,
            "ejected_endpoints": self._gateway.balancers.ejected(),
        }

    async def drain(self, timeout_s: float, grace_s: float) -> None:
        """Accept nothing more, tell callers, and let requests and connections end by themselves, for a while.

        `grace_s`: how long a connection may wait for a request, which may be on its way.
        """
        log.info("draining for up to %g s", timeout_s)
        self._listeners.close()
        self._plane.run(lambda: self._server.drain(final=False))
        # Behind the GOAWAY, so that nobody comes back here.
        self.hasten(timeout_s, grace_s)
        # A round trip for the streams that are on their way (RFC 9113 section 6.8), then the final word.
        await asyncio.sleep(min(0.1, timeout_s))
        self._plane.run(lambda: self._server.drain(final=True))
        await self._let_end()
        if self.exporter is not None:
            await self.exporter.finish(FAREWELL_S)
        self._end()
        self._plane.run(self._pool.finish)
        self._plane.run(self._server.finish)
        deadline = max(self._drain_by, time.monotonic() + FAREWELL_S)
        while (self._pool.tunnels() or self._server.tunnels()) and time.monotonic() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        self._plane.run(self._pool.close)
        self._plane.run(self._server.close)
        log.info("drained")

    def close(self) -> None:
        self._listeners.close()
        super().close()

    def _record_spans(self, collector: Collector) -> None:
        from uproxy.otlp import nearby

        service = f"{self._who.identity.service_account}.{self._who.identity.namespace}"
        dial = nearby(collector.host, collector.port)
        self.exporter = process.record_spans(collector, dial, self._telemetry, lambda: service)

    def _not_a_tunnel(self, source: str, started: float, error: RefusedError) -> None:
        record = Connection("waypoint", Peer(source), Peer("-"), started)
        record.flag, record.error = error.flag, str(error)
        self._telemetry.closed(record, time.monotonic())

    def _use_credentials(self) -> None:
        credentials = self._credentials.value
        self._client_context, self._server_context = client_context(credentials), server_context(credentials)

    def _tick(self, now: float) -> None:
        super()._tick(now)
        self._pool.tick(now)
        self._server.tick(now)

    def _register_gauges(self) -> None:
        gauge = self._telemetry.gauge
        gauge("uproxy_tunnels_outbound", "Open tunnels to peers", lambda: len(self._pool.tunnels()))
        gauge("uproxy_tunnels_inbound", "Open tunnels from peers", lambda: len(self._server.tunnels()))
        gauge("uproxy_tasks", "Connections being set up or relayed", lambda: len(self._plane.tasks))
        balancers = self._gateway.balancers
        gauge(
            "uproxy_waypoint_ejected_endpoints",
            "Endpoints that get no requests for a while because they have failed",
            lambda: len(balancers.ejected()),
        )
        self._telemetry.counter(
            "uproxy_waypoint_ejections_total", "Endpoints ejected so far", lambda: balancers.ejections
        )
