"""One inbound connection's life, top to bottom: from a peer's tunnel to the application.

accept -> TLS -> who is the peer? (`listener.TunnelServer`) -> for each CONNECT stream: what does it ask for? -> may it?
-> connect to the application -> 200 -> relay both ways -> one access-log record. Statuses: docs/hbone.md 2.4.

What comes in plaintext, where that is taken: accept -> where was it going? -> may nobody come there? -> and likewise.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from control.api.address import FORBIDDEN_PORTS, HBONE_PORT, AddressError, IpAddress, parse_address
from control.api.identity import SpiffeId
from control.api.workload import Workload, key_of_host
from control.client.state import Changes, State
from uproxy import application, listener, plane, proxy_protocol
from uproxy.admission import Admission, Passage
from uproxy.connections import Connections
from uproxy.errors import Flag, RefusedError
from uproxy.header_block import Headers
from uproxy.listener import TunnelServer, asked_for, bad_request
from uproxy.outbound import Self, fail, relay_and_record
from uproxy.overtaken import STEP_S, Direct, Overtaken
from uproxy.plain_relay import PlainRelay, Progress
from uproxy.plane import Plane
from uproxy.rehearsal import Rehearsals
from uproxy.relay import Relay
from uproxy.resolve import host_port
from uproxy.telemetry import Connection, Peer, Telemetry
from uproxy.tls import Context
from uproxy.tunnel import Tunnel

if TYPE_CHECKING:
    from uproxy.beside import Beside
    from uproxy.demand import Demand
    from uproxy.direct import DirectPath

MAX_REMEMBERED_HOSTS = 1024
# What has begun may end when the configuration lets go of this workload: some callers learn of that later than we do.
LEAVING_S = 30.0
# Connections in plaintext, which cost their peers nothing; as many as there may be tunnels.
MAX_PLAINTEXT = 4096
# A peer in plaintext that is silent for half of it is asked four times, with TCP's keepalive, whether it is there; one
# that acknowledges nothing of what is sent to it has as long, which would be a quarter of an hour by itself.
PLAINTEXT_GONE_S = 120
_KEEPALIVE = (
    (socket.TCP_USER_TIMEOUT, PLAINTEXT_GONE_S * 1000),
    (socket.TCP_KEEPIDLE, PLAINTEXT_GONE_S // 2),
    (socket.TCP_KEEPINTVL, PLAINTEXT_GONE_S // 8),
    (socket.TCP_KEEPCNT, 4),
)

_FORWARDED_HOST = re.compile(rb"(?:^|;)host=([a-z0-9.-]{1,253})(?:;|$)")

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Begun:
    """A connection in plaintext that another process carried so far."""

    app: socket.socket
    request_id: str
    started: float
    """Monotonic seconds, which are the same for all processes."""
    progress: Progress

    @classmethod
    def read(cls, said: Mapping[str, Any], app: socket.socket) -> Begun:
        """What `Plain.describe` has said, with the application's socket. Raises ValueError."""
        try:
            return cls(app, said["request_id"], said["started"], Progress(**said["progress"]))
        except (KeyError, TypeError) as error:
            raise ValueError(f"what is said of a connection in plaintext cannot be read: {error}") from None


@dataclass(frozen=True, slots=True)
class Plain:
    """A connection in plaintext that another process may carry on: `handover.Movable`."""

    relay: PlainRelay
    record: Connection

    def describe(self) -> tuple[Mapping[str, Any], Sequence[int]] | None:
        if self.relay.sockets is None:
            return None
        progress = asdict(self.relay.progress)
        said = {"request_id": self.record.request_id, "started": self.record.started, "progress": progress}
        return said, [one.fileno() for one in self.relay.sockets]

    def let_go(self) -> None:
        self.relay.let_go()


class Inbound:
    """Connections from the mesh to this workload."""

    def __init__(
        self,
        data_plane: Plane,
        state: State,
        context: Callable[[], Context],
        connections: Connections,
        telemetry: Telemetry,
        own: Self,
        demand: Demand | None = None,
        direct_path: DirectPath | None = None,
        beside: Beside | None = None,
    ) -> None:
        """`demand`: where what is not known is asked for; None when there is nobody to ask. `direct_path`: likewise,
        who is told of callers that may come without a tunnel. `beside`: what streams are handed to where a waypoint
        stands beside this workload.
        """
        self.server = TunnelServer(data_plane, context, own.trust_domain, self._on_request, self._on_tunnel_refused)
        self._plane = data_plane
        self._state = state
        self._demand = demand
        self._beside = beside
        self._connections = connections
        self._telemetry = telemetry
        self._own = own
        self._hbone = host_port(own.addresses[0], HBONE_PORT)
        self._workload: Workload | None = None  # as it was last configured: what has begun is judged by it
        self._leaving = False  # the configuration has let go of it, and what has begun may still end
        self._admission = Admission(None, (), state.trust_domain)
        self._rehearsals = Rehearsals(telemetry)
        self._services_here: dict[str, str | None] = {}
        self._overtaken = Overtaken()
        self._ending = False  # some of them are being ended
        self._direct_path = direct_path
        if direct_path is not None:
            direct_path.may_enter = self._may_enter
        self._in_plaintext = 0

    # -- the connection

    def _on_tunnel_refused(self, source: str, started: float, error: RefusedError) -> None:
        fail(self._record(source, os.urandom(16).hex(), started), error, self._telemetry)

    def _on_request(self, carrier: Tunnel, relay: Relay, headers: Headers, ended: bool) -> None:
        if ended:
            relay.on_end()
        self._plane.spawn(self._serve_connect(carrier, relay, headers))

    async def _serve_connect(self, carrier: Tunnel, relay: Relay, headers: Headers) -> None:
        """One CONNECT stream, to its end. Never raises."""
        fields = dict(headers)
        request_id, caller_span = listener.traced(fields)
        record = self._record(carrier.peer_end, request_id, time.monotonic(), carrier.peer_id)
        if caller_span:
            self._telemetry.follow(record, caller_span)
        try:
            if self._demand is not None:
                await self._introduce(self._demand, carrier, fields)
            record.source.workload = self._workload_of(carrier)
            address, port = await self._target(fields, record)
            admission = self._admission
            passage = self._admit(carrier, headers, address, port, record)
            beside = None
            if passage is None and admission.has_sidecar:
                beside = await self._beside_at(carrier, port)
            if beside is not None:
                app, listens_at = beside.connect(self._told(carrier, fields, record, address, port)), ""
            else:
                app, listens_at = await application.dial(self._plane, address, port)
            if admission is not self._admission:  # it changed while we waited for the application
                try:
                    self._configured()
                    passage = self._admit(carrier, headers, address, port, record)
                    if beside is None and passage is None and all(self._admission.goes_beside(carrier.peer, port)):
                        raise RefusedError("waypoint-required", f"port {port} is behind a waypoint now", status=401)
                except RefusedError:
                    plane.reset(app)
                    raise
            told = beside is None and self._tell(app, *_caller_of(carrier, passage), address, port)
        except RefusedError as error:
            listener.refuse(carrier, relay, error, request_id)
            fail(record, error, self._telemetry)
            return
        carrier.respond(relay, ((b":status", b"200"),))
        if self._direct_path is not None and passage is None and not told and listens_at == address:
            self._direct_path.let_in(carrier, address, port)

        def permitted() -> str:
            again = self._admission.decide(carrier.peer, carrier.peer_address, passage, address, port)
            return "" if again.allowed else f"policy: no longer allowed: {again.reason}"

        direct = Direct(relay, carrier.peer, port)
        if passage is None and beside is None:
            self._overtaken.add(direct)
        try:
            await relay_and_record(app, relay, record, self._connections, self._telemetry, permitted)
        finally:
            self._overtaken.remove(direct)

    async def serve_plaintext(self, peer: socket.socket, begun: Begun | None = None) -> None:
        """A connection that the kernel gave us instead of the application: nobody proved who that is. Never raises.

        `begun`: as far as another process has come with it.
        """
        plane.reset_on_close(peer)
        if begun is None:
            record = self._record("-", os.urandom(16).hex(), time.monotonic())
        else:
            record = self._record("-", begun.request_id, begun.started)
        self._in_plaintext += 1
        try:
            await self._serve_plaintext(peer, record, begun)
        except RefusedError as error:
            plane.reset(peer)
            if begun is not None:
                plane.reset(begun.app)
            fail(record, error, self._telemetry)
        finally:
            self._in_plaintext -= 1

    async def _serve_plaintext(self, peer: socket.socket, record: Connection, begun: Begun | None) -> None:
        """Raises RefusedError when it is not let in."""
        end, address, port = self._plaintext_ends(peer, record)
        source = end[0]
        self._admit_plaintext(source, address, port, record)
        app = begun.app if begun is not None else await self._connect_plaintext(end, address, port, record)

        def permitted() -> str:
            again = self._admission.decide_plaintext(source, address, port)
            if not again.allowed:
                return f"policy: no longer allowed: {again.reason}"
            return self._admission.overtaken(None, port)

        relay = PlainRelay(self._plane, peer, begun.progress if begun is not None else None)
        await relay_and_record(app, relay, record, self._connections, self._telemetry, permitted)

    # -- its stages

    async def _connect_plaintext(
        self, end: proxy_protocol.End, address: IpAddress, port: int, record: Connection
    ) -> socket.socket:
        """The application, for a caller that was let in. Raises RefusedError."""
        admission = self._admission
        app, _ = await application.dial(self._plane, address, port)
        if admission is not self._admission:  # it changed while we waited for the application
            try:
                self._admit_plaintext(end[0], address, port, record)
            except RefusedError:
                plane.reset(app)
                raise
        self._tell(app, end, None, address, port)
        return app

    def _plaintext_ends(self, peer: socket.socket, record: Connection) -> tuple[proxy_protocol.End, IpAddress, int]:
        """Who says it is where, and the workload's address and port that it dialled: ours, by what sk_lookup did."""
        try:
            source, address = peer.getpeername(), peer.getsockname()
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in _KEEPALIVE:
                peer.setsockopt(socket.IPPROTO_TCP, option, value)
        except OSError as error:  # it is gone already
            raise RefusedError("bad-request", f"the peer went away: {error.strerror}", flag=Flag.RESET) from error
        record.source.address = host_port(*source[:2])
        record.destination = Peer(host_port(*address[:2]), self._state.workload(self._own.key))
        if self._in_plaintext > MAX_PLAINTEXT:
            raise RefusedError("overload", f"{MAX_PLAINTEXT} connections in plaintext are open", flag=Flag.DENY)
        if address[0] not in self._own.addresses:
            raise RefusedError("wrong-destination", f"{address[0]} is no address of {self._own.key}", flag=Flag.DENY)
        return (IpAddress(source[0].partition("%")[0]), source[1]), IpAddress(address[0]), address[1]

    def _admit_plaintext(self, source: IpAddress, address: IpAddress, port: int, record: Connection) -> None:
        """Raises RefusedError when the port takes no plaintext, or a waypoint stands before it, or policy says no."""
        self._configured()
        self._admission.enter(None, port, ())
        decision = self._admission.decide_plaintext(source, address, port)
        if (rehearsal := self._admission.rehearsal) is not None:
            would = rehearsal.decide_plaintext(source, address, port)
            record.dry_run = self._rehearsals.note(decision, would)
        record.audit = decision.audit
        if not decision.allowed:
            raise RefusedError("policy", decision.reason, status=401, flag=Flag.DENY, policy=decision.policy)

    async def _introduce(self, demand: Demand, carrier: Tunnel, fields: dict[bytes, bytes]) -> None:
        """The first time that we hear of a caller, or of a service of ours, give the control plane a moment to name it.

        Telemetry only. Raises RefusedError when this proxy shuts down.
        """
        said = _FORWARDED_HOST.search(fields.get(b"forwarded", b""))
        host = said[1].decode() if said is not None else ""
        service = "" if host in self._services_here else self._unknown_service(host)
        stranger = self._state.workload_at(carrier.peer_address) is None
        if stranger or service:
            await demand.introduce(carrier.peer_address if stranger else None, service)

    async def _target(self, fields: dict[bytes, bytes], record: Connection) -> tuple[IpAddress, int]:
        """The workload's address and port that a CONNECT asks for. Raises RefusedError with the status to answer."""
        asked = asked_for(fields)
        record.hbone_address = asked.authority
        record.destination.workload = self._configured()
        address, port = IpAddress(asked.host), asked.port
        if address not in self._own.addresses:  # in almost every request it is, and written as we write it
            address, port = await self._other_target(asked.host, port, record)
        if port in FORBIDDEN_PORTS:
            raise RefusedError("port-forbidden", f"port {port} belongs to the proxy", flag=Flag.DENY)
        self._note_service(fields, record)
        return address, port

    def _configured(self) -> Workload:
        """This workload's record. Raises RefusedError when there is none: the caller then tries another endpoint."""
        workload = self._state.workload(self._own.key)
        if not self._state.whole or workload is None:
            raise RefusedError(
                "no-config", f"the mesh's configuration has no workload {self._own.key}", flag=Flag.NO_CONFIG
            )
        return workload

    async def _other_target(self, host: str, port: int, record: Connection) -> tuple[IpAddress, int]:
        """An address in another spelling, or the name of a service of which this workload is an endpoint."""
        try:
            address = parse_address(host)
        except AddressError:
            unknown = self._unknown_service(host)
            if self._demand is not None and unknown:
                await self._demand.served(unknown)
            service = self._service_here(host)
            if service is not None:
                for endpoint in self._state.endpoints(service):
                    if endpoint.workload == self._own.key and port in endpoint.ports:
                        record.destination_service = service
                        return self._own.addresses[0], endpoint.ports[port]
            raise bad_request(f"{host}:{port} is no service port of {self._own.key}") from None
        if address not in self._own.addresses:
            raise RefusedError(
                "wrong-destination", f"{address} is no address of {self._own.key}", status=400, flag=Flag.DENY
            )
        return address, port

    def _note_service(self, fields: dict[bytes, bytes], record: Connection) -> None:
        """Telemetry only: the service that the caller says it dialled, if this workload is one of its endpoints."""
        said = _FORWARDED_HOST.search(fields.get(b"forwarded", b""))
        if said is not None and not record.destination_service:
            record.destination_service = self._service_here(said[1].decode()) or ""

    def _unknown_service(self, host: str) -> str:
        """Key of the named service, if it is not known and this workload may be one of its endpoints; else empty."""
        service_key = key_of_host(host) or ""
        ours = service_key.startswith(f"{self._own.namespace}/")  # a service selects workloads of its own namespace
        return service_key if ours and self._state.service(service_key) is None else ""

    def _service_here(self, host: str) -> str | None:
        """Key of the named service, if this workload is one of its endpoints. Looked up once per configuration."""
        if host not in self._services_here:
            service = self._state.service_named(host)
            endpoints = self._state.endpoints(service.key) if service is not None else ()
            mine = service is not None and any(e.workload == self._own.key for e in endpoints)
            if len(self._services_here) >= MAX_REMEMBERED_HOSTS:
                self._services_here.clear()
            self._services_here[host] = service.key if mine and service is not None else None
        return self._services_here[host]

    def _admit(
        self, carrier: Tunnel, headers: Headers, address: IpAddress, port: int, record: Connection
    ) -> Passage | None:
        """Whether it comes from a waypoint. Raises RefusedError when it had to, or when no policy allows it."""
        passage = self._admission.enter(carrier.peer, port, headers, carrier.peer_address)
        if passage is not None and passage.caller is not None:
            record.caller = str(passage.caller.identity)
        decision = self._admission.decide(carrier.peer, carrier.peer_address, passage, address, port)
        if (rehearsal := self._admission.rehearsal) is not None:
            would = rehearsal.decide(carrier.peer, carrier.peer_address, passage, address, port)
            record.dry_run = self._rehearsals.note(decision, would)
        record.audit = decision.audit
        if not decision.allowed:
            raise RefusedError("policy", decision.reason, status=401, flag=Flag.DENY, policy=decision.policy)
        return passage

    def _may_enter(self, peer: SpiffeId, peer_address: IpAddress, address: IpAddress, port: int) -> bool:
        """Whether a caller may come to a port for itself and without this process, as if it asked now."""
        if self._wants_telling(port):  # what comes without it brings no header, or one that its caller made up
            return False
        try:
            passage = self._admission.enter(peer, port, (), peer_address)
        except RefusedError:
            return False
        if passage is not None or self._admission.goes_beside(peer, port)[0]:
            return False
        return self._admission.decide(peer, peer_address, None, address, port).allowed

    def _tell(
        self, app: socket.socket, source: proxy_protocol.End, caller: SpiffeId | None, address: IpAddress, port: int
    ) -> bool:
        """Tell the application who calls, where it asks for that. Whether it does. Raises RefusedError."""
        if not self._wants_telling(port):
            return False
        application.tell(app, source, caller, (address, port))
        return True

    async def _beside_at(self, carrier: Tunnel, port: int) -> Beside | None:
        """The process that a stream is handed to; None: to the application itself. Raises RefusedError when there has
        to be one, and is none.
        """
        goes, only = self._admission.goes_beside(carrier.peer, port)
        if not goes or self._beside is None:
            if only:
                raise RefusedError("waypoint-unavailable", "nothing here starts the waypoint's process", status=503)
            return None
        return self._beside if await self._beside.ready(wait=only) else None

    def _told(
        self, carrier: Tunnel, fields: dict[bytes, bytes], record: Connection, address: IpAddress, port: int
    ) -> bytes:
        """What the process beside this workload is told of a stream. Which service was dialled the caller says, and
        the process looks whether that can be.
        """
        said = _FORWARDED_HOST.search(fields.get(b"forwarded", b""))
        host = record.destination_hostname.encode() if record.destination_service else said[1] if said else b""
        return proxy_protocol.header(
            (carrier.peer_address, carrier.peer_port),
            (address, port),
            carrier.peer,
            authority=host,
            unique_id=record.request_id.encode(),
        )

    def _wants_telling(self, port: int) -> bool:
        return self._workload is not None and port in self._workload.proxy_protocol

    # -- what changes meanwhile

    def config_changed(self, changes: Changes) -> None:
        """Compile what decides who may come anew, and cut the connections that policy no longer allows.

        Those that came directly before a waypoint was required stay until they end, or are ended later (`overtaken`).
        """
        self._services_here.clear()
        if not changes.policies and not changes.workloads:
            return
        known = self._state.workload(self._own.key)
        if known is not None:
            self._workload, self._leaving = known, False
        elif self._workload is not None and not self._leaving:
            self._leaving, last = True, self._workload
            self._plane.call_later(LEAVING_S, lambda: self._left(last))
        self._judge_again()

    def _left(self, last: Workload) -> None:
        """The time of what has begun is over, unless the workload is back."""
        if self._leaving and self._workload is last:
            self._workload, self._leaving = None, False
            self._judge_again()

    def _judge_again(self) -> None:
        workload = self._workload
        policies = self._state.policies_for(workload) if workload is not None else ()
        self._admission = Admission(workload, policies, self._state.trust_domain)
        self._connections.reauthorise()
        overdue = self._overtaken.judge(self._admission, time.monotonic())
        if overdue and not self._ending:
            log.info("%d connections were made directly before a policy needed the waypoint, and are ended", overdue)
            self._ending = True
            self._plane.call_later(STEP_S, self._end_overtaken)

    def _end_overtaken(self) -> None:
        self._ending = False
        if self._overtaken.step(time.monotonic()):
            self._ending = True
            self._plane.call_later(STEP_S, self._end_overtaken)

    # -- records

    def _record(self, source: str, request_id: str, started: float, identity: str = "") -> Connection:
        own = self._state.workload(self._own.key)
        return Connection(
            direction="inbound",
            source=Peer(source, None, identity),
            destination=Peer(self._hbone, own, self._own.identity),
            request_id=request_id,
            started=started,
        )

    def _workload_of(self, carrier: Tunnel) -> Workload | None:
        """The caller's workload, for telemetry: only if address and proven identity agree."""
        workload = self._state.workload_at(carrier.peer_address)
        return workload if workload is not None and workload.identity == carrier.peer else None


def _caller_of(carrier: Tunnel, passage: Passage | None) -> tuple[proxy_protocol.End, SpiffeId | None]:
    """From where a stream comes, and who calls: through a waypoint, by what that says."""
    if passage is None:
        return (carrier.peer_address, carrier.peer_port), carrier.peer
    if passage.caller is None:
        return (carrier.peer_address, carrier.peer_port), None
    return (passage.caller.address, passage.caller.port), passage.caller.identity
