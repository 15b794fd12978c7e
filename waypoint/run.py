"""`waypoint run`: wires one waypoint process together, and ends it: start, readiness, changes, signals, drain."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import os
import resource
import signal
import ssl
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import uproxy
from control.api.names import key
from control.api.status import Kind
from control.api.workload import Workload
from control.client.files import ConfigError, FileSource
from control.client.membership import Membership
from control.client.state import State
from uproxy import admin, joining, linux, plane
from uproxy.access_log import AccessLog, Style
from uproxy.config import Who
from uproxy.connections import Connections
from uproxy.credentials import CurrentCredentials
from uproxy.errors import RefusedError
from uproxy.joining import JoinError
from uproxy.listener import HANDSHAKES_PER_TURN, Listeners, TunnelServer
from uproxy.plane import Plane
from uproxy.pool import Pool
from uproxy.telemetry import Connection, Peer
from uproxy.tls import CredentialsError, client_context, server_context
from uproxy.tunnel import HBONE_PORT
from waypoint import config
from waypoint.config import Settings
from waypoint.gateway import Gateway
from waypoint.telemetry import WaypointTelemetry
from waypoint.upstream import Upstream

if TYPE_CHECKING:
    from uproxy.demand import Demand
    from uproxy.member import Member

METRICS_PORT: Final = 15020
READY_PORT: Final = 15021
# Beyond the drain time, for tunnels to be closed by both ends.
FAREWELL_S: Final = 0.5
TICK_S: Final = 5.0
WATCH_S: Final = 1.0

log = logging.getLogger("waypoint")


class StartError(Exception):
    """The waypoint cannot start; the text says why and what to do."""


def main(argv: Sequence[str]) -> int:
    """Run until SIGTERM. Returns the exit status."""
    settings = config.parse(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    linux.forbid_dumps()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        # Joining runs a loop of its own.
        membership = joining.member(settings.identity_dir, settings.join) if not settings.config else None
        return plane.run(_run(settings, membership))
    except (JoinError, StartError, ConfigError, CredentialsError) as error:
        print(f"waypoint run: {settings.workload or settings.identity_dir}: {error}", file=sys.stderr)
        return 1


async def _run(settings: Settings, membership: Membership | None) -> int:
    """Raises JoinError, StartError, ConfigError or CredentialsError."""
    if membership is None:
        source = FileSource(settings.config, settings.trust_domain)
        proxy = _Process(settings, *_from_files(settings, source), source)
    else:
        if not membership.addresses:
            raise JoinError(f"{membership.key} joined without an address: create a token that has one")
        who = Who(membership.workload, membership.identity, membership.addresses)
        proxy = _Process(settings, who, State(who.identity.trust_domain), membership)
    failed: Exception | None = None
    try:
        async with asyncio.TaskGroup() as group:
            await proxy.start(group)
            await proxy.stopping.wait()
            await proxy.drain()
            raise _Drained
    except* _Drained:
        pass
    except* (StartError, ConfigError, CredentialsError) as failures:
        failed = failures.exceptions[0]
    finally:
        proxy.close()
    if failed is not None:
        raise failed
    return 0


def _from_files(settings: Settings, source: FileSource) -> tuple[Who, State]:
    """Raises ConfigError or StartError."""
    state = State(settings.trust_domain)
    state.apply(source.load())
    workload: Workload | None = state.workload(settings.workload)
    if workload is None:
        raise StartError(f"the configuration has no WorkloadEntry {settings.workload}: add one, or mend --workload")
    return Who(workload.name, workload.identity, workload.addresses), state


class _Drained(Exception):
    """Ends the task group: the waypoint has drained."""


class _Process:
    """One running waypoint process: its parts and its listeners."""

    def __init__(self, settings: Settings, who: Who, state: State, origin: Membership | FileSource) -> None:
        """`origin`: where the configuration comes from; from files, `state` holds it already."""
        self.settings = settings
        self.stopping = asyncio.Event()
        self.pending = {"config", "certificate", "listeners"}
        self._who = who
        self._gateway_key = key(who.identity.namespace, who.identity.service_account)
        self._loop = asyncio.get_running_loop()
        self._plane = Plane(self._loop)
        self._state = state
        self._log = _open_log(settings, self._loop)
        self._telemetry = WaypointTelemetry(uproxy.__version__, self._log)
        self._connections = Connections()
        self._credentials = CurrentCredentials(settings.identity_dir, who.identity)
        self._use_credentials()
        self._source = origin if isinstance(origin, FileSource) else None
        self._member: Member | None = None
        self._demand: Demand | None = None
        if isinstance(origin, Membership):
            self._become_member(origin)
        self._pool = Pool(self._plane, lambda: self._client_context, who.addresses)
        self._upstream = Upstream(self._plane, self._pool)
        self._gateway = Gateway(
            self._plane, state, self._gateway_key, self._upstream, self._connections, self._telemetry, self._demand
        )
        self._server = TunnelServer(
            self._plane,
            lambda: self._server_context,
            who.identity.trust_domain,
            self._gateway.on_request,
            self._not_a_tunnel,
        )
        self._listeners = Listeners(self._plane)
        self._servers: list[asyncio.Server] = []
        self._timer: asyncio.TimerHandle | None = None
        self._configured = asyncio.Event()
        self._client_context: ssl.SSLContext
        self._server_context: ssl.SSLContext

    def _become_member(self, membership: Membership) -> None:
        # Imported here: what talks to a broker takes megabytes, and configuration from files needs none of it.
        from uproxy.demand import Demand
        from uproxy.member import Member

        self._member = member = Member(
            Kind.WAYPOINT,
            membership,
            self.settings.identity_dir,
            self._credentials,
            self._reconfigure,
            on_progress=self._progressed,
        )
        member.replica.want_workload(membership.identity, membership.workload)
        member.replica.want_waypoint(self._gateway_key)
        self._demand = Demand(self._plane, self._state, member.replica, member.interests_changed)

    # -- start

    async def start(self, group: asyncio.TaskGroup) -> None:
        """Return when it is ready, or when it was told to stop before. Raises StartError or ConfigError."""
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._stop)
        self._loop.add_signal_handler(signal.SIGHUP, self._hang_up)
        self.pending.discard("certificate")
        group.create_task(self._credentials.watch(self._renewed))
        self._register_gauges()
        await self._listen_to_operators()
        if self._source is not None:
            if self._state.gateway(self._gateway_key) is None:
                raise StartError(
                    f"the configuration has no Gateway {self._gateway_key}, whose name is the service account of "
                    f"{self._who.key}: add it, or mend spec.serviceAccount"
                )
            group.create_task(self._source.watch(self._reconfigure, self._refused, WATCH_S))
        if self._member is not None:
            await self._wait_for_configuration(self._member, group)
        if self.stopping.is_set():
            return
        self.pending.discard("config")
        for own in self._who.addresses:
            try:
                self._listeners.listen(own, HBONE_PORT, self._server.serve, HANDSHAKES_PER_TURN)
            except OSError as error:
                raise StartError(f"cannot listen on {own}:{HBONE_PORT}: {error.strerror}") from error
        self.pending.discard("listeners")
        self._report_ready()
        self._tick()

    async def _wait_for_configuration(self, member: Member, group: asyncio.TaskGroup) -> None:
        """From disk, if it was ever known, and the control plane may be away; else for as long as it takes."""
        member.restore()
        group.create_task(member.run())
        while not self._is_configured(member) and not self.stopping.is_set():
            self._configured.clear()
            await self._configured.wait()

    def _is_configured(self, member: Member) -> bool:
        """Callers come as soon as it is ready, for any of its services."""
        return member.replica.whole and self._state.gateway(self._gateway_key) is not None

    async def _listen_to_operators(self) -> None:
        host = self._who.addresses[0]
        operator = host if ipaddress.ip_address(host).is_loopback else "127.0.0.1"
        for address, port, routes in (
            (
                operator,
                self.settings.admin_port,
                admin.admin_routes(self._config_dump, self._stop, logging.getLogger()),
            ),
            (host, METRICS_PORT, admin.metrics_routes(self._telemetry.render)),
            (host, READY_PORT, admin.ready_routes(self._pending)),
        ):
            try:
                self._servers.append(await admin.serve(address, port, routes))
            except OSError as error:
                hint = ": another proxy may run here; see --admin-port" if port == self.settings.admin_port else ""
                raise StartError(f"cannot listen on {address}:{port}: {error.strerror or error}{hint}") from error

    def _pending(self) -> list[str]:
        """What it is not ready for yet; of a member's configuration, what has not come."""
        missing = self._member.replica.waiting() if self._member is not None and "config" in self.pending else ()
        return [*self.pending, *(f"config: {text}" for text in missing)]

    def _report_ready(self) -> None:
        log.info("%s is ready as %s", self._who.key, self._who.identity)
        if self.settings.ready_fd is not None:
            with contextlib.suppress(OSError):
                os.write(self.settings.ready_fd, b"ready\n")
            os.close(self.settings.ready_fd)

    def _not_a_tunnel(self, source: str, started: float, error: RefusedError) -> None:
        record = Connection("waypoint", Peer(source), Peer("-"), started)
        record.flag, record.error = error.flag, str(error)
        self._telemetry.closed(record, time.monotonic())

    # -- changes

    def _reconfigure(self, batch: Sequence[tuple[str, bytes]]) -> None:
        """Take configuration, whole or not at all. Raises RecordError."""
        changes = self._state.apply(batch)
        if changes:
            log.debug("configuration %d applied", self._state.generation)
            self._plane.run(lambda: self._gateway.config_changed(changes))
        self._configured.set()

    def _progressed(self) -> None:
        """The control plane has told more: what waits for it may go on."""
        self._configured.set()
        if self._demand is not None:
            self._plane.run(self._demand.progress)

    def _refused(self, error: Exception) -> None:
        log.error("the new configuration is refused, the one before stays: %s", error)

    def _renewed(self) -> None:
        self._use_credentials()
        # Streams that are open stay on their tunnels; new ones use the new certificate.
        self._plane.run(self._pool.retire)
        if self._member is not None:
            self._member.renewed()

    def _use_credentials(self) -> None:
        credentials = self._credentials.value
        self._client_context, self._server_context = client_context(credentials), server_context(credentials)

    def _stop(self) -> None:
        self.stopping.set()
        self._configured.set()

    def _hang_up(self) -> None:
        if self._log is not None:
            self._log.reopen()

    def _tick(self) -> None:
        now = time.monotonic()

        def tick() -> None:
            self._upstream.tick(now)
            self._pool.tick(now)
            self._server.tick(now)
            self._connections.tick(now)
            if self._demand is not None:
                self._demand.tick(now)

        self._timer = self._loop.call_later(TICK_S, self._tick)
        self._plane.run(tick)

    # -- what operators see

    def _register_gauges(self) -> None:
        gauge = self._telemetry.gauge
        gauge("uproxy_tunnels_outbound", "Open tunnels to peers", lambda: len(self._pool.tunnels()))
        gauge("uproxy_tunnels_inbound", "Open tunnels from peers", lambda: len(self._server.tunnels()))
        gauge("uproxy_tasks", "Connections being set up or relayed", lambda: len(self._plane.tasks))
        gauge(
            "uproxy_waypoint_idle_connections",
            "HTTP connections to backends that wait for a request",
            lambda: self._upstream.idle,
        )
        gauge(
            "uproxy_certificate_expiry_timestamp_seconds",
            "When this workload's certificate expires, Unix time",
            lambda: self._credentials.value.not_after,
        )
        gauge("uproxy_config_generation", "Configurations applied since the start", lambda: self._state.generation)
        member = self._member
        if member is not None:
            gauge(
                "uproxy_config_whole",
                "Whether everything that is subscribed to has come: 0 or 1",
                lambda: int(member.replica.whole),
            )
            gauge(
                "uproxy_config_age_seconds",
                "Since the control plane last said that the configuration is current",
                lambda: member.age_s,
            )
            gauge("uproxy_control_connected", "Whether a broker is connected: 0 or 1", lambda: int(member.connected))

    def _config_dump(self) -> object:
        certificate = self._credentials.value
        gateway = self._state.gateway(self._gateway_key)
        return {
            "workload": self._who.key,
            "identity": str(self._who.identity),
            "gateway": self._gateway_key,
            "pending": sorted(self.pending),
            "whole": self._state.whole,
            "generation": self._state.generation,
            "services": gateway.services if gateway is not None else (),
            "workloads": gateway.workloads if gateway is not None else (),
            "control": self._member.dump() if self._member is not None else None,
            "certificate": {"serial": f"{certificate.serial:x}", "not_after": certificate.not_after},
            "tunnels": [
                {"peer": str(t.peer), "address": t.peer_address, "streams": len(t.connection.streams)}
                for t in (*self._server.tunnels(), *self._pool.tunnels())
            ],
            "idle_connections": self._upstream.idle,
        }

    # -- the end

    async def drain(self) -> None:
        """Accept nothing more, tell callers, and let requests and connections end by themselves, for a while."""
        log.info("draining for up to %g s", self.settings.drain_timeout_s)
        self.pending.add("draining")
        self._gateway.draining = True
        deadline = time.monotonic() + self.settings.drain_timeout_s
        self._listeners.close()
        self._plane.run(lambda: self._server.drain(final=False))
        # A round trip for the streams that are on their way (RFC 9113 section 6.8), then the final word.
        await asyncio.sleep(min(0.1, self.settings.drain_timeout_s))
        self._plane.run(lambda: self._server.drain(final=True))
        while self._plane.tasks and time.monotonic() < deadline:  # noqa: ASYNC110 - once in a process's life
            await asyncio.sleep(0.02)
        self._plane.run(lambda: self._connections.cut_all("the drain time of this waypoint is over"))
        self._plane.run(self._gateway.close_idle)
        self._plane.run(lambda: self._plane.abort(RefusedError("shutting-down", "this waypoint is shutting down")))
        self._plane.run(self._upstream.close)
        self._plane.run(self._pool.finish)
        self._plane.run(self._server.finish)
        deadline = max(deadline, time.monotonic() + FAREWELL_S)
        while (self._pool.tunnels() or self._server.tunnels()) and time.monotonic() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        self._plane.run(self._pool.close)
        self._plane.run(self._server.close)
        log.info("drained")

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        for server in self._servers:
            server.close()
        self._listeners.close()
        if self._log is not None:
            self._log.close()
        self._plane.close()


def _open_log(settings: Settings, loop: asyncio.AbstractEventLoop) -> AccessLog | None:
    if settings.access_log == "off":
        return None
    return AccessLog(settings.access_log, Style.JSON if settings.log_json else Style.TEXT, loop)
