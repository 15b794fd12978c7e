"""`uproxy run`: wires one proxy together, and ends it: start, readiness, changes of configuration, signals, drain.

What it has in common with a waypoint's process is in `process`.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import math
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

import uproxy
from control.api.address import HBONE_PORT
from control.api.status import Kind
from control.client.files import ConfigError, FileSource
from control.client.membership import Membership
from control.client.state import Changes, State
from uproxy import admin, config, config_dump, explicit, handover, joining, log_levels, plane, process
from uproxy.beside import GRACE_S, Beside
from uproxy.config import Collector, Settings, Who
from uproxy.connections import Connections
from uproxy.credentials import CurrentCredentials
from uproxy.door import Door
from uproxy.errors import RefusedError
from uproxy.explicit import Directory
from uproxy.handover import HandoverError, Hello, Movable, Predecessor, Rest
from uproxy.inbound import Begun, Inbound, Plain
from uproxy.joining import JoinError
from uproxy.listener import ACCEPTS_PER_TURN, HANDSHAKES_PER_TURN, Inherited, Listeners, Serve
from uproxy.outbound import Outbound, Self
from uproxy.plain_relay import PlainRelay
from uproxy.plane import Plane
from uproxy.pool import Pool
from uproxy.process import FAREWELL_S, TICK_S, WATCH_S, StartError
from uproxy.redirect import OUTBOUND_PORT, PROBE_PORT, PROBE_V4, PROBE_V6, original_destination, redirected_destination
from uproxy.telemetry import Listing, Telemetry
from uproxy.tls import Context, CredentialsError, client_context, server_context

if TYPE_CHECKING:
    from uproxy.beside_feed import Feed
    from uproxy.demand import Demand
    from uproxy.direct import DirectPath
    from uproxy.dns import Responder
    from uproxy.member import Member
    from uproxy.otlp import Exporter

PROBE_TIMEOUT_S = 5.0

_MEND_CAPTURE = {
    "ebpf": "is the node agent running, and is this workload registered? See `uproxy node --help`",
    "nft": "are the rules in force? `nft list table inet uproxy` in the workload's namespace shows them",
}

log = logging.getLogger("uproxy")


def main(argv: Sequence[str]) -> int:
    """Run until SIGTERM. Returns the exit status."""
    settings = config.parse(argv)
    process.log_to_stderr()
    process.harden()
    who, membership = settings.who, None
    name = who.key if who is not None else str(settings.identity_dir)
    try:
        if who is None:
            membership = joining.member(settings.identity_dir, settings.join)
            who = process.who_joined(membership)
        return plane.run(_run(settings, who, membership))
    except (JoinError, StartError, ConfigError, CredentialsError) as error:
        print(f"uproxy run: {name}: {error}", file=sys.stderr)
        return 1


def _feed(
    membership: Membership,
    settings: Settings,
    credentials: CurrentCredentials,
    gateway: str,
    on_batch: Callable[[Sequence[tuple[str, bytes]]], None],
    on_progress: Callable[[], None],
) -> Feed:
    # Imported here: few workloads have a waypoint's process beside them.
    from uproxy.beside_feed import Feed

    return Feed(membership, settings.identity_dir, credentials, gateway, on_batch, on_progress)


async def _run(settings: Settings, who: Who, membership: Membership | None) -> int:
    """Raises StartError, ConfigError or CredentialsError."""
    return await process.live(_Proxy(settings, who, membership, asyncio.get_running_loop()))


class _Proxy:
    """One running proxy: its parts and its listeners. `process.live` calls `start`, `drain` and `close`."""

    def __init__(
        self, settings: Settings, who: Who, membership: Membership | None, loop: asyncio.AbstractEventLoop
    ) -> None:
        """`membership`: where the configuration comes from; None: from the files in the settings."""
        self.settings = settings
        self.stopping = asyncio.Event()
        self.pending = {"config", "certificate", "listeners"} | ({"capture"} if settings.captured else set())
        self._who = who
        self._loop = loop
        self._plane = Plane(loop)
        self._state = State(who.identity.trust_domain)
        self._log = process.open_log(settings.access_log, settings.log_json, loop)
        self._telemetry = Telemetry(uproxy.__version__, self._log)
        self._connections = Connections()
        self._credentials = CurrentCredentials(settings.identity_dir, who.identity)
        self._use_credentials()
        self._beside = Beside(
            self._plane,
            self._telemetry,
            {
                "workload": who.workload,
                "identity": str(who.identity),
                "addresses": who.addresses,
                "closed": str(settings.identity_dir),
                "access_log": settings.access_log,
                "log_json": settings.log_json,
                "otlp": (),
            },
            self._in_force_changed,
            partial(_feed, membership, settings, self._credentials) if membership is not None else None,
        )
        self._member: Member | None = None
        self._demand: Demand | None = None
        if membership is not None:
            self._become_member(membership)
        own = Self(who.key, str(who.identity), who.identity.trust_domain, who.addresses)
        self._direct_path: DirectPath | None = None
        if settings.direct_socket is not None:
            from uproxy.direct import DirectPath

            self._direct_path = DirectPath(settings.direct_socket, self._state, self._telemetry, own)
        self._pool = Pool(self._plane, lambda: self._client_context, who.addresses)
        self._outbound = Outbound(
            self._plane,
            self._state,
            self._pool,
            self._connections,
            self._telemetry,
            own,
            self._demand,
            self._direct_path,
        )
        self._inbound = Inbound(
            self._plane,
            self._state,
            lambda: self._server_context,
            self._connections,
            self._telemetry,
            own,
            self._demand,
            self._direct_path,
            self._beside,
        )
        self._directory = Directory(self._state, self._demand)
        self._exporter = self._record_spans(settings.otlp) if settings.otlp is not None else None
        self._inherited = Inherited()
        self._listeners = Listeners(self._plane, self._inherited)
        self._door = Door(self._plane, self._inbound.serve_plaintext, self._inherited)
        self._responder: Responder | None = None
        self._servers: list[admin.Pages] = []
        self._successors: socket.socket | None = None
        """Where the next one comes."""
        self._left = False
        """Whether one has taken over."""
        self._drain_timeout_s = settings.drain_timeout_s
        self._drain_by = math.inf
        self._timer: asyncio.TimerHandle | None = None
        self._configured = asyncio.Event()
        self._client_context: Context
        self._server_context: Context

    def _become_member(self, membership: Membership) -> None:
        # Imported here: what talks to a broker takes megabytes, and configuration from files needs none of it.
        from uproxy.demand import Demand
        from uproxy.member import Member

        self._member = Member(
            Kind.UPROXY,
            membership,
            self.settings.identity_dir,
            self._credentials,
            self._reconfigure,
            on_progress=self._progressed,
            in_force=self._beside.in_force,
        )
        self._member.replica.want_workload(membership.identity, membership.workload)
        if self.settings.dns:
            self._member.replica.want_namespaces()
        self._demand = Demand(self._plane, self._state, self._member.replica, self._member.interests_changed)

    # -- start

    async def start(self, group: asyncio.TaskGroup) -> None:
        """Return when it is ready, or when it was told to stop before. Raises StartError or ConfigError."""
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._stop)
        self._loop.add_signal_handler(signal.SIGHUP, self._hang_up)
        if self.settings.captured and not self.settings.probe_fds:
            raise StartError(
                f"--capture {self.settings.capture} needs --probe-fd, a socket made in the workload's cgroup: use "
                "`uproxy exec`"
            )
        self.pending.discard("certificate")
        self._beside.begin(group)
        group.create_task(self._credentials.watch(self._renewed))
        self._register_gauges()
        if self._exporter is not None:
            group.create_task(self._exporter.run())
        take_over = self.settings.take_over
        predecessor = await process.predecessor(self.settings.identity_dir, self._hello) if take_over else None
        if predecessor is not None:
            await self._take_over(predecessor, group)
        else:
            await self._begin(group)
            if self.stopping.is_set():
                return
            self._successors = handover.listen(self.settings.identity_dir)
            process.report_ready(self._who, self.settings.ready_fd, log)
        if self._direct_path is not None:
            group.create_task(self._direct_path.run())
        if self._successors is not None:
            group.create_task(handover.serve(self._successors, self.settings.identity_dir, self._hello, self))
        self._tick()

    async def _begin(self, group: asyncio.TaskGroup) -> None:
        await self._listen_to_operators()
        if self._member is not None and self._demand is not None:
            self._listen_to_the_application()  # its connections wait for the configuration
            self._restore(self._member, self._demand)
            group.create_task(self._member.run())
            await self._wait_for_configuration()
        else:
            await self._read_configuration(group)
            self._listen_to_the_application()
        if not self.stopping.is_set():
            await self._serve()

    async def _serve(self) -> None:
        """Let the mesh in."""
        self.pending.discard("config")
        await self._beside.started()
        for own in self._who.addresses:
            self._listen_on(own, HBONE_PORT, self._inbound.server.serve, HANDSHAKES_PER_TURN)
        self.pending.discard("listeners")
        self._open_to_plaintext()
        if self.settings.captured:
            await self._prove_capture()

    async def _read_configuration(self, group: asyncio.TaskGroup) -> None:
        source = FileSource(self.settings.config, self._who.identity.trust_domain)
        self._reconfigure(await self._loop.run_in_executor(None, source.load))
        if self._state.workload(self._who.key) is None:
            raise StartError(f"the configuration has no WorkloadEntry {self._who.key}: add one, or mend --workload")
        group.create_task(source.watch(self._reconfigure, self._refused, WATCH_S))

    def _restore(self, member: Member, demand: Demand) -> None:
        """From disk, if it was ever known: the control plane may be away."""
        member.restore()
        demand.take_over()

    async def _wait_for_configuration(self) -> None:
        """For as long as it takes."""
        while self._state.workload(self._who.key) is None and not self.stopping.is_set():
            self._configured.clear()
            await self._configured.wait()

    def _listen_to_the_application(self) -> None:
        if self.settings.captured:
            asked = original_destination if self.settings.capture == "ebpf" else redirected_destination
            for address in ("127.0.0.1", "::1"):
                self._listen_on(address, OUTBOUND_PORT, partial(self._outbound.serve_captured, asked))
        if self.settings.dns:
            self._answer_name_queries()
        directory = self._directory
        for forward in self.settings.forwards:
            self._listen_on(
                forward.local_host,
                forward.local_port,
                partial(explicit.serve_forward, self._outbound, directory, forward),
            )
        if self.settings.socks5 is not None:
            self._listen_on(
                *self.settings.socks5, lambda app: explicit.serve_socks(self._plane, self._outbound, directory, app)
            )

    def _record_spans(self, collector: Collector) -> Exporter:
        from uproxy.otlp import nearby, tunnelled

        dialled = collector.host, collector.port

        def serve(app: socket.socket) -> None:
            app.setblocking(False)
            self._plane.run(
                lambda: self._plane.spawn(
                    explicit.serve_named(self._outbound, self._directory, dialled, app, traced=False)
                )
            )

        def service() -> str:
            own = self._state.workload(self._who.key)
            name = own.canonical_service if own is not None else self._who.workload
            return f"{name}.{self._who.identity.namespace}"

        dial = nearby(*dialled) if collector.is_nearby else tunnelled(serve)
        return process.record_spans(collector, dial, self._telemetry, service)

    def _answer_name_queries(self) -> None:
        # Imported here: it takes megabytes, and most workloads ask their nameservers themselves.
        from uproxy.dns import Responder

        self._responder = Responder(self._plane, self._state, self._telemetry, self._demand, self._inherited)
        try:
            self._responder.listen()
        except OSError as error:
            raise StartError(f"cannot listen for name queries: {error.strerror}") from error

    async def _listen_to_operators(self) -> None:
        # Captured, the namespace and its ports are this workload's; else others may share the host, so metrics and
        # readiness are at its own address.
        if self.settings.captured:
            hosts = ["0.0.0.0", *(address for address in self._who.addresses if ":" in address)]
        else:
            hosts = [self._who.addresses[0]]
        self._servers = await process.listen_to_operators(
            hosts,
            self.settings.admin_port,
            admin.admin_routes(self._config_dump, self._stop, self._live, self._telemetry.taps),
            self._beside.render,
            # Whoever asked before it left is told of the workload, whose new uProxy is ready.
            lambda: [] if self._left else [*process.pending_of(self.pending, self._member), *self._beside.missing()],
            self._inherited,
        )

    def _listen_on(self, address: str, port: int, serve: Serve, at_once: int = ACCEPTS_PER_TURN) -> None:
        try:
            self._listeners.listen(address, port, serve, at_once)
        except OSError as error:
            if address == "::1" and error.errno == errno.EADDRNOTAVAIL:
                return  # no IPv6 here, so nothing can be captured to it either
            raise StartError(f"cannot listen on {address}:{port}: {error.strerror}") from error

    async def _prove_capture(self) -> None:
        """Dial ourselves through capture, with sockets made in the application's cgroup: programs, maps and getsockopt
        hook, or nftables' rules and conntrack, have to work for the connection to arrive. Not ready otherwise."""
        arrived: dict[tuple[str, int], asyncio.Event] = {}
        self._outbound.probed = lambda peer: arrived.setdefault(peer, asyncio.Event()).set()
        for fd in self.settings.probe_fds:
            with socket.socket(fileno=fd) as probe:
                probe.setblocking(False)
                address = PROBE_V6 if probe.family == socket.AF_INET6 else PROBE_V4
                try:
                    async with asyncio.timeout(PROBE_TIMEOUT_S):
                        await self._loop.sock_connect(probe, (address, PROBE_PORT))
                        await arrived.setdefault(probe.getsockname()[:2], asyncio.Event()).wait()
                except OSError as error:  # TimeoutError too
                    raise StartError(
                        f"a connection from the workload's cgroup to {address} was not captured: {error}: "
                        f"{_MEND_CAPTURE[self.settings.capture]}"
                    ) from error
        self._outbound.probed = None
        self.pending.discard("capture")

    # -- the hand-over (`uproxy.handover`): from the one that runs, and to the next one

    @property
    def _hello(self) -> Hello:
        return Hello(uproxy.__version__, self._who.key, self._who.addresses, self.settings.capture)

    async def _take_over(self, predecessor: Predecessor, group: asyncio.TaskGroup) -> None:
        """From one that goes on as before until this one is ready. Raises StartError."""
        if self._member is not None and self._demand is not None:
            self._restore(self._member, self._demand)
            if self._state.workload(self._who.key) is None:
                raise StartError("the uProxy that runs has left no configuration to begin with: see its log")
        else:
            await self._read_configuration(group)
        try:
            for sock in await predecessor.sockets():
                self._inherited.add(sock)
            self._listen_to_the_application()
            await self._serve()
            self._go_on_with(await predecessor.rest())
            await self._listen_to_operators()
            process.report_ready(self._who, self.settings.ready_fd, log)
            await predecessor.leave()
            # Not before: what others find it by stays the old one's, if that takes its place back.
            inherited = self._inherited.take(socket.SOCK_SEQPACKET, "", 0)
            self._successors = handover.listen(self.settings.identity_dir, inherited)
            self._inherited.close()
        except HandoverError as error:
            raise StartError(f"the uProxy that runs takes its place back: {error}") from None
        finally:
            predecessor.close()
        log.info("took over from version %s", predecessor.version)
        if self._member is not None:
            group.create_task(self._member.run())

    def _go_on_with(self, rest: Rest) -> None:
        try:
            if self._direct_path is not None:
                self._direct_path.go_on(rest.direct)
            begun = [(peer, Begun.read(said, app)) for said, peer, app in rest.connections]
        except ValueError as error:  # of another version; they are reset when this process ends
            raise StartError(str(error)) from None

        def begin() -> None:
            for peer, one in begun:
                self._plane.spawn(self._inbound.serve_plaintext(peer, one))

        self._plane.run(begin)

    async def prepare(self) -> None:
        if self._member is not None:
            await self._member.save()
        await self._beside.save()

    def pause(self) -> list[int]:
        assert self._successors is not None
        listeners = [self._listeners, *([self._door.listeners] if self._door.listeners is not None else [])]
        for one in listeners:
            one.pause()
        return [
            self._successors.fileno(),
            *(sock.fileno() for one in listeners for sock in one.sockets),
            *(sock.fileno() for sock in (self._responder.sockets if self._responder is not None else ())),
            *(sock.fileno() for server in self._servers for sock in server.sockets),
        ]

    def resume(self) -> None:
        self._listeners.resume()
        if self._door.listeners is not None:
            self._door.listeners.resume()

    def direct(self) -> list[Mapping[str, Any]]:
        return self._direct_path.describe() if self._direct_path is not None else []

    def connections(self) -> list[Movable]:
        return [Plain(live.relay, live.record) for live in self._connections if isinstance(live.relay, PlainRelay)]

    def leave(self) -> None:
        """Another process is this workload's proxy now: carry on what is here, and drain."""
        self._left = True
        self._drain_timeout_s = self.settings.upgrade_drain_timeout_s
        for server in self._servers:
            server.leave()
        if self._responder is not None:
            self._responder.leave()
        if self._member is not None:
            self._member.leave()
        if self._direct_path is not None:
            self._direct_path.leave()
        self._beside.leave()
        self._stop()

    async def upgrade(self) -> int:
        raise HandoverError("its launcher starts what takes over from a uProxy: `uproxy upgrade NAME`")

    # -- changes

    def _open_to_plaintext(self) -> None:
        """As the configuration says, while there is capture, which keeps everything else out, and we take anything."""
        if self.settings.captured and not self.pending & {"listeners", "draining"}:
            workload = self._state.workload(self._who.key)
            self._door.set(workload.plaintext if workload is not None else None)

    def _reconfigure(self, batch: Sequence[tuple[str, bytes]]) -> None:
        """Take configuration, whole or not at all. Raises RecordError."""
        changes = self._state.apply(batch)
        self._beside.take(batch)
        if changes:
            log.debug("configuration %d applied", self._state.generation)
            workload = self._state.workload(self._who.key)
            if workload is not None:  # one that went away lets what has begun end
                self._beside.follow(workload.sidecar)
            self._plane.run(lambda: self._config_changed(changes))
        self._configured.set()

    def _config_changed(self, changes: Changes) -> None:
        self._inbound.config_changed(changes)
        self._outbound.config_changed(changes)
        if self._direct_path is not None:
            self._direct_path.changed()
        self._open_to_plaintext()

    def _progressed(self) -> None:
        """The control plane has told more: what waits for it may go on."""
        if self._demand is not None:
            self._plane.run(self._demand.progress)

    def _refused(self, error: Exception) -> None:
        log.error("the new configuration is refused, the one before stays: %s", error)

    def _renewed(self) -> None:
        self._use_credentials()
        # Streams that are open stay on their tunnels; new ones use the new certificate.
        self._plane.run(self._pool.retire)
        self._plane.run(self._pool.end_revoked)
        self._plane.run(self._inbound.server.end_revoked)
        if self._direct_path is not None:
            self._direct_path.renewed(self._credentials.value.revocations)
        if self._member is not None:
            self._member.renewed()
        self._beside.renewed()

    def _use_credentials(self) -> None:
        credentials = self._credentials.value
        self._client_context, self._server_context = client_context(credentials), server_context(credentials)

    def _stop(self) -> None:
        if self.stopping.is_set():  # asked again, or after a hand-over
            self._drain_by = min(self._drain_by, time.monotonic() + self.settings.drain_timeout_s)
        self.stopping.set()
        self._configured.set()

    def _in_force_changed(self) -> None:
        """What the process beside this workload has applied, or whether it is there."""
        if self._member is not None:
            self._member.in_force_changed()

    def _hang_up(self) -> None:
        self._beside.reopen_log()
        if self._log is not None:
            self._log.reopen()

    def _tick(self) -> None:
        now = time.monotonic()

        def tick() -> None:
            self._pool.tick(now)
            self._inbound.server.tick(now)
            self._connections.tick(now)
            if self._demand is not None:
                self._demand.tick(now)

        self._timer = self._loop.call_later(TICK_S, self._tick)
        self._plane.run(tick)
        self._open_to_plaintext()

    def _register_gauges(self) -> None:
        gauge = self._telemetry.gauge
        gauge("uproxy_tunnels_outbound", "Open tunnels to peers", lambda: len(self._pool.tunnels()))
        gauge("uproxy_tunnels_inbound", "Open tunnels from peers", lambda: len(self._inbound.server.tunnels()))
        gauge("uproxy_tasks", "Connections being set up or relayed", lambda: len(self._plane.tasks))
        process.register_gauges(self._telemetry, self._credentials, self._state)
        direct_path = self._direct_path
        if direct_path is not None:
            self._telemetry.counter(
                "uproxy_direct_lost_total",
                "Connections on the direct path that are in no metric and no log, because this process was busy",
                lambda: direct_path.lost,
            )
        if self._member is not None and self._demand is not None:
            self._register_member_gauges(self._member, self._demand)

    def _register_member_gauges(self, member: Member, demand: Demand) -> None:
        process.register_member_gauges(self._telemetry, member, lambda: member.replica.whole)
        self._telemetry.gauge(
            "uproxy_demanded_services", "Services subscribed to because they were dialled", lambda: demand.services
        )
        self._telemetry.counter(
            "uproxy_demand_timeouts_total",
            "Connections refused because their configuration did not come in time",
            lambda: demand.timeouts,
        )

    def _config_dump(self) -> object:
        return {
            "version": uproxy.__version__,
            "workload": self._who.key,
            "identity": str(self._who.identity),
            "addresses": self._who.addresses,
            "pending": sorted(self.pending),
            "logging": log_levels.levels(),
            **config_dump.of_state(self._state),
            "policies": config_dump.of_policies(self._state, self._state.workload(self._who.key)),
            "control": self._member.dump() if self._member is not None else None,
            "plaintext": None if self._door.is_open is None else asdict(self._door.is_open),
            "certificate": config_dump.of_certificate(self._credentials),
            "tunnels": config_dump.of_tunnels(self._pool.tunnels()),
            "tunnels_inbound": config_dump.of_tunnels(self._inbound.server.tunnels()),
            "connections": len(self._connections),
            "beside": self._beside.dump(),
        }

    def _live(self) -> bytes | asyncio.Future[bytes]:
        here, beside = self._telemetry.live(time.monotonic(), time.time()), self._beside.live()
        if beside is None:
            return process.listed(self._who, here)
        answer: asyncio.Future[bytes] = self._loop.create_future()

        def listed(done: asyncio.Future[Listing]) -> None:
            there = done.result()
            both = Listing(here.total + there.total, here.lines + there.lines)
            answer.set_result(process.listed(self._who, both))

        beside.add_done_callback(listed)
        return answer

    # -- the end

    async def drain(self) -> None:
        """Accept nothing more, tell peers, and let the connections that are open end by themselves, for a while."""
        log.info("draining %d connections for up to %g s", len(self._connections), self._drain_timeout_s)
        self.pending.add("draining")
        self._drain_by = time.monotonic() + self._drain_timeout_s
        self._listeners.close()
        self._door.close()
        self._plane.run(lambda: self._inbound.server.drain(final=False))
        # A round trip for the streams that are on their way (RFC 9113 section 6.8), then the final word.
        await asyncio.sleep(min(0.1, self._drain_timeout_s))
        self._plane.run(lambda: self._inbound.server.drain(final=True))
        await self._beside.drain(self._drain_timeout_s, min(GRACE_S, self._drain_timeout_s / 2))
        pause_s = 0.02
        while self._plane.tasks and time.monotonic() < self._drain_by:
            await asyncio.sleep(pause_s)
            pause_s = min(1.1 * pause_s, 0.5)
        left = len(self._connections)
        self._plane.run(lambda: self._connections.cut_all("the drain time of this proxy is over"))
        if self._exporter is not None:
            await self._exporter.finish(FAREWELL_S)
        # Those that were not relayed yet: an application whose connection was being made gets a reset.
        self._plane.run(lambda: self._plane.abort(RefusedError("shutting-down", "this proxy is shutting down")))
        self._plane.run(self._pool.finish)
        self._plane.run(self._inbound.server.finish)
        deadline = max(self._drain_by, time.monotonic() + FAREWELL_S)
        while (self._pool.tunnels() or self._inbound.server.tunnels()) and time.monotonic() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        self._plane.run(self._pool.close)
        self._plane.run(self._inbound.server.close)
        await asyncio.gather(*(server.answered() for server in self._servers))
        log.info("drained; %d connections were cut", left)

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        for server in self._servers:
            server.close()
        self._listeners.close()
        self._door.close()
        self._beside.close()
        if self._successors is not None:
            self._successors.close()
            if not self._left:
                handover.remove(self.settings.identity_dir)
        if self._responder is not None:
            self._responder.close()
        if self._log is not None:
            self._log.close()
        self._plane.close()
