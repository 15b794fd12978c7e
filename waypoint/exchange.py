"""One request's life at a waypoint, top to bottom, whatever its caller and its backend speak.

head -> authorise -> route -> pick -> forward -> relay both bodies -> record. All of it runs in the data plane's turns.
"""

from __future__ import annotations

import contextlib
import math
import os
import random
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final
from urllib.parse import quote

from control.api.address import HBONE_PORT
from control.api.filters import Filters
from control.api.route import NO_MODIFIER, Backend, RouteRule
from control.client.state import State
from uproxy import trace
from uproxy.connections import Connections, Live
from uproxy.errors import RefusedError
from uproxy.hbone import ErrorCode
from uproxy.listener import Asked
from uproxy.plane import Plane, Timer, Waiter
from uproxy.relay import CLEAN
from uproxy.resolve import Hop, host_port
from uproxy.telemetry import Connection, Peer
from waypoint import cors
from waypoint import telemetry as flags
from waypoint.byte_stream import StreamError
from waypoint.caller import Caller
from waypoint.destination import Destination, Destinations
from waypoint.directory import Directory
from waypoint.messages import END, Body, End, Fields, MessageError, RequestHead, ResponseEvent, ResponseHead, length
from waypoint.mirror import Copy, Mirrors
from waypoint.refusal import REASONS, RefusalError, grpc_status
from waypoint.request import Request, RequestError, read_request
from waypoint.retry import MAX_KEPT, Budgets, pause_s
from waypoint.rewriting import location, rewritten
from waypoint.routing import choose_backend, modified
from waypoint.rules import RuleBook, Rules
from waypoint.sides import IDEMPOTENT, STALL_TIMEOUT_S, Incoming, Outgoing
from waypoint.splice import Splice
from waypoint.telemetry import Exchange, WaypointTelemetry
from waypoint.tokens import TokenError
from waypoint.traffic import Excess, Place
from waypoint.upstream import Upstream

_CALLERS: Final = frozenset({b"x-forwarded-for", b"x-forwarded-client-cert", b"x-request-id"})
_OURS: Final = b"x-uproxy-"
_INVALID_TOKEN: Final = ((b"www-authenticate", b'Bearer error="invalid_token"'),)  # RFC 6750 section 3
_REQUEST_ID: Final = re.compile(rb"[A-Za-z0-9._-]{1,64}")
_PASSED_ON: Final[dict[int | None, ErrorCode]] = {
    code: code for code in (ErrorCode.CANCEL, ErrorCode.ENHANCE_YOUR_CALM, ErrorCode.INADEQUATE_SECURITY)
}
"""What a backend's reset says of the request. Others say it of the connection, or (REFUSED_STREAM) that it may be sent
again, which it may not once there was a response."""
_TRACE: Final = re.compile(r"(?!0{32})[0-9a-f]{32}")


def _forever() -> str:
    return ""


@dataclass(slots=True, eq=False)
class _Course:
    """A request, and how far it has come, so that a deadline, or its caller's leaving, can end it where it waits."""

    request: Incoming
    caller: Caller
    exchange: Exchange
    still_permitted: Callable[[], str] = _forever
    """Why not, when policy has changed."""
    claim: Waiter[Outgoing] | Waiter[None] | None = None
    """What it waits for before it has a way to a backend."""
    http2: bool = False
    """Whether the backend takes requests by HTTP/2."""
    outgoing: Outgoing | None = None
    cause: RefusalError | None = None
    """Why it was stopped."""
    missed: RefusalError | None = None
    """Why this attempt was stopped."""
    kept: list[bytes] | None = None
    """What has come of the request's body, if it may be sent again."""
    copies: Sequence[Copy] = ()
    """For mirrors."""
    permitted: Request | None = None
    """As routes see it, once policy has let it in."""
    rule: RouteRule | None = None
    """Under which it falls, and where that sends it, once both are known."""
    backend: Backend | None = None
    answering: bool = False
    """Whether bytes of the final response may have gone to the caller."""
    uploaded: Waiter[None] | None = None
    """Settled when the request's body was read to its end, or is read no more. None: there is no body."""
    over: bool = False
    """Whether nobody wants the rest of the request's body."""
    timer: Timer | None = None
    attempt_timer: Timer | None = None
    place: Place | None = None
    """What it takes up of what is limited."""

    def stop(self, cause: RefusalError) -> None:
        if self.cause is None:
            self.cause = cause
        self._break(cause.detail)

    def miss(self, missed: RefusalError) -> None:
        """This attempt has taken too long."""
        self.missed = missed
        self._break(missed.detail)

    def _break(self, text: str) -> None:
        if self.outgoing is not None:
            self.outgoing.abort(text)
        elif self.claim is not None:
            self.claim.fail(ConnectionResetError(text))

    def pass_on(self, data: bytes) -> None:
        """More of the request's body has come: for mirrors, and for another attempt."""
        for copy in self.copies:
            copy.write(data)
        if self.kept is not None:
            self.kept.append(data)
            if self.exchange.received > MAX_KEPT:
                self.kept = None

    def settle(self) -> None:
        """It is over."""
        self.over = True
        for timer in (self.timer, self.attempt_timer):
            if timer is not None:
                timer.cancel()
        if self.place is not None:
            self.place.leave()
        if self.outgoing is not None:
            self.outgoing.abort("given up")
        for copy in self.copies:
            copy.close()


class Exchanges:
    """Serves requests."""

    def __init__(
        self,
        data_plane: Plane,
        state: State,
        gateway: str,
        destinations: Destinations,
        rules: RuleBook,
        upstream: Upstream,
        connections: Connections,
        telemetry: WaypointTelemetry,
        directory: Directory | None,
    ) -> None:
        """`gateway`: key of the Gateway. `directory`: where what is not known is asked for, if anywhere."""
        self.draining = False
        """This process ends: callers are to connect anew."""
        self._plane = data_plane
        self._state = state
        self._gateway = gateway
        self._destinations = destinations
        self._rules = rules
        self._upstream = upstream
        self._connections = connections
        self._telemetry = telemetry
        self._directory = directory
        self._random = random.Random()
        self._mirrors = Mirrors(data_plane, destinations, upstream)
        self._budgets = Budgets(time.monotonic)

    async def serve(self, request: Incoming, caller: Caller, asked: Asked) -> None:
        """One request, until it is answered or aborted. Raises nothing."""
        try:
            await self._serve(request, caller, asked)
        except (OSError, RefusedError) as error:  # RefusedError: this proxy shuts down
            request.abort(str(error))
        except Exception:
            request.abort("a bug of this proxy; its log has the traceback")
            raise

    async def refuse(self, request: Incoming, caller: Caller, error: MessageError) -> None:
        """Answer what could not be read. Raises nothing."""
        exchange = self._begin(caller, None)
        refusal = RefusalError(error.status, "bad-request", str(error), flag=flags.MALFORMED)
        try:
            await self._refuse(_Course(request, caller, exchange), refusal)
        except (OSError, RefusedError) as failure:
            request.abort(str(failure))
        finally:
            self._telemetry.answered(exchange, time.monotonic())

    async def _serve(self, request: Incoming, caller: Caller, asked: Asked) -> None:
        """Raises RefusedError, OSError."""
        head = request.head
        exchange = self._begin(caller, head)
        course = _Course(request, caller, exchange)
        request.on_gone = lambda: course.stop(_caller_gone())
        try:
            destination, rules = self._rules_for(asked)
            exchange.destination_service = destination.service_key
            judged = _judged(head)
            course.still_permitted = lambda: self._still_permitted(course, asked, judged)
            exchange.path, exchange.authority = judged.target, judged.host
            permitted = course.permitted = self._permitted(rules, caller, destination, judged, exchange)
            exchange.path = permitted.target
            rule = self._route(rules, caller, destination, permitted)
            course.place = self._let_through(rules, caller, permitted, rule)
            while True:
                course.rule = rule
                if rule is not None and (answer := _answered_here(rule.filters, course, destination)) is not None:
                    await self._answer(course, answer)
                    return
                generation = self._state.generation
                self._limit(rule, course)
                await self._suffer(course)
                course.backend, hops = await self._pick(rule, destination, course)
                if self._state.generation == generation:
                    break
                # It has waited: what holds now counts.
                destination, rules = self._rules_for(asked)
                permitted = course.permitted = self._permitted(rules, caller, destination, judged, exchange)
                before, rule = rule, self._route(rules, caller, destination, permitted)
                if rule == before:
                    break
            backend = course.backend
            if backend is not None and (answer := _answered_here(backend.filters, course, destination)) is not None:
                await self._answer(course, answer)
                return
            if backend is None:
                course.http2 = destination.http2
            else:
                course.http2 = self._destinations.speaks_http2(backend.service, backend.port)
            if head.upgrades and course.http2:
                raise RefusalError(501, "bad-request", "the backend speaks HTTP/2, which has no upgrades")
            response = await self._forward(course, _onward(course, permitted), hops)
            await self._relay(course, destination, response)
        except RefusalError as refusal:
            if course.answering or refusal.flag == flags.CALLER_GONE:
                # What the caller has of the response is not whole, and must not look so.
                _note(exchange, refusal)
                request.abort(refusal.detail, refusal.code)
            else:
                await self._refuse(course, refusal)
        except RefusedError as error:  # this proxy shuts down
            exchange.details = str(error)
            raise
        except OSError as error:
            if exchange.flag == flags.NO_FLAG:
                exchange.flag, exchange.details = flags.CALLER_GONE, f"the caller's connection: {error}"
            raise
        finally:
            request.on_gone = _nothing
            course.settle()
            self._telemetry.answered(exchange, time.monotonic())

    def _rules_for(self, asked: Asked) -> tuple[Destination, Rules]:
        """Anew for each request: a connection outlives many configurations. Raises RefusalError."""
        try:
            destination = self._destinations.find(asked)
        except RefusedError as error:
            raise RefusalError(503, error.reason, error.detail, flag=flags.NO_ROUTE, close=True) from None
        return destination, self._rules.at(destination)

    def _permitted(
        self, rules: Rules, caller: Caller, destination: Destination, request: Request, exchange: Exchange
    ) -> Request:
        """The request as it goes on. Raises RefusalError when its token is not valid, or no policy allows it."""
        try:
            token, onward = rules.tokens.verify(request)
        except TokenError as error:
            raise RefusalError(401, "token", str(error), fields=_INVALID_TOKEN) from None
        asked = caller.identity, caller.address, destination.address, destination.dialled_port, onward, token
        decision = rules.policies.decide(*asked)
        if (rehearsal := rules.policies.rehearsal) is not None:
            exchange.dry_run = self._telemetry.rehearsals.note(decision, rehearsal.decide(*asked))
        if not decision.allowed:
            raise RefusalError(403, "policy", "RBAC: access denied", policy=decision.policy or decision.reason)
        return onward

    def _still_permitted(self, course: _Course, asked: Asked, request: Request) -> str:
        """Empty, or why a WebSocket that was permitted once must end."""
        try:
            destination, rules = self._rules_for(asked)
            self._permitted(rules, course.caller, destination, request, course.exchange)
        except RefusalError as refusal:
            # A service that is no longer served here keeps what it has, and a token only opens.
            return f"policy: no longer allowed: {refusal.policy}" if refusal.reason == "policy" else ""
        return ""

    def _route(self, rules: Rules, caller: Caller, destination: Destination, request: Request) -> RouteRule | None:
        """The rule for a request; None when its backend is settled. Raises RefusalError when no route matches."""
        if destination.backend is not None:
            return None
        rule = rules.router.route(request, caller.identity.namespace)
        if rule is None:
            raise RefusalError(404, "no-route", "no route of this service matches", flag=flags.NO_ROUTE)
        return rule

    def _let_through(self, rules: Rules, caller: Caller, request: Request, rule: RouteRule | None) -> Place | None:
        """Raises RefusalError for a request that is one too many."""
        found = rules.traffic.enter(caller, request, rule.name if rule is not None else "", time.monotonic())
        if not isinstance(found, Excess):
            return found
        if found.wait_s:
            after = ((b"retry-after", str(math.ceil(found.wait_s)).encode()),)
            text = "local_rate_limited"  # Envoy's
            raise RefusalError(429, "rate-limited", text, flag=flags.RATE_LIMITED, policy=found.policy, fields=after)
        text = "too many requests are under way"
        raise RefusalError(503, "overload", text, flag=flags.TOO_MANY, policy=found.policy)

    async def _suffer(self, course: _Course) -> None:
        """What is done to a request on purpose, once. Raises RefusalError."""
        place = course.place
        if place is None:
            return
        delay_ms, place.delay_ms = place.delay_ms, 0
        if delay_ms:
            course.exchange.flag = flags.DELAYED
            claim: Waiter[None] = Waiter(self._plane)
            course.claim = claim
            timer = self._plane.call_later(delay_ms / 1000, lambda: claim.set(None))
            try:
                await claim
            except ConnectionResetError as error:
                raise _broken(course, error) from None
            finally:
                timer.cancel()
                course.claim = None
            if course.cause is not None:
                raise course.cause
        if place.status:
            raise RefusalError(place.status, "fault", "fault filter abort", flag=flags.ABORTED)

    def _limit(self, rule: RouteRule | None, course: _Course) -> None:
        """From the request's beginning on, in place of the limit of an earlier rule."""
        if course.timer is not None:
            course.timer.cancel()
            course.timer = None
        if rule is None:
            return
        if rule.timeout_ms:
            left_s = course.exchange.started + rule.timeout_ms / 1000 - time.monotonic()
            course.timer = self._plane.call_later(left_s, lambda: course.stop(_expired(rule.timeout_ms)))

    async def _pick(
        self, rule: RouteRule | None, destination: Destination, course: _Course
    ) -> tuple[Backend | None, tuple[Hop, ...]]:
        """Where a request may go, best first. Raises RefusalError when nobody is there."""
        if rule is None:
            assert destination.backend is not None
            return None, (destination.backend,)
        exchange = course.exchange
        exchange.route = rule.name
        backend = choose_backend(rule, self._random)
        if backend is None:
            raise RefusalError(500, "no-backend", "the route that matches has no backend", flag=flags.NO_ROUTE)
        exchange.backend_service = backend.service
        if backend.refused:
            unasked = f"no ReferenceGrant lets this route send to Service {backend.service}"
            raise RefusalError(500, "no-backend", unasked, flag=flags.NO_ROUTE)
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
            if self._state.service(backend.service) is None and error.reason == "no-endpoint":
                raise RefusalError(500, "no-backend", error.detail, flag=flags.NO_ROUTE) from None
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

    async def _forward(self, course: _Course, onward: RequestHead, hops: tuple[Hop, ...]) -> list[ResponseEvent]:
        """Send the request to a backend, again if its route says so; the beginning of what it answers.

        Raises RefusalError; OSError for the caller's stream.
        """
        rule, backend = course.rule, course.backend
        if rule is None or backend is None:
            return await self._attempt(course, onward, hops)
        mirrors = (*rule.filters.mirrors, *backend.filters.mirrors)
        if mirrors:
            ended = course.request.whole
            course.copies = self._mirrors.copies(mirrors, onward, course.caller, course.exchange, ended=ended)
        retry = rule.retry
        if retry is None:
            self._limit_attempt(course, rule)
            return await self._attempt(course, onward, hops)
        if not course.request.whole:
            course.kept = []
        budget = self._budgets.at(backend.service)
        budget.tried()
        for tried in range(1, retry.attempts + 1):
            self._limit_attempt(course, rule)
            try:
                events = await self._attempt(course, onward, hops)
                heads = [event for event in events if isinstance(event, ResponseHead)]
                while heads[-1].interim:
                    await course.request.send([_answered(head, course) for head in heads])
                    events = await self._more(course)
                    heads = [event for event in events if isinstance(event, ResponseHead)]
                if not (heads[-1].status in retry.codes and await _repeatable(course) and budget.allows()):
                    return events
                _drop(course, events)
            except RefusalError as refusal:
                if not (refusal.retriable and await _repeatable(course) and budget.allows()):
                    raise
            await self._pause(course, pause_s(retry, tried, self._random))
            hops = self._hops(backend)
        self._limit_attempt(course, rule)
        return await self._attempt(course, onward, hops)

    def _limit_attempt(self, course: _Course, rule: RouteRule) -> None:
        """From now on, in place of the limit of an earlier one."""
        if course.attempt_timer is not None:
            course.attempt_timer.cancel()
        course.missed = None
        if rule.backend_timeout_ms:
            expired = _expired(rule.backend_timeout_ms, retriable=course.request.head.method in IDEMPOTENT)
            course.attempt_timer = self._plane.call_later(rule.backend_timeout_ms / 1000, lambda: course.miss(expired))

    async def _attempt(self, course: _Course, onward: RequestHead, hops: tuple[Hop, ...]) -> list[ResponseEvent]:
        """Once, but for a connection that was stale. Raises RefusalError."""
        bodiless = course.request.whole and course.uploaded is None
        fresh = False
        while True:
            course.exchange.attempts += 1
            outgoing = await self._connect(course, hops, fresh=fresh)
            try:
                await outgoing.begin(onward, ended=bodiless)
                if course.uploaded is not None:  # as an earlier attempt was sent
                    for data in course.kept or ():
                        await outgoing.write(data)
                    await outgoing.end(course.request.trailers)
                elif not bodiless:
                    course.uploaded = Waiter(self._plane)
                    self._plane.spawn(_upload(course, outgoing, course.uploaded))
                return await outgoing.events()
            except ValueError as error:  # with what is added to it, it is too large
                raise RefusalError(431, "bad-request", str(error), flag=flags.MALFORMED) from None
            except (OSError, MessageError) as error:
                outgoing.abort(str(error))
                course.outgoing = None
                stopped = course.cause is not None or course.missed is not None
                if bodiless and not fresh and not stopped and outgoing.replayable(onward.method):
                    fresh = True
                    continue
                raise _broken(course, error, begun=outgoing.begun) from None

    async def _more(self, course: _Course) -> list[ResponseEvent]:
        """What the backend answers further. Raises RefusalError."""
        assert course.outgoing is not None
        try:
            return await course.outgoing.events()
        except (OSError, MessageError) as error:
            raise _broken(course, error) from None

    async def _pause(self, course: _Course, seconds: float) -> None:
        """Raises RefusalError when the request is stopped meanwhile."""
        claim: Waiter[None] = Waiter(self._plane)
        course.claim = claim
        timer = self._plane.call_later(seconds, lambda: claim.set(None))
        if course.attempt_timer is not None:
            course.attempt_timer.cancel()
        try:
            await claim
        except ConnectionResetError as error:
            raise _broken(course, error) from None
        finally:
            course.claim = None
            timer.cancel()
        if course.cause is not None:
            raise course.cause

    def _hops(self, backend: Backend) -> tuple[Hop, ...]:
        """Where another attempt may go. Raises RefusalError."""
        try:
            return self._destinations.backends(backend.service, backend.port)
        except RefusedError as error:
            raise RefusalError(503, error.reason, error.detail, flag=flags.NO_BACKEND) from None

    async def _connect(self, course: _Course, hops: tuple[Hop, ...], *, fresh: bool) -> Outgoing:
        """A way to a backend, which is the course's from here. Raises RefusalError."""
        kept = None if fresh else self._upstream.kept(course.caller, hops[0], http2=course.http2)
        outgoing = kept or await self._open(course, hops, fresh=fresh)
        stopped = course.cause or course.missed
        if stopped is not None:  # it came in the turn in which the request was stopped
            outgoing.done(uploaded=True)
            raise stopped
        course.outgoing = outgoing
        hop = outgoing.hop
        course.exchange.destination = Peer(host_port(hop.address, HBONE_PORT), hop.workload, str(hop.expected))
        course.exchange.hbone_address = hop.authority.decode()
        return outgoing

    async def _open(self, course: _Course, hops: tuple[Hop, ...], *, fresh: bool) -> Outgoing:
        """Raises RefusalError."""
        claim: Waiter[Outgoing] = Waiter(self._plane)
        course.claim = claim
        opening = self._upstream.outgoing(course.caller, hops, course.exchange, claim, http2=course.http2, fresh=fresh)
        self._plane.spawn(opening)
        try:
            return await claim
        except ConnectionResetError as error:
            raise _broken(course, error) from None
        except RefusedError as error:
            if error.reason == "shutting-down":
                raise
            if error.reason == "policy":  # the backend's uProxy judged the caller, too
                raise RefusalError(403, error.reason, "RBAC: access denied", policy=error.policy) from None
            unreachable = flags.BACKEND_UNREACHABLE
            raise RefusalError(503, error.reason, str(error), flag=unreachable, retriable=True) from None
        finally:
            course.claim = None

    async def _relay(
        self,
        course: _Course,
        destination: Destination,
        events: list[ResponseEvent],
    ) -> None:
        """The response to the caller. Raises RefusalError, OSError."""
        request, exchange, outgoing = course.request, course.exchange, course.outgoing
        assert outgoing is not None
        while True:
            answering = course.answering
            answer: list[ResponseEvent] = []
            for event in events:
                if isinstance(event, Body):
                    exchange.sent += len(event.data)
                elif isinstance(event, ResponseHead):
                    event = _answered(event, course)
                    if not event.interim:
                        exchange.status = event.status
                        answering = True
                        if exchange.grpc:
                            _note_grpc(exchange, event.fields)
                elif exchange.grpc:
                    _note_grpc(exchange, event.trailers)
                answer.append(event)
            whole = isinstance(answer[-1], End)
            if whole:
                _release(course, outgoing)
            try:
                await request.send(answer, close=answering and self._turns_away(destination))
            except ValueError as error:  # as above
                raise RefusalError(502, "upstream", str(error), flag=flags.BACKEND_BROKE) from None
            course.answering = answering
            if answering and exchange.status == 101:
                await self._switch(course, outgoing)
                return
            if whole:
                break
            events = await self._more(course)
        if not request.whole:
            await request.discard(course.uploaded)

    async def _switch(self, course: _Course, outgoing: Outgoing) -> None:
        """A WebSocket, to its end: bytes as they are, under the policies of the request that has opened it."""
        request, exchange = course.request, course.exchange
        request.on_gone = _nothing
        course.outgoing = None
        for timer in (course.timer, course.attempt_timer):
            if timer is not None:
                timer.cancel()
        record = Connection("waypoint", exchange.source, exchange.destination, exchange.started)
        splice = Splice(self._plane, request.switched(), outgoing.switched())
        live = Live(splice, record, course.still_permitted)
        self._connections.add(live)
        try:
            outcome = await splice.done
        except RefusedError as error:  # this proxy shuts down
            splice.cut(str(error))
            outcome = await splice.done
        self._connections.remove(live)
        exchange.received += splice.received
        exchange.sent += splice.sent
        if outcome is not CLEAN:
            exchange.flag, exchange.details = flags.BACKEND_BROKE, outcome.text

    def _turns_away(self, destination: Destination) -> bool:
        """Whether the caller should connect anew: this process ends, or the service's callers go another way now."""
        bound = all(
            service.binding is not None and service.binding.gateway == self._gateway for service in destination.services
        )
        return self.draining or (bool(destination.services) and not bound)

    async def _refuse(self, course: _Course, refusal: RefusalError) -> None:
        """Raises OSError."""
        _note(course.exchange, refusal)
        if course.exchange.grpc:
            await self._answer(course, _grpc_answer(refusal, course), close=refusal.close)
            return
        text = refusal.detail.encode() + b"\n"
        fields = [(b"content-type", b"text/plain"), *_refused_for(refusal, course)]
        head = ResponseHead(
            refusal.status, REASONS.get(refusal.status, b""), _for_browsers(fields, course), length(len(text))
        )
        await self._answer(course, head, text, close=refusal.close)

    async def _answer(self, course: _Course, head: ResponseHead, text: bytes = b"", *, close: bool = False) -> None:
        """Answer by itself. Raises OSError."""
        request, exchange = course.request, course.exchange
        exchange.status = head.status
        if request.head.method != "HEAD":
            exchange.sent = len(text)
        course.over = True
        course.answering = True
        events = (head, Body(text), END) if text else (head, END)
        await request.send(events, close=self.draining or close)
        if not request.whole:
            await request.discard(course.uploaded)

    # -- records

    def _begin(self, caller: Caller, head: RequestHead | None) -> Exchange:
        fields = head.fields if head is not None else ()
        first = dict(reversed(fields))
        given = first.get(b"x-request-id", b"")
        exchange = Exchange(
            source=caller.peer(self._state),
            destination=Peer(""),
            started=time.monotonic(),
            request_id=given.decode() if _REQUEST_ID.fullmatch(given) else os.urandom(16).hex(),
            method=head.method if head is not None else "",
            path=head.target if head is not None else "",
            protocol=head.protocol if head is not None else "",
            user_agent=first.get(b"user-agent", b"").decode("latin-1"),
            grpc=_is_grpc(first.get(b"content-type", b"")),
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


async def _followed(directory: Directory, service_key: str, claim: Waiter[None]) -> None:
    try:
        await directory.followed(service_key)
        claim.set(None)
    except RefusedError as error:
        claim.fail(error)
    finally:
        # Nothing, if it was settled; whoever waits must learn of a bug, too.
        claim.fail(RefusedError("no-config", "a bug of this proxy; its log has the traceback"))


async def _upload(course: _Course, outgoing: Outgoing, uploaded: Waiter[None]) -> None:
    """The request's body to the backend, beside the response. Once that is over, to nobody."""
    try:
        while data := await course.request.body():
            course.exchange.received += len(data)
            if course.over:
                break
            course.pass_on(data)
            with contextlib.suppress(ConnectionResetError):  # who waits for the response learns of it, too
                await outgoing.write(data)
        else:
            if not course.over:
                for copy in course.copies:
                    copy.end()
                with contextlib.suppress(ConnectionResetError):
                    await outgoing.end(course.request.trailers)
    except MessageError as error:
        course.stop(RefusalError(error.status, "bad-request", str(error), flag=flags.MALFORMED))
    except TimeoutError:
        course.stop(RefusalError(408, "timeout", "the request's body does not move", flag=flags.TIMED_OUT))
    except ConnectionResetError:
        course.stop(_caller_gone())
    except RefusedError as error:  # this proxy shuts down
        course.stop(RefusalError(503, error.reason, error.detail))
    finally:
        uploaded.set(None)


async def _repeatable(course: _Course) -> bool:
    """Whether the request can be sent again: nobody wants it stopped, and none of its body was read, or all is here."""
    if course.cause is not None:
        return False
    if course.uploaded is None:
        return True
    if course.request.whole:
        await course.uploaded  # it has read the body's end, and may not have told so
    return course.request.whole and course.kept is not None


def _drop(course: _Course, events: Sequence[ResponseEvent]) -> None:
    """An answer that the caller does not get."""
    assert course.outgoing is not None
    outgoing, course.outgoing = course.outgoing, None
    if isinstance(events[-1], End):
        outgoing.done(uploaded=True)
    else:
        outgoing.abort("sent again")


def _expired(timeout_ms: int, *, retriable: bool = False) -> RefusalError:
    text = f"no whole response within {timeout_ms} ms"
    return RefusalError(504, "timeout", text, flag=flags.TIMED_OUT, retriable=retriable)


def _release(course: _Course, outgoing: Outgoing) -> None:
    """The response is whole: what carried it can carry another request, or is closed."""
    course.outgoing = None
    course.over = True
    outgoing.done(uploaded=course.uploaded is None or (course.uploaded.settled and course.request.whole))


def _is_grpc(kind: bytes) -> bool:
    """By its content type; gRPC-Web is another protocol."""
    return kind.startswith(b"application/grpc") and kind[16:17] in (b"", b"+", b";")


def _judged(head: RequestHead) -> Request:
    """Raises RefusalError for a request that two parsers could read differently."""
    try:
        return read_request(head.method, head.target, head.fields)
    except RequestError as error:
        raise RefusalError(400, "bad-request", str(error), flag=flags.MALFORMED) from None


def _answered_here(filters: Filters, course: _Course, destination: Destination) -> ResponseHead | None:
    """What no backend is asked for: where else to go, or what a browser may do."""
    assert course.permitted is not None
    if filters.cors is not None and cors.is_preflight(course.permitted):
        return cors.preflight(filters.cors, course.permitted)
    if filters.redirect is None:
        return None
    assert course.rule is not None
    where = location(filters.redirect, course.rule, course.permitted, destination.dialled_port)
    status = filters.redirect.status
    return _answered(ResponseHead(status, REASONS[status], [(b"location", where.encode())], length(0)), course)


def _onward(course: _Course, request: Request) -> RequestHead:
    """The head that the backend gets: the path as it was judged, who calls said by nobody but us, and our span."""
    head, caller, exchange = course.request.head, course.caller, course.exchange
    target, fields = request.target, request.fields
    if course.rule is not None and course.backend is not None:
        fields = modified(fields, course.rule.request, course.backend.request)
        rewrite = course.backend.filters.rewrite or course.rule.filters.rewrite
        if rewrite is not None:
            target, fields = rewritten(rewrite, course.rule, target, fields)
    kept = [(name, value) for name, value in fields if name not in _CALLERS and not name.startswith(_OURS)]
    kept += (
        (b"x-forwarded-for", caller.address.encode()),
        (b"x-forwarded-client-cert", f"URI={caller.identity}".encode()),
        (b"x-request-id", exchange.request_id.encode()),
    )
    if exchange.span:
        kept = [(name, value) for name, value in kept if name != b"traceparent"]
        kept.append((b"traceparent", exchange.traceparent))
    return RequestHead(
        head.method,
        target,
        kept,
        head.framing,
        expects_continue=head.expects_continue,
        takes_trailers=head.takes_trailers,
        upgrades=head.upgrades,
    )


def _answered(head: ResponseHead, course: _Course) -> ResponseHead:
    """The head that the caller gets. Refusals with our reasons are ours alone."""
    fields: Fields = [(name, value) for name, value in head.fields if not name.startswith(_OURS)]
    if course.rule is not None:
        from_backend = course.backend.response if course.backend is not None else NO_MODIFIER
        fields = modified(fields, from_backend, course.rule.response)
    return ResponseHead(head.status, head.reason, _for_browsers(fields, course), head.framing)


def _for_browsers(fields: Fields, course: _Course) -> Fields:
    """With what pages of other origins may do, where the route says so."""
    if course.rule is None or course.rule.filters.cors is None or course.permitted is None:
        return fields
    return cors.answered(course.rule.filters.cors, course.permitted, fields)


def _grpc_answer(refusal: RefusalError, course: _Course) -> ResponseHead:
    """A status of its own, with neither body nor trailers (gRPC over HTTP/2: Trailers-Only)."""
    course.exchange.grpc_status = str(grpc_status(refusal.status))
    fields = [
        (b"content-type", b"application/grpc"),
        (b"grpc-status", course.exchange.grpc_status.encode()),
        (b"grpc-message", quote(refusal.detail, safe=" !\"#$&'()*+,/:;<=>?@[\\]^`{|}").encode()),
        *_refused_for(refusal, course),
    ]
    return ResponseHead(200, b"OK", fields)


def _refused_for(refusal: RefusalError, course: _Course) -> Fields:
    """What programs are told."""
    fields = [
        (b"x-uproxy-reason", refusal.reason.encode()),
        (b"x-request-id", course.exchange.request_id.encode()),
        *refusal.fields,
    ]
    if refusal.policy:
        fields.append((b"x-uproxy-policy", refusal.policy.encode()))
    return fields


def _broken(course: _Course, error: Exception, *, begun: bool = False) -> RefusalError:
    """The backend's connection failed, by itself or because the request was stopped. `begun`: within a response."""
    if course.cause is not None:
        return course.cause
    if course.missed is not None:
        return course.missed
    if isinstance(error, TimeoutError):
        return RefusalError(504, "timeout", f"no response within {STALL_TIMEOUT_S:g} s", flag=flags.TIMED_OUT)
    status = error.status if isinstance(error, MessageError) and begun else 503
    said = error.code if isinstance(error, StreamError) else None
    code = _PASSED_ON.get(said, ErrorCode.INTERNAL_ERROR)
    retriable = not begun and course.request.head.method in IDEMPOTENT
    text = f"the backend's connection: {error}"
    return RefusalError(status, "upstream", text, flag=flags.BACKEND_BROKE, code=code, retriable=retriable)


def _caller_gone() -> RefusalError:
    return RefusalError(0, "caller-gone", "the caller went away", flag=flags.CALLER_GONE)


def _note_grpc(exchange: Exchange, fields: Fields) -> None:
    """From the trailers, or where there is nothing else, from the head."""
    for name, value in fields:
        if name == b"grpc-status" and value.isdigit():
            exchange.grpc_status = value[:3].decode()


def _note(exchange: Exchange, refusal: RefusalError) -> None:
    exchange.flag, exchange.details, exchange.policy = refusal.flag, refusal.detail, refusal.policy
    if refusal.reason == "policy":
        exchange.details = "rbac_access_denied"


def _nothing() -> None: ...
