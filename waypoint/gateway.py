"""One stream's life at a waypoint, top to bottom: from a caller's uProxy to the backend's.

CONNECT -> what is asked for? -> of HTTP, for each request: head -> authorise -> route -> pick -> forward -> relay both
bodies -> record. Of opaque TCP: authorise -> pick -> CONNECT -> relay -> record. All of it runs in the data plane's
turns.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

from control.api.address import HBONE_PORT, IpAddress
from control.api.route import Backend, RouteRule
from control.api.workload import Workload
from control.client.state import Changes, State
from uproxy import trace
from uproxy.connections import Connections, Live
from uproxy.errors import Flag, RefusedError
from uproxy.header_block import Headers
from uproxy.listener import Asked, asked_for, refuse, traced
from uproxy.plane import Plane, Timer, Waiter
from uproxy.relay import CLEAN, Relay
from uproxy.resolve import Hop, host_port
from uproxy.telemetry import Connection, Peer
from uproxy.tunnel import Tunnel
from waypoint import telemetry as flags
from waypoint.byte_stream import ByteStream
from waypoint.client import DISCARD_TIMEOUT_S, STALL_TIMEOUT_S, Client
from waypoint.destination import Destination, Destinations
from waypoint.http1_messages import Body, Fields, MessageError, RequestHead, ResponseEvent, ResponseHead, length
from waypoint.http1_writer import RequestWriter, ResponseWriter
from waypoint.request import Request, RequestError, read_request
from waypoint.routing import choose_backend, modified
from waypoint.rules import RuleBook, Rules
from waypoint.splice import Splice
from waypoint.telemetry import Exchange, WaypointTelemetry
from waypoint.upstream import Caller, HttpConnection, Upstream

# RFC 9110 section 9.2.2: the same request twice does what it does once.
_IDEMPOTENT: Final = frozenset({"GET", "HEAD", "OPTIONS", "TRACE", "PUT", "DELETE"})
_CALLERS: Final = frozenset({b"x-forwarded-for", b"x-forwarded-client-cert", b"x-request-id"})
_OURS: Final = b"x-uproxy-"
_REQUEST_ID: Final = re.compile(rb"[A-Za-z0-9._-]{1,64}")
_TRACE: Final = re.compile(r"(?!0{32})[0-9a-f]{32}")
_OK: Final[Headers] = ((b":status", b"200"),)
_REASONS: Final = {
    400: b"Bad Request",
    403: b"Forbidden",
    404: b"Not Found",
    408: b"Request Timeout",
    414: b"URI Too Long",
    417: b"Expectation Failed",
    431: b"Request Header Fields Too Large",
    500: b"Internal Server Error",
    501: b"Not Implemented",
    502: b"Bad Gateway",
    503: b"Service Unavailable",
    504: b"Gateway Timeout",
    505: b"HTTP Version Not Supported",
}
GRACE_S: Final = 1.0
"""Within a drain: how long a connection may wait for a request, which may be on its way."""
_NOBODYS_REQUEST: Final = RequestHead("GET", "/", (), keep_alive=False)
"""What is answered when the request could not be read."""

log = logging.getLogger(__name__)


class RefusalError(Exception):
    """A request that this waypoint answers by itself.

    `reason` is for programs, `detail` for people; `flag` is Envoy's response flag; `policy` names the rule; `close`:
    whoever asks again must connect anew for it.
    """

    def __init__(
        self,
        status: int,
        reason: str,
        detail: str,
        *,
        flag: str = flags.NO_FLAG,
        policy: str = "",
        close: bool = False,
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.reason = reason
        self.detail = detail
        self.flag = flag
        self.policy = policy
        self.close = close


@dataclass(slots=True, eq=False)
class _Course:
    """How far a request has come, so that a deadline or its caller's going away can end it wherever it waits."""

    claim: Waiter[HttpConnection] | Waiter[None] | None = None
    """What it waits for before it has a connection."""
    connection: HttpConnection | None = None
    writer: RequestWriter | None = None
    """Of the request on that connection."""
    cause: RefusalError | None = None
    """Why it was stopped."""
    answering: bool = False
    """Whether bytes of the final response may have gone to the caller."""
    uploaded: Waiter[None] | None = None
    """Settled when the request's body was read to its end, or is read no more. None: there is no body."""
    over: bool = False
    """Whether nobody wants the rest of the request's body."""
    timer: Timer | None = None

    def stop(self, cause: RefusalError) -> None:
        if self.cause is None:
            self.cause = cause
        if self.connection is not None:
            self.connection.stream.abort(cause.detail)
        elif self.claim is not None:
            self.claim.fail(ConnectionResetError(cause.detail))


class Directory(Protocol):
    """Where is asked for what the state does not have (`uproxy.demand.Demand`, or somebody who passes it on to one)."""

    async def destination(self, address: IpAddress) -> None:
        """Return when everything about an address is known, also that nobody lives there. Raises RefusedError."""

    async def followed(self, service_key: str) -> None:
        """Return when a service to which a route leads is known, also that there is none. Raises RefusedError."""

    async def introduce(self, caller: IpAddress, service_key: str) -> None:
        """Ask who calls; telemetry only."""


class Gateway:
    """Serves the streams of one waypoint process."""

    def __init__(
        self,
        data_plane: Plane,
        state: State,
        gateway: str,
        upstream: Upstream,
        connections: Connections,
        telemetry: WaypointTelemetry,
        directory: Directory | None = None,
    ) -> None:
        """`gateway`: key of the Gateway. `directory`: where what is not known is asked for, if anywhere."""
        self._draining = False
        self._grace_s = GRACE_S
        self._plane = data_plane
        self._state = state
        self._gateway = gateway
        self._upstream = upstream
        self._connections = connections
        self._telemetry = telemetry
        self._directory = directory
        self._destinations = Destinations(state, gateway, upstream.health)
        self._random = random.Random()
        self._rules = RuleBook(state, gateway)
        self._idle: dict[Client, Asked] = {}

    def on_request(self, carrier: Tunnel, relay: Relay, headers: Headers, ended: bool) -> None:
        """A CONNECT came, on a tunnel from a caller."""
        if ended:
            relay.on_end()
        self._plane.spawn(self._serve(carrier, relay, headers))

    async def _serve(self, carrier: Tunnel, relay: Relay, headers: Headers) -> None:
        """One CONNECT stream, to its end. Never raises."""
        fields = dict(headers)
        caller = Caller(carrier.peer, carrier.peer_address, carrier.peer_port)
        request_id, caller_span = traced(fields)
        record = self._record(caller, request_id)
        try:
            asked = asked_for(fields)
            record.hbone_address = asked.authority
            await self._learn(asked, caller)
            destination = self._destinations.find(asked)
            record.destination_service = destination.service_key
            if not destination.http:
                if caller_span:
                    self._telemetry.follow(record, caller_span)
                await self._serve_tcp(carrier, relay, caller, asked, destination, record)
                return
        except RefusedError as error:
            refuse(carrier, relay, error, record.request_id)
            record.flag, record.error, record.policy = error.flag, str(error), error.policy
            self._telemetry.closed(record, time.monotonic())
            return
        carrier.respond(relay, _OK)
        with contextlib.suppress(ConnectionResetError):
            await self._serve_http(ByteStream(relay), caller, asked)

    async def _learn(self, asked: Asked, caller: Caller) -> None:
        """Ask who lives at an address that was dialled by itself, and, for telemetry and without waiting, who calls.

        Raises RefusedError when no answer comes.
        """
        if self._directory is None:
            return
        if self._state.workload_at(caller.address) is None:
            self._plane.spawn(_introduced(self._directory, caller.address))
        unknown = self._destinations.unknown(asked)
        if unknown is not None:
            await self._directory.destination(unknown)

    # -- HTTP

    async def _serve_http(self, stream: ByteStream, caller: Caller, asked: Asked) -> None:
        """One caller's HTTP/1.1 connection. Never raises."""
        client = Client(stream, asked.authority.encode())
        try:
            while await self._exchange(client, caller, asked):
                pass
            stream.close()
        except (OSError, RefusedError) as error:  # RefusedError: this proxy shuts down
            stream.abort(str(error))
        except Exception:
            stream.abort("a bug of this proxy; its log has the traceback")
            raise

    async def _exchange(self, client: Client, caller: Caller, asked: Asked) -> bool:
        """One request and its response. Whether another may follow. Raises OSError when the stream is of no use."""
        if self._draining:
            self._close_later(client)
        self._idle[client] = asked
        try:
            head = await client.head()
        except TimeoutError:
            return False
        except MessageError as error:
            exchange = self._begin(caller, None)
            refusal = RefusalError(error.status, "bad-request", str(error), flag=flags.MALFORMED)
            try:
                await self._refuse(client, _NOBODYS_REQUEST, exchange, refusal)
            finally:
                self._telemetry.answered(exchange, time.monotonic())
            return False
        finally:
            del self._idle[client]
        if head is None:
            return False
        exchange, course = self._begin(caller, head), _Course()
        client.stream.on_gone = lambda: course.stop(_caller_gone())
        try:
            destination, rules = self._rules_for(asked)
            exchange.destination_service = destination.service_key
            request = _judged(head)
            exchange.path, exchange.authority = request.target, request.host
            self._authorise(rules, caller, destination, request)
            rule = self._route(rules, destination, request)
            while True:
                generation = self._state.generation
                self._limit(rule, course, exchange)
                backend, hops = await self._pick(rule, destination, course, exchange)
                if self._state.generation == generation:
                    break
                # It has waited: what holds now counts.
                destination, rules = self._rules_for(asked)
                self._authorise(rules, caller, destination, request)
                before, rule = rule, self._route(rules, destination, request)
                if rule == before:
                    break
            onward = _onward(head, request, rule, backend, caller, exchange)
            response = await self._forward(client, onward, caller, hops, course, exchange)
            return await self._relay(client, head, rule, backend, destination, response, course, exchange)
        except RefusalError as refusal:
            if course.answering or refusal.flag == flags.CALLER_GONE:
                # What the caller has of the response is not whole, and must not look so.
                _note(exchange, refusal)
                client.stream.abort(refusal.detail)
                raise ConnectionResetError(refusal.detail) from None
            return await self._refuse(client, head, exchange, refusal, course)
        except RefusedError as error:  # this proxy shuts down
            exchange.details = str(error)
            raise
        except OSError as error:
            if exchange.flag == flags.NO_FLAG:
                exchange.flag, exchange.details = flags.CALLER_GONE, f"the caller's connection: {error}"
            raise
        finally:
            client.stream.on_gone = _nothing
            if course.timer is not None:
                course.timer.cancel()
            course.over = True
            if course.connection is not None:
                course.connection.stream.abort("given up")
            self._telemetry.answered(exchange, time.monotonic())

    def _rules_for(self, asked: Asked) -> tuple[Destination, Rules]:
        """Anew for each request: a connection outlives many configurations. Raises RefusalError."""
        try:
            destination = self._destinations.find(asked)
        except RefusedError as error:
            raise RefusalError(503, error.reason, error.detail, flag=flags.NO_ROUTE, close=True) from None
        return destination, self._rules.at(destination)

    def _authorise(self, rules: Rules, caller: Caller, destination: Destination, request: Request) -> None:
        """Raises RefusalError when no policy allows it."""
        decision = rules.policies.decide(
            caller.identity, caller.address, destination.address, destination.dialled_port, request
        )
        if not decision.allowed:
            raise RefusalError(403, "policy", "RBAC: access denied", policy=decision.policy or decision.reason)

    def _route(self, rules: Rules, destination: Destination, request: Request) -> RouteRule | None:
        """The rule for a request; None when its backend is settled. Raises RefusalError when no route matches."""
        if destination.backend is not None:
            return None
        rule = rules.router.route(request)
        if rule is None:
            raise RefusalError(404, "no-route", "no route of this service matches", flag=flags.NO_ROUTE)
        return rule

    def _limit(self, rule: RouteRule | None, course: _Course, exchange: Exchange) -> None:
        """From the request's beginning on, in place of the limit of an earlier rule."""
        if course.timer is not None:
            course.timer.cancel()
            course.timer = None
        if rule is None:
            return
        # There is one attempt, but for a connection that was stale: its limit is the request's.
        limits = [limit for limit in (rule.timeout_ms, rule.backend_timeout_ms) if limit]
        if not limits:
            return
        timeout_ms = min(limits)
        expired = RefusalError(504, "timeout", f"no whole response within {timeout_ms} ms", flag=flags.TIMED_OUT)
        left_s = exchange.started + timeout_ms / 1000 - time.monotonic()
        course.timer = self._plane.call_later(left_s, lambda: course.stop(expired))

    async def _pick(
        self, rule: RouteRule | None, destination: Destination, course: _Course, exchange: Exchange
    ) -> tuple[Backend | None, tuple[Hop, ...]]:
        """Where a request may go, best first. Raises RefusalError when nobody is there."""
        if rule is None:
            assert destination.backend is not None
            return None, (destination.backend,)
        exchange.route = rule.name
        backend = choose_backend(rule, self._random)
        if backend is None:
            raise RefusalError(500, "no-backend", "the route that matches has no backend", flag=flags.NO_ROUTE)
        exchange.backend_service = backend.service
        try:
            try:
                return backend, self._destinations.backends(backend.service, backend.port)
            except RefusedError:
                if self._directory is None:
                    raise
            # A route comes as soon as it is there, and what it leads to is asked for then.
            await self._follow(self._directory, backend.service, course)
            return backend, self._destinations.backends(backend.service, backend.port)
        except RefusedError as error:
            if error.reason == "shutting-down":
                raise
            raise RefusalError(503, error.reason, error.detail, flag=flags.NO_BACKEND) from None

    async def _follow(self, directory: Directory, service_key: str, course: _Course) -> None:
        """Wait for what a route leads to. Raises RefusedError when it does not come in time, RefusalError."""
        claim: Waiter[None] = Waiter(self._plane)
        course.claim = claim
        self._plane.spawn(_followed(directory, service_key, claim))
        try:
            await claim
        except ConnectionResetError as error:
            raise _broken(course, error) from None
        finally:
            course.claim = None
        if course.cause is not None:  # in the turn in which the answer came
            raise course.cause

    async def _forward(
        self,
        client: Client,
        onward: RequestHead,
        caller: Caller,
        hops: tuple[Hop, ...],
        course: _Course,
        exchange: Exchange,
    ) -> list[ResponseEvent]:
        """Send the request to a backend; the beginning of what it answers.

        Raises RefusalError, or OSError for the caller's stream.
        """
        bodiless = client.whole
        fresh = False
        while True:
            exchange.attempts += 1
            connection = await self._connect(caller, hops, course, exchange, fresh=fresh)
            course.writer = writer = RequestWriter()
            try:
                sent = writer.head(onward)
                if bodiless:  # which may be chunked nevertheless: what comes next would be its chunks
                    sent += writer.end()
            except ValueError as error:  # with what is added to it, it is too large
                raise RefusalError(431, "bad-request", str(error), flag=flags.MALFORMED) from None
            connection.reader.expect(onward.method)
            try:
                await connection.stream.send(sent, STALL_TIMEOUT_S)
                if not bodiless:
                    course.uploaded = Waiter(self._plane)
                    self._plane.spawn(self._upload(client, connection, writer, course, exchange))
                events = await connection.events(STALL_TIMEOUT_S)
            except (OSError, MessageError) as error:
                connection.stream.abort(str(error))
                course.connection = None
                replayable = connection.used and not connection.reader.begun
                if replayable and bodiless and onward.method in _IDEMPOTENT and course.cause is None and not fresh:
                    # Its server closed it while the request was on its way: that says nothing of the request.
                    fresh = True
                    continue
                raise _broken(course, error, begun=connection.reader.begun) from None
            connection.used = True
            return events

    async def _connect(
        self, caller: Caller, hops: tuple[Hop, ...], course: _Course, exchange: Exchange, *, fresh: bool
    ) -> HttpConnection:
        """Raises RefusalError."""
        kept = None if fresh else self._upstream.kept(caller, hops[0])
        connection = kept or await self._open(caller, hops, course, exchange, fresh=fresh)
        if course.cause is not None:  # it came in the turn in which the request was stopped
            self._upstream.keep(connection)
            raise course.cause
        course.connection = connection
        hop = connection.hop
        exchange.destination = Peer(host_port(hop.address, HBONE_PORT), hop.workload, str(hop.expected))
        exchange.hbone_address = hop.authority.decode()
        return connection

    async def _open(
        self, caller: Caller, hops: tuple[Hop, ...], course: _Course, exchange: Exchange, *, fresh: bool
    ) -> HttpConnection:
        """Raises RefusalError."""
        claim: Waiter[HttpConnection] = Waiter(self._plane)
        course.claim = claim
        self._plane.spawn(self._upstream.connection(caller, hops, exchange, claim, fresh=fresh))
        try:
            return await claim
        except ConnectionResetError as error:
            raise _broken(course, error) from None
        except RefusedError as error:
            if error.reason == "shutting-down":
                raise
            if error.reason == "policy":  # the backend's uProxy judged the caller, too
                raise RefusalError(403, error.reason, "RBAC: access denied", policy=error.policy) from None
            raise RefusalError(503, error.reason, str(error), flag=flags.BACKEND_UNREACHABLE) from None
        finally:
            course.claim = None

    async def _upload(
        self, client: Client, connection: HttpConnection, writer: RequestWriter, course: _Course, exchange: Exchange
    ) -> None:
        """The request's body to the backend, beside the response. Once that is over, to nobody."""
        assert course.uploaded is not None
        try:
            while data := await client.body():
                exchange.received += len(data)
                if course.over:
                    break
                with contextlib.suppress(ConnectionResetError):  # who waits for the response learns of it, too
                    await connection.stream.send(writer.body(data), STALL_TIMEOUT_S)
            else:
                if not course.over:
                    with contextlib.suppress(ConnectionResetError):
                        await connection.stream.send(writer.end(), STALL_TIMEOUT_S)
        except MessageError as error:
            course.stop(RefusalError(error.status, "bad-request", str(error), flag=flags.MALFORMED))
        except TimeoutError:
            course.stop(RefusalError(408, "timeout", "the request's body does not move", flag=flags.TIMED_OUT))
        except ConnectionResetError:
            course.stop(_caller_gone())
        except RefusedError as error:  # this proxy shuts down
            course.stop(RefusalError(503, error.reason, error.detail))
        finally:
            course.uploaded.set(None)

    async def _relay(
        self,
        client: Client,
        head: RequestHead,
        rule: RouteRule | None,
        backend: Backend | None,
        destination: Destination,
        events: list[ResponseEvent],
        course: _Course,
        exchange: Exchange,
    ) -> bool:
        """The response to the caller. Whether another request may follow. Raises RefusalError, OSError."""
        writer = ResponseWriter(head)
        connection = course.connection
        assert connection is not None
        whole = False
        while True:
            pieces: list[bytes] = []
            for event in events:
                if isinstance(event, Body):
                    exchange.sent += len(event.data)
                    pieces.append(writer.body(event.data))
                elif isinstance(event, ResponseHead):
                    try:
                        answer = _answered(event, rule, backend)
                        pieces.append(writer.head(answer, close=self._turns_away(destination)))
                    except ValueError as error:  # as above
                        raise RefusalError(502, "upstream", str(error), flag=flags.BACKEND_BROKE) from None
                    if not event.interim:
                        exchange.status = event.status
                        course.answering = True
                else:
                    pieces.append(writer.end())
                    whole = True
            if whole:
                self._release(course, client)
            await client.stream.send(b"".join(pieces), STALL_TIMEOUT_S)
            if whole:
                break
            try:
                events = await connection.events(STALL_TIMEOUT_S)
            except (OSError, MessageError) as error:
                raise _broken(course, error) from None
        if not client.whole:
            await self._finish_body(client, course)
        return client.whole and not writer.close

    def _turns_away(self, destination: Destination) -> bool:
        """Whether the caller should connect anew: this process ends, or the service's callers go another way now."""
        bound = all(
            service.binding is not None and service.binding.gateway == self._gateway for service in destination.services
        )
        return self._draining or (bool(destination.services) and not bound)

    def _release(self, course: _Course, client: Client) -> None:
        """The response is whole: the backend's connection can carry another request, or is closed."""
        connection, course.connection = course.connection, None
        course.over = True
        assert connection is not None
        assert course.writer is not None
        uploaded = course.uploaded is None or (course.uploaded.settled and client.whole)
        if connection.reader.reusable and uploaded and course.writer.ended:
            self._upstream.keep(connection)
        else:
            connection.stream.close()

    async def _finish_body(self, client: Client, course: _Course) -> None:
        """The response came before the end of the request's body: read what is left of it, within bounds."""
        timer = self._plane.call_later(DISCARD_TIMEOUT_S, client.stream.close)
        try:
            if course.uploaded is not None:
                await course.uploaded
            await client.discard()
        finally:
            timer.cancel()

    async def _refuse(
        self,
        client: Client,
        head: RequestHead,
        exchange: Exchange,
        refusal: RefusalError,
        course: _Course | None = None,
    ) -> bool:
        """Answer by itself. Whether another request may follow. Raises OSError."""
        _note(exchange, refusal)
        exchange.status = refusal.status
        text = refusal.detail.encode() + b"\n"
        fields = [
            (b"content-type", b"text/plain"),
            (b"x-uproxy-reason", refusal.reason.encode()),
            (b"x-request-id", exchange.request_id.encode()),
        ]
        if refusal.policy:
            fields.append((b"x-uproxy-policy", refusal.policy.encode()))
        writer = ResponseWriter(head)
        # Who waits for 100 (Continue) may send the body or not: nobody can tell where the next request begins.
        close = self._draining or refusal.close or (head.expects_continue and not client.whole)
        response = ResponseHead(refusal.status, _REASONS.get(refusal.status, b""), fields, length(len(text)))
        answer = writer.head(response, close=close) + writer.body(text)
        if head.method != "HEAD":
            exchange.sent = len(text)
        if course is not None:
            course.over = True
            course.answering = True
        await client.stream.send(answer, STALL_TIMEOUT_S)
        if head is _NOBODYS_REQUEST:
            return False
        if not client.whole:
            await self._finish_body(client, course or _Course())
        return client.whole and not writer.close

    # -- opaque TCP

    async def _serve_tcp(
        self,
        carrier: Tunnel,
        relay: Relay,
        caller: Caller,
        asked: Asked,
        destination: Destination,
        record: Connection,
    ) -> None:
        """Raises RefusedError before the 200, and nothing after it."""

        def permitted() -> str:
            try:
                found, rules = self._rules_for(asked)
            except RefusalError:
                return ""  # the service is no longer served here: what was allowed goes on to its end
            decision = rules.policies.decide(caller.identity, caller.address, found.address, found.dialled_port, None)
            if decision.allowed:
                return ""
            record.policy = decision.policy
            return decision.reason

        self._authorise_tcp(permitted, record)
        hops = (
            (destination.backend,)
            if destination.backend is not None
            else self._destinations.backends(destination.service_key, destination.port)
        )
        backend = await self._reach(caller, hops, record)
        try:
            # What changed during that is told to those in `_connections` alone.
            self._authorise_tcp(permitted, record)
        except RefusedError as error:
            backend.abort(str(error))
            raise
        carrier.respond(relay, _OK)
        try:
            stream = ByteStream(relay)
        except ConnectionResetError as error:
            backend.abort(str(error))
            record.flag, record.error = Flag.RESET, str(error)
            self._telemetry.closed(record, time.monotonic())
            return
        splice = Splice(self._plane, stream, backend)
        live = Live(splice, record, lambda: f"policy: no longer allowed: {why}" if (why := permitted()) else "")
        record.meter = splice
        self._telemetry.opened(record)
        self._connections.add(live)
        try:
            outcome = await splice.done
        except RefusedError as error:  # this proxy shuts down
            splice.cut(str(error))
            outcome = await splice.done
        self._connections.remove(live)
        if outcome is not CLEAN:
            record.flag, record.error = outcome.flag, outcome.text
        self._telemetry.closed(record, time.monotonic())

    def _authorise_tcp(self, permitted: Callable[[], str], record: Connection) -> None:
        """Raises RefusedError when no policy allows it."""
        refusal = permitted()
        if refusal:
            raise RefusedError("policy", refusal, status=401, flag=Flag.DENY, policy=record.policy)

    async def _reach(self, caller: Caller, hops: tuple[Hop, ...], record: Connection) -> ByteStream:
        """A stream to the first backend that takes it. Raises RefusedError."""
        failed: RefusedError | None = None
        for hop in hops:
            record.destination = Peer(host_port(hop.address, HBONE_PORT), hop.workload)
            try:
                stream = await self._upstream.stream(caller, hop, record)
                record.destination.identity = str(hop.expected)  # the pool proved it
                return stream
            except RefusedError as error:
                failed = error
                if not error.retriable:
                    break
        assert failed is not None  # there is at least one hop
        try:
            raise failed
        finally:
            del failed  # its traceback holds this frame

    # -- what changes meanwhile

    def config_changed(self, changes: Changes) -> None:
        """Requests ask anew by themselves; connections of opaque TCP are asked here, and those that wait for a request
        which this waypoint would only refuse are closed.
        """
        if not changes:
            return
        self._connections.reauthorise()
        for client, asked in list(self._idle.items()):
            try:
                self._destinations.find(asked)
            except RefusedError:
                client.stream.close()

    def drain(self, timeout_s: float) -> None:
        """This process ends within `timeout_s`: close connections after their next response, or when none is asked for.

        Whoever has connected or had a response may have sent a request that is not here yet: there is a moment for it.
        """
        self._draining = True
        self._grace_s = min(GRACE_S, timeout_s / 2)
        for client in self._idle:
            self._close_later(client)

    def _close_later(self, client: Client) -> None:
        def close() -> None:
            if client in self._idle and client.waits:
                client.stream.close()

        self._plane.call_later(self._grace_s, close)

    def close_idle(self) -> None:
        """The drain time is over: end the connections on which no request is under way."""
        for client in list(self._idle):
            client.stream.close()

    # -- records

    def _begin(self, caller: Caller, head: RequestHead | None) -> Exchange:
        fields = head.fields if head is not None else ()
        given = next((value for name, value in fields if name == b"x-request-id"), b"")
        agent = next((value for name, value in fields if name == b"user-agent"), b"")
        exchange = Exchange(
            source=self._peer(caller),
            destination=Peer(""),
            started=time.monotonic(),
            request_id=given.decode() if _REQUEST_ID.fullmatch(given) else os.urandom(16).hex(),
            method=head.method if head is not None else "",
            path=head.target if head is not None else "",
            protocol=f"HTTP/1.{head.minor}" if head is not None else "",
            user_agent=agent.decode("latin-1"),
        )
        self._place_in_trace(exchange, [value for name, value in fields if name == b"traceparent"])
        self._telemetry.began(exchange)
        return exchange

    def _place_in_trace(self, exchange: Exchange, given: list[bytes]) -> None:
        """A request that its caller records goes on in that trace; of others, a share begins one here."""
        said = trace.read(given[0]) if len(given) == 1 else None
        spans = self._telemetry.spans
        if said is not None and said.span:
            exchange.trace, exchange.parent_span = said.trace, said.span
            recorded = spans is not None
        else:
            named = exchange.request_id.replace("-", "").lower()  # mostly a UUID, where the caller has chosen it
            exchange.trace = named if _TRACE.fullmatch(named) else os.urandom(16).hex()
            recorded = said is None and spans is not None and spans.draws()
        if recorded:
            exchange.span = os.urandom(8).hex()

    def _record(self, caller: Caller, name: str) -> Connection:
        return Connection(
            direction="waypoint",
            source=self._peer(caller),
            destination=Peer("-"),
            request_id=name,
            started=time.monotonic(),
        )

    def _peer(self, caller: Caller) -> Peer:
        workload: Workload | None = self._state.workload_at(caller.address)
        known = workload if workload is not None and workload.identity == caller.identity else None
        return Peer(host_port(caller.address, caller.port), known, str(caller.identity))


async def _introduced(directory: Directory, caller: IpAddress) -> None:
    with contextlib.suppress(RefusedError):  # this proxy shuts down
        await directory.introduce(caller, "")


async def _followed(directory: Directory, service_key: str, claim: Waiter[None]) -> None:
    try:
        await directory.followed(service_key)
        claim.set(None)
    except RefusedError as error:
        claim.fail(error)
    finally:
        # Nothing, if it was settled; whoever waits must learn of a bug, too.
        claim.fail(RefusedError("no-config", "a bug of this proxy; its log has the traceback"))


def _judged(head: RequestHead) -> Request:
    """Raises RefusalError for a request that two parsers could read differently."""
    try:
        return read_request(head.method, head.target, head.fields)
    except RequestError as error:
        raise RefusalError(400, "bad-request", str(error), flag=flags.MALFORMED) from None


def _onward(
    head: RequestHead,
    request: Request,
    rule: RouteRule | None,
    backend: Backend | None,
    caller: Caller,
    exchange: Exchange,
) -> RequestHead:
    """The head that the backend gets: the path as it was judged, who calls said by nobody but us, and our span."""
    fields: Fields = head.fields
    if rule is not None and backend is not None:
        fields = modified(fields, rule.request, backend.request)
    kept = [(name, value) for name, value in fields if name not in _CALLERS and not name.startswith(_OURS)]
    kept += (
        (b"x-forwarded-for", caller.address.encode()),
        (b"x-forwarded-client-cert", f"URI={caller.identity}".encode()),
        (b"x-request-id", exchange.request_id.encode()),
    )
    if exchange.span:
        kept = [(name, value) for name, value in kept if name != b"traceparent"]
        kept.append((b"traceparent", exchange.traceparent))
    return RequestHead(head.method, request.target, kept, head.framing, expects_continue=head.expects_continue)


def _answered(head: ResponseHead, rule: RouteRule | None, backend: Backend | None) -> ResponseHead:
    """The head that the caller gets. Refusals with our reasons are ours alone."""
    fields: Fields = [(name, value) for name, value in head.fields if not name.startswith(_OURS)]
    if rule is not None and backend is not None:
        fields = modified(fields, backend.response, rule.response)
    return ResponseHead(head.status, head.reason, fields, head.framing)


def _broken(course: _Course, error: Exception, *, begun: bool = False) -> RefusalError:
    """The backend's connection failed, by itself or because the request was stopped. `begun`: within a response."""
    if course.cause is not None:
        return course.cause
    if isinstance(error, TimeoutError):
        return RefusalError(504, "timeout", f"no response within {STALL_TIMEOUT_S:g} s", flag=flags.TIMED_OUT)
    status = error.status if isinstance(error, MessageError) and begun else 503
    return RefusalError(status, "upstream", f"the backend's connection: {error}", flag=flags.BACKEND_BROKE)


def _caller_gone() -> RefusalError:
    return RefusalError(0, "caller-gone", "the caller went away", flag=flags.CALLER_GONE)


def _note(exchange: Exchange, refusal: RefusalError) -> None:
    exchange.flag, exchange.details, exchange.policy = refusal.flag, refusal.detail, refusal.policy
    if refusal.reason == "policy":
        exchange.details = "rbac_access_denied"


def _nothing() -> None: ...
