"""`waypoint run`: wires one waypoint process together, and ends it: start, readiness, changes, signals, drain.

What it has in common with a uProxy's process is in `uproxy.process`.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import astuple
from typing import TYPE_CHECKING

import uproxy
from control.api.names import key
from control.api.status import Kind
from control.api.workload import Workload
from control.client.files import Batch, ConfigError, FileSource
from control.client.membership import Membership
from control.client.state import Changes, State
from uproxy import admin, config_dump, joining, log_levels, plane, process
from uproxy.config import Who
from uproxy.credentials import CurrentCredentials
from uproxy.joining import JoinError
from uproxy.plane import Plane
from uproxy.process import TICK_S, WATCH_S, StartError
from uproxy.telemetry import Listing
from uproxy.tls import CredentialsError
from waypoint import config
from waypoint.config import Settings
from waypoint.serving import Serving
from waypoint.telemetry import WaypointTelemetry
from waypoint.workers import Workers

if TYPE_CHECKING:
    from uproxy.demand import Demand
    from uproxy.member import Member

log = logging.getLogger("waypoint")


def main(argv: Sequence[str]) -> int:
    """Run until SIGTERM. Returns the exit status."""
    settings = config.parse(argv)
    process.log_to_stderr()
    process.harden()
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
        who, state, batch = _from_files(settings, source)
        proxy = _Process(settings, who, state, source)
        proxy.serving.take(batch, Changes())
    else:
        who = process.who_joined(membership)
        proxy = _Process(settings, who, State(who.identity.trust_domain), membership)
    return await process.live(proxy)


def _from_files(settings: Settings, source: FileSource) -> tuple[Who, State, Batch]:
    """The files' content is the batch, and applied. Raises ConfigError or StartError."""
    state = State(settings.trust_domain)
    batch = source.load()
    state.apply(batch)
    workload: Workload | None = state.workload(settings.workload)
    if workload is None:
        raise StartError(f"the configuration has no WorkloadEntry {settings.workload}: add one, or mend --workload")
    return Who(workload.name, workload.identity, workload.addresses), state, batch


class _Process:
    """The first process of a waypoint: its place in the mesh, its operators, and what serves, here or in workers.

    `process.live` calls `start`, `drain` and `close`.
    """

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
        self._credentials = CurrentCredentials(settings.identity_dir, who.identity)
        self._source = origin if isinstance(origin, FileSource) else None
        self._member: Member | None = None
        self._demand: Demand | None = None
        if isinstance(origin, Membership):
            self._become_member(origin)
        self.serving = self._serve_here() if settings.workers == 1 else self._serve_in_workers()
        self._servers: list[asyncio.Server] = []
        self._timer: asyncio.TimerHandle | None = None
        self._configured = asyncio.Event()

    def _serve_here(self) -> Serving | Workers:
        access_log = process.open_log(self.settings.access_log, self.settings.log_json, self._loop)
        self._telemetry = WaypointTelemetry(uproxy.__version__, access_log)
        return Serving(
            self._plane,
            self._who,
            self._state,
            self._credentials,
            self._telemetry,
            access_log,
            self.settings.drain_timeout_s,
            self._demand,
            self.settings.otlp,
        )

    def _serve_in_workers(self) -> Serving | Workers:
        self._telemetry = WaypointTelemetry(uproxy.__version__)
        settings: dict[str, object] = {
            "workload": self._who.workload,
            "identity": str(self._who.identity),
            "addresses": self._who.addresses,
            "identity_dir": str(self.settings.identity_dir),
            "access_log": self.settings.access_log,
            "log_json": self.settings.log_json,
            "drain_timeout_s": self.settings.drain_timeout_s,
            "otlp": astuple(self.settings.otlp) if self.settings.otlp is not None else (),
        }
        return Workers(
            self.settings.workers, settings, self._plane, self._telemetry, self._demand, self._in_force_changed
        )

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
            in_force=lambda known: self.serving.in_force(known),
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
        await self.serving.start(group)
        if self.stopping.is_set():
            return
        self.pending.discard("listeners")
        process.report_ready(self._who, self.settings.ready_fd, log)
        if self._demand is not None:
            self._tick(self._demand)

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
        self._servers = await process.listen_to_operators(
            self._who.addresses[:1],
            self.settings.admin_port,
            admin.admin_routes(self._config_dump, self._stop, self._live, self._telemetry.taps),
            self.serving.render,
            lambda: [*process.pending_of(self.pending, self._member), *self.serving.waiting()],
        )

    # -- changes

    def _reconfigure(self, batch: Sequence[tuple[str, bytes]]) -> None:
        """Take configuration, whole or not at all. Raises RecordError."""
        changes = self._state.apply(batch)
        if changes:
            log.debug("configuration %d applied", self._state.generation)
        self.serving.take(batch, changes)
        self._configured.set()

    def _progressed(self) -> None:
        """The control plane has told more: what waits for it may go on."""
        self._configured.set()
        if self._member is not None:
            self.serving.progressed(self._member.known)
        if self._demand is not None:
            self._plane.run(self._demand.progress)

    def _in_force_changed(self) -> None:
        if self._member is not None:
            self._member.in_force_changed()

    def _refused(self, error: Exception) -> None:
        log.error("the new configuration is refused, the one before stays: %s", error)

    def _renewed(self) -> None:
        self.serving.renewed()
        if self._member is not None:
            self._member.renewed()

    def _stop(self) -> None:
        self.stopping.set()
        self._configured.set()
        self.serving.interrupt()

    def _hang_up(self) -> None:
        self.serving.reopen_log()

    def _tick(self, demand: Demand) -> None:
        now = time.monotonic()
        self._timer = self._loop.call_later(TICK_S, self._tick, demand)
        self._plane.run(lambda: demand.tick(now))

    # -- what operators see

    def _register_gauges(self) -> None:
        process.register_gauges(self._telemetry, self._credentials, self._state)
        member = self._member
        if member is not None:
            process.register_member_gauges(self._telemetry, member, lambda: self.serving.in_force(member.known()).whole)

    def _config_dump(self) -> object:
        gateway = self._state.gateway(self._gateway_key)
        return {
            "version": uproxy.__version__,
            "workload": self._who.key,
            "identity": str(self._who.identity),
            "addresses": self._who.addresses,
            "gateway": self._gateway_key,
            "pending": sorted(self.pending),
            "logging": log_levels.levels(),
            "whole": self._state.whole,
            "generation": self._state.generation,
            "services": gateway.services if gateway is not None else (),
            "workloads": gateway.workloads if gateway is not None else (),
            "control": self._member.dump() if self._member is not None else None,
            "certificate": config_dump.of_certificate(self._credentials),
            **self.serving.dump(),
        }

    def _live(self) -> bytes | asyncio.Future[bytes]:
        live = self.serving.live()
        if isinstance(live, Listing):
            return process.listed(self._who, live)
        answer: asyncio.Future[bytes] = self._loop.create_future()
        live.add_done_callback(lambda done: answer.set_result(process.listed(self._who, done.result())))
        return answer

    # -- the end

    async def drain(self) -> None:
        """Accept nothing more, tell callers, and let requests and connections end by themselves, for a while."""
        self.pending.add("draining")
        await self.serving.drain()

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        for server in self._servers:
            server.close()
        self.serving.close()
        self._plane.close()
