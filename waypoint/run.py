"""`waypoint run`: wires one waypoint process together, and ends it: start, readiness, changes, signals, drain.

What it has in common with a uProxy's process is in `uproxy.process`.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import astuple, replace
from typing import TYPE_CHECKING, Any

import uproxy
from control.api.gateway import Engine
from control.api.names import key
from control.api.status import Kind, Knowledge
from control.api.workload import Workload
from control.client.files import Batch, ConfigError, FileSource
from control.client.membership import Membership
from control.client.state import Changes, State
from uproxy import admin, config_dump, handover, joining, log_levels, plane, process
from uproxy.config import Who
from uproxy.credentials import CurrentCredentials
from uproxy.doors import doors
from uproxy.handover import HandoverError, Hello, Movable, Predecessor
from uproxy.joining import JoinError
from uproxy.listener import Inherited
from uproxy.plane import Plane
from uproxy.process import TICK_S, WATCH_S, StartError
from uproxy.telemetry import Listing
from uproxy.tls import CredentialsError
from uproxy.workers import Workers
from waypoint import config
from waypoint.config import Settings
from waypoint.gateway import GRACE_S
from waypoint.serving import Serving
from waypoint.successor import Successor
from waypoint.telemetry import WaypointTelemetry

if TYPE_CHECKING:
    from uproxy.demand import Demand
    from uproxy.member import Member
    from waypoint.engine_envoy.serving import EnvoyServing

log = logging.getLogger("waypoint")


def main(argv: Sequence[str]) -> int:
    """Run until SIGTERM. Returns the exit status."""
    settings = config.parse(argv)
    process.log_to_stderr()
    process.harden()
    try:
        # Joining runs a loop of its own.
        membership = joining.member(settings.identity_dir, settings.join) if not settings.config else None
        return plane.run(_run(settings, Successor(argv), membership))
    except (JoinError, StartError, ConfigError, CredentialsError) as error:
        print(f"waypoint run: {settings.workload or settings.identity_dir}: {error}", file=sys.stderr)
        return 1


async def _run(settings: Settings, successor: Successor, membership: Membership | None) -> int:
    """Raises JoinError, StartError, ConfigError or CredentialsError."""
    if membership is None:
        source = FileSource(settings.config, settings.trust_domain)
        who, state, batch = _from_files(settings, source)
        proxy = _Process(settings, successor, who, state, source)
        proxy.serving.take(batch, Changes())
    else:
        who = process.who_joined(membership)
        proxy = _Process(settings, successor, who, State(who.identity.trust_domain), membership)
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

    def __init__(
        self, settings: Settings, successor: Successor, who: Who, state: State, origin: Membership | FileSource
    ) -> None:
        """`successor`: how one is started. `origin`: where the configuration comes from; from files, `state` holds it
        already.
        """
        self.settings = settings
        self._successor = successor
        self.stopping = asyncio.Event()
        self.pending = {"config", "certificate", "listeners"}
        self._who = who
        self._gateway_key = key(who.identity.namespace, settings.gateway or who.identity.service_account)
        self._loop = asyncio.get_running_loop()
        self._plane = Plane(self._loop)
        self._state = state
        self._credentials = CurrentCredentials(settings.identity_dir, who.identity)
        self._source = origin if isinstance(origin, FileSource) else None
        self._member: Member | None = None
        self._demand: Demand | None = None
        if isinstance(origin, Membership):
            self._become_member(origin)
        self._log = process.open_log(settings.access_log, settings.log_json, self._loop)
        self._telemetry = WaypointTelemetry(uproxy.__version__, self._log)
        self._engine = Engine.BUILT_IN
        """What serves, or will unless the Gateway says otherwise by then."""
        self.serving: Serving | Workers | EnvoyServing
        self.serving = self._serve_here() if settings.workers == 1 else self._serve_in_workers()
        self._inherited = Inherited()
        self._servers: list[admin.Pages] = []
        self._handover: socket.socket | None = None
        """Where a successor comes."""
        self._left = False
        """Whether one has taken over."""
        self._end = settings.drain_timeout_s, min(GRACE_S, settings.drain_timeout_s / 2)
        """Seconds to drain in, and of grace, when it is told to end."""
        self._drain = self._end
        self._timer: asyncio.TimerHandle | None = None
        self._configured = asyncio.Event()
        self._group: asyncio.TaskGroup

    def _serve_here(self) -> Serving:
        return Serving(
            self._plane,
            self._who,
            self._gateway_key,
            self._state,
            self._credentials,
            self._telemetry,
            self._log,
            self._demand,
            self.settings.otlp,
        )

    def _serve_by_envoy(self) -> EnvoyServing:
        """Raises StartError."""
        # Imported here: most waypoints do without.
        from waypoint.engine_envoy.serving import EnvoyServing

        if self.settings.otlp is not None:
            raise StartError("the engine envoy records no spans: remove --otlp-endpoint")
        return EnvoyServing(
            self._plane,
            self._who,
            self._gateway_key,
            self._state,
            self._credentials,
            self._telemetry,
            self._log,
            self._demand,
            self._in_force_changed,
            self.settings.identity_dir,
            self.settings.workers,
        )

    def _serve_in_workers(self) -> Workers:
        settings: dict[str, object] = {
            "workload": self._who.workload,
            "identity": str(self._who.identity),
            "gateway": self._gateway_key,
            "addresses": self._who.addresses,
            "identity_dir": str(self.settings.identity_dir),
            "closed": "",
            "access_log": self.settings.access_log,
            "log_json": self.settings.log_json,
            "otlp": astuple(self.settings.otlp) if self.settings.otlp is not None else (),
        }
        workers = Workers(
            self.settings.workers,
            settings,
            lambda inherited: doors(self._who.addresses, inherited, self.settings.workers),
            self._plane,
            self._telemetry,
            self._demand,
            self._in_force_changed,
        )
        self._telemetry.counter(
            "uproxy_waypoint_worker_restarts_total", "Workers that died and were replaced", lambda: workers.restarts
        )
        return workers

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
            problems=lambda: self.serving.problems(),
            in_force=self._in_force,
        )
        member.replica.want_workload(membership.identity, membership.workload)
        member.replica.want_waypoint(self._gateway_key)
        self._demand = Demand(self._plane, self._state, member.replica, member.interests_changed)

    # -- start

    async def start(self, group: asyncio.TaskGroup) -> None:
        """Return when it is ready, or when it was told to stop before. Raises StartError or ConfigError."""
        self._group = group
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._stop)
        self._loop.add_signal_handler(signal.SIGHUP, self._hang_up)
        self.pending.discard("certificate")
        group.create_task(self._credentials.watch(self._renewed))
        self._register_gauges()
        if self._source is not None:
            if self._state.gateway(self._gateway_key) is None:
                raise StartError(
                    f"the configuration has no Gateway {self._gateway_key}, "
                    + (
                        "which --gateway names: add it, or mend that"
                        if self.settings.gateway
                        else f"whose name is the service account of {self._who.key}: add it, or mend "
                        "spec.serviceAccount; or name it with --gateway, if its placement is service-account"
                    )
                )
            group.create_task(self._source.watch(self._reconfigure, self._refused, WATCH_S))
        take_over = self.settings.take_over
        predecessor = await process.predecessor(self.settings.identity_dir, self._hello) if take_over else None
        if self._member is not None:
            self._member.restore()  # what is known, if anything is: the control plane may be away
        if predecessor is not None:
            await self._take_over(predecessor, group)
        else:
            await self._begin(group)
            if self.stopping.is_set():
                return
            self._handover = handover.listen(self.settings.identity_dir)
            process.report_ready(self._who, self.settings.ready_fd, log)
        if self._handover is not None:
            group.create_task(handover.serve(self._handover, self.settings.identity_dir, self._hello, self))
        if self._demand is not None:
            self._tick(self._demand)

    async def _begin(self, group: asyncio.TaskGroup) -> None:
        await self._listen_to_operators()
        if self._member is not None:
            group.create_task(self._member.run())
            await self._wait_for_configuration(self._member)
        if not self.stopping.is_set():
            await self._serve(group)

    async def _serve(self, group: asyncio.TaskGroup) -> None:
        self.pending.discard("config")
        if self._wanted_engine is Engine.ENVOY:
            self._engine = Engine.ENVOY
            self.serving = self._serve_by_envoy()
        await self.serving.start(group, self._inherited)
        if not self.stopping.is_set():
            self.pending.discard("listeners")
            self._in_force_changed()

    async def _wait_for_configuration(self, member: Member) -> None:
        """For as long as it takes."""
        while not self._is_configured(member) and not self.stopping.is_set():
            self._configured.clear()
            await self._configured.wait()

    def _is_configured(self, member: Member) -> bool:
        """Callers come as soon as it is ready, for any of its services."""
        return member.replica.whole and self._state.gateway(self._gateway_key) is not None

    @property
    def _wanted_engine(self) -> Engine:
        gateway = self._state.gateway(self._gateway_key)
        return gateway.engine if gateway is not None else self._engine

    def _missing(self) -> list[str]:
        """What it is not ready for."""
        missing = [*process.pending_of(self.pending, self._member), *self.serving.waiting()]
        if "listeners" not in self.pending and self._engine is not self._wanted_engine:
            missing.append(f"engine: {self._wanted_engine.value} is wanted now: `waypoint upgrade`")
        return missing

    async def _listen_to_operators(self) -> None:
        self._servers = await process.listen_to_operators(
            self._who.addresses[:1],
            self.settings.admin_port,
            admin.admin_routes(self._config_dump, self._stop, self._live, self._telemetry.taps),
            lambda: self.serving.render(),
            # Whoever asked before it left is told of the waypoint, whose new process is ready.
            lambda: [] if self._left else self._missing(),
            self._inherited,
        )

    # -- the hand-over (`uproxy.handover`): from the one that runs, and to the next one

    @property
    def _hello(self) -> Hello:
        return Hello(uproxy.__version__, self._who.key, self._who.addresses, "waypoint")

    async def _take_over(self, predecessor: Predecessor, group: asyncio.TaskGroup) -> None:
        """From one that goes on as before until this one is ready. Raises StartError."""
        if self._member is not None and not self._is_configured(self._member):
            raise StartError("the one that runs has left no configuration to begin with: see its log")
        try:
            for sock in await predecessor.sockets():
                self._inherited.add(sock)
            await self._serve(group)
            if self.stopping.is_set():
                return
            await self._listen_to_operators()
            await predecessor.rest()
            process.report_ready(self._who, self.settings.ready_fd, log)
            await predecessor.leave()
            # Not before: what others find it by stays the old one's, if that takes its place back.
            inherited = self._inherited.take(socket.SOCK_SEQPACKET, "", 0)
            self._handover = handover.listen(self.settings.identity_dir, inherited)
            self._inherited.close()
        except HandoverError as error:
            raise StartError(f"the one that runs takes its place back: {error}") from None
        finally:
            predecessor.close()
        log.info("took over from version %s", predecessor.version)
        if self._member is not None:
            group.create_task(self._member.run())

    async def prepare(self) -> None:
        if self._member is not None:
            await self._member.save()

    def pause(self) -> list[int]:
        """It goes on accepting until it leaves, as its workers do among each other."""
        assert self._handover is not None
        servers = [sock for server in self._servers for sock in server.sockets]
        return [self._handover.fileno(), *(sock.fileno() for sock in (*self.serving.sockets(), *servers))]

    def resume(self) -> None:
        """Nothing was stopped."""

    def direct(self) -> list[Mapping[str, Any]]:
        return []

    def connections(self) -> list[Movable]:
        return []

    def leave(self) -> None:
        """Another process is this waypoint now: carry on what is here, and drain."""
        self._left = True
        timeout_s = self.settings.upgrade_drain_timeout_s
        # Callers keep connections for minutes: who closes one that waits may meet a request that is on its way.
        self._drain = timeout_s, timeout_s / 2
        for server in self._servers:
            server.leave()
        if self._member is not None:
            self._member.leave()
        self._stop()

    async def upgrade(self) -> int:
        return await self._successor.start()

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

    def _in_force(self, known: Knowledge) -> Knowledge:
        """What of all that is known holds for callers: nothing before they are served."""
        if "listeners" in self.pending:
            return Knowledge(False, ("listeners", *known.waiting), {})
        return self.serving.in_force(known)

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
        if self.stopping.is_set():  # asked again, or after a hand-over
            self.serving.hasten(*self._end)
        self.stopping.set()
        self._configured.set()
        self.serving.interrupt()

    def _hang_up(self) -> None:
        """Open the access log anew, and go by other settings, if there are any, in another process."""
        self.serving.reopen_log()
        try:
            found = config.parse(self._successor.argv)
        except SystemExit:
            log.error("the settings as they are now are wrong, and those before stay")
            return
        if found != replace(self.settings, take_over=False, ready_fd=found.ready_fd) and not self._left:
            self._group.create_task(self._begin_anew())

    async def _begin_anew(self) -> None:
        try:
            await self._successor.start()
        except HandoverError as error:
            log.error("the settings before stay: %s", error)

    def _tick(self, demand: Demand) -> None:
        now = time.monotonic()
        self._timer = self._loop.call_later(TICK_S, self._tick, demand)
        self._plane.run(lambda: demand.tick(now))

    # -- what operators see

    def _register_gauges(self) -> None:
        process.register_gauges(self._telemetry, self._credentials, self._state)
        member = self._member
        if member is not None:
            process.register_member_gauges(self._telemetry, member, lambda: self._in_force(member.known()).whole)

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
        await self.serving.drain(*self._drain)
        await asyncio.gather(*(server.answered() for server in self._servers))

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        for server in self._servers:
            server.close()
        if self._handover is not None:
            self._handover.close()
            if not self._left:
                handover.remove(self.settings.identity_dir)
        self.serving.close()
        self._plane.close()
