"""One request's life at a waypoint, top to bottom, whatever its caller and its backend speak.

head -> authorise -> route -> pick -> forward -> relay both bodies -> record. All of it runs in the data plane's turns.
"""

from __future__ import annotations

import math
import os
import re
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from control.api.identity import SpiffeId
from control.api.route import RouteRule
from control.client.state import State
from uproxy import trace
from uproxy.connections import Connections, Live
from uproxy.directory import Directory
from uproxy.errors import RefusedError
from uproxy.listener import Asked
from uproxy.plane import Plane
from uproxy.relay import CLEAN
from uproxy.telemetry import Connection, Peer
from uproxy.trace import Traced
from waypoint import telemetry as flags
from waypoint.answers import answered, answered_here, caller_gone, expired, note_grpc, refused
from waypoint.authz import Check
from waypoint.caller import Caller
from waypoint.connection_limits import Limiters
from waypoint.course import Course
from waypoint.destination import Destination, Destinations
from waypoint.external_authorization import Authorizers
from waypoint.filters import Filters
from waypoint.forwarding import Forwarding, release
from waypoint.global_limits import GlobalLimits
from waypoint.grpc_messages import MessageCounter
from waypoint.messages import END, HTTP2, Body, End, Fields, MessageError, RequestHead, ResponseEvent, ResponseHead
from waypoint.mirror import Mirrors
from waypoint.picking import Picker
from waypoint.refusal import SOON, RefusalError, retry_after
from waypoint.remembered import remembered
from waypoint.request import Request, RequestError, read_request
from waypoint.rules import RuleBook, Rules
from waypoint.sides import Incoming, Outgoing
from waypoint.splice import Splice
from waypoint.telemetry import Exchange, WaypointTelemetry
from waypoint.tokens import TokenError
from waypoint.traffic import Excess, Place
from waypoint.upstream import Upstream

_INVALID_TOKEN: Final = ((b"www-authenticate", b'Bearer error="invalid_token"'),)  # RFC 6750 section 3
REQUEST_ID: Final = re.compile(rb"[A-Za-z0-9._-]{1,64}")
"""What is taken of `x-request-id`."""
_TIMED: Final = b"x-uproxy-server-timing"
"""A caller's request that has this field is answered with `server-timing`."""
_TRACE: Final = re.compile(r"(?!0{32})[0-9a-f]{32}")


class _Unasked(Exception):
    """Somebody is to be asked first about a request, as it goes on so far."""

    def __init__(self, check: Check, request: Request) -> None:
        super().__init__(check.rule)
        self.check = check
        self.request = request


class Exchanges:
    """Serves requests."""

    def __init__(
        self,
        data_plane: Plane,
        state: State,
        gateway: str,
        identity: SpiffeId,
        destinations: Destinations,
        rules: RuleBook,
        upstream: Upstream,
        limiters: Limiters,
        connections: Connections,
        telemetry: WaypointTelemetry,
        directory: Directory | None,
        closed: Path | None,
    ) -> None:
        """`gateway`: key of the Gateway. `identity`: of this process. `directory`: where to ask, if anywhere.

        `closed`: a directory that no filter is to open, if there is one.
        """
        self.draining = False
        """This process ends: callers are to connect anew."""
        self._plane = data_plane
        self._state = state
        self._gateway = gateway
        self._destinations = destinations
        self._rules = rules
        self._connections = connections
        self._telemetry = telemetry
        self._filters = Filters(data_plane, telemetry, closed)
        self._picker = Picker(data_plane, state, destinations, directory)
        self._authorizers = Authorizers(data_plane, identity, destinations, self._picker, upstream, telemetry)
        self._global_limits = GlobalLimits(data_plane, identity, destinations, upstream, telemetry)
        mirrors = Mirrors(data_plane, destinations, upstream)
        self._forwarding = Forwarding(data_plane, self._picker, upstream, mirrors, limiters)

    def config_changed(self) -> None:
        """What nobody asks for any more ends."""
        policies = self._state.traffic_policies()
        self._filters.keep(one for policy in policies for one in policy.filters)
        self._global_limits.keep(policy.redis for policy in policies if policy.redis is not None)

    def close(self) -> None:
        """Requests that are under way fail where a filter is asked."""
        self._filters.close()
        self._global_limits.close()

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
            await self._refuse(Course(request, caller, exchange), refusal)
        except (OSError, RefusedError) as failure:
            request.abort(str(failure))
        finally:
            self._telemetry.answered(exchange, time.monotonic())

    async def _serve(self, request: Incoming, caller: Caller, asked: Asked) -> None:
        """Raises RefusedError, OSError."""
        head = request.head
        exchange = self._begin(caller, head)
        course = Course(request, caller, exchange)
        request.on_gone = lambda: course.stop(caller_gone())
        try:
            if course.cause is not None:
                raise course.cause
            destination, rules = self._rules_for(asked)
            exchange.destination_service = destination.service_key
            exchange.dialled = asked.authority
            course.trusted_proxies = rules.trusted_proxies
            if head.upgrades and head.upgrades not in rules.upgrades:
                text = f"no TrafficPolicy lets requests upgrade to {head.upgrades.decode()}"
                raise RefusalError(501, "bad-request", text, flag=flags.MALFORMED, close=True)
            judged = _judged(head)
            course.still_permitted = lambda: self._still_permitted(course, asked, judged)
            exchange.path, exchange.authority = judged.target, judged.host
            if rules.policies.asks_others:
                destination, rules, permitted = await self._permitted_by_others(course, asked, judged)
            else:
                permitted = self._permitted(rules, course, destination, judged)
            course.permitted = permitted
            exchange.path = permitted.target
            if rules.filters:
                filtered = await self._filters.on_request(course, rules.filters, permitted)
                if not isinstance(filtered, Request):
                    await self._answer(course, *filtered)
                    return
                # It has waited: the policy that holds now counts.
                destination, rules, _ = await self._permitted_now(course, asked, judged)
                permitted = course.permitted = course.filtered = filtered
            rule = self._route(rules, caller, destination, permitted)
            course.place = self._let_through(rules, caller, permitted, rule)
            if rules.traffic.asks:
                questions = rules.traffic.questions(caller, permitted, rule.name if rule is not None else "")
                await self._global_limits.let_through(course, questions)
                # It has waited, as above.
                destination, rules, again = await self._permitted_now(course, asked, judged)
                permitted = course.permitted = course.filtered or again
                rule = self._route(rules, caller, destination, permitted)
            while True:
                course.rule = rule
                if rule is not None and (answer := answered_here(rule.filters, course, destination)) is not None:
                    await self._answer(course, answer)
                    return
                generation = self._state.generation
                self._limit(rule, course)
                await self._suffer(course)
                course.backend, hops = await self._picker.pick(rule, destination, course)
                if self._state.generation == generation:
                    break
                # It has waited: what holds now counts.
                destination, rules, again = await self._permitted_now(course, asked, judged)
                permitted = course.permitted = course.filtered or again
                before, rule = rule, self._route(rules, caller, destination, permitted)
                if rule == before:
                    break
            course.generation = self._state.generation
            backend = course.backend
            if backend is not None and (answer := answered_here(backend.filters, course, destination)) is not None:
                await self._answer(course, answer)
                return
            by_http2 = head.protocol == HTTP2
            if backend is None:
                course.http2 = by_http2 if destination.undeclared else destination.http2
            else:
                course.http2 = self._destinations.speaks_http2(backend.service, backend.port, by_http2)
            response = await self._forwarding.forward(course, permitted, hops)
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

    async def _permitted_now(
        self, course: Course, asked: Asked, request: Request
    ) -> tuple[Destination, Rules, Request]:
        """As `_permitted`, under what holds now. Raises RefusalError."""
        destination, rules = self._rules_for(asked)
        if rules.policies.asks_others:
            return await self._permitted_by_others(course, asked, request)
        return destination, rules, self._permitted(rules, course, destination, request)

    async def _permitted_by_others(
        self, course: Course, asked: Asked, request: Request
    ) -> tuple[Destination, Rules, Request]:
        """As `_permitted`, once all whom policies name were asked, under what holds by then. Raises RefusalError."""
        while True:
            destination, rules = self._rules_for(asked)
            try:
                return destination, rules, self._permitted(rules, course, destination, request)
            except _Unasked as unasked:
                found = await self._authorizers.ask(unasked.check, course, unasked.request)
                course.allowed = {**(course.allowed or {}), unasked.check.authorizer: found}
                course.added = [*course.added, *found.downstream]

    def _permitted(self, rules: Rules, course: Course, destination: Destination, request: Request) -> Request:
        """The request as it goes on.

        Raises RefusalError when its token is not valid, or no policy allows it, and _Unasked when others decide.
        """
        caller, exchange = course.caller, course.exchange
        try:
            token, onward = rules.tokens.verify(request)
        except TokenError as error:
            raise RefusalError(401, "token", str(error), fields=_INVALID_TOKEN) from None
        place = caller.identity, caller.address, destination.address, destination.dialled_port
        for check in rules.policies.checks(*place, onward, token) if rules.policies.asks_others else ():
            found = (course.allowed or {}).get(check.authorizer)
            if found is None:
                raise _Unasked(check, onward)
            onward = found.applied(onward)
        asked = (*place, onward, token)
        decision = rules.policies.decide(*asked)
        exchange.audit = decision.audit
        if (rehearsal := rules.policies.rehearsal) is not None:
            exchange.dry_run = self._telemetry.rehearsals.note(decision, rehearsal.decide(*asked))
        if not decision.allowed:
            raise RefusalError(403, "policy", "RBAC: access denied", policy=decision.policy or decision.reason)
        return onward

    def _still_permitted(self, course: Course, asked: Asked, request: Request) -> str:
        """Empty, or why a WebSocket that was permitted once must end."""
        try:
            destination, rules = self._rules_for(asked)
            self._permitted(rules, course, destination, request)
        except _Unasked as unasked:
            return f"policy: somebody else is to be asked now: {unasked.check.rule}"
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
            after = retry_after(math.ceil(found.wait_s))
            text = "local_rate_limited"  # Envoy's
            raise RefusalError(429, "rate-limited", text, flag=flags.RATE_LIMITED, policy=found.policy, fields=after)
        text = "too many requests are under way"
        raise RefusalError(503, "overload", text, flag=flags.TOO_MANY, policy=found.policy, fields=SOON)

    async def _suffer(self, course: Course) -> None:
        """What is done to a request on purpose, once. Raises RefusalError."""
        place = course.place
        if place is None:
            return
        delay_ms, place.delay_ms = place.delay_ms, 0
        if delay_ms:
            course.exchange.flag = flags.DELAYED
            await course.pause(self._plane, delay_ms / 1000)
        if place.status:
            raise RefusalError(place.status, "fault", "fault filter abort", flag=flags.ABORTED)

    def _limit(self, rule: RouteRule | None, course: Course) -> None:
        """From the request's beginning on, in place of the limit of an earlier rule."""
        if course.timer is not None:
            course.timer.cancel()
            course.timer = None
        if rule is None:
            return
        if rule.timeout_ms:
            left_s = course.exchange.started + rule.timeout_ms / 1000 - time.monotonic()
            course.timer = self._plane.call_later(left_s, lambda: course.stop(expired(rule.timeout_ms)))

    async def _relay(
        self,
        course: Course,
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
                    if exchange.response_messages is not None:
                        exchange.response_messages.add(event.data)
                elif isinstance(event, ResponseHead):
                    event = answered(event, course)
                    if not event.interim:
                        if course.filters:
                            event = await self._filters.on_response(course, event)
                        if exchange.timed:
                            event = _timed(event, exchange)
                        exchange.status = event.status
                        answering = True
                        if exchange.grpc:
                            note_grpc(exchange, event.fields)
                elif exchange.grpc:
                    note_grpc(exchange, event.trailers)
                answer.append(event)
            whole = isinstance(answer[-1], End)
            if whole:
                release(course, outgoing)
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
            events = await self._forwarding.more(course)
        if not request.whole:
            await request.discard(course.uploaded)

    async def _switch(self, course: Course, outgoing: Outgoing) -> None:
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
        # What has changed since it was permitted was told to those in `_connections` alone.
        if self._state.generation != course.generation and (refusal := course.still_permitted()):
            splice.cut(refusal)
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
        return self.draining or self._destinations.are_left(destination)

    async def _refuse(self, course: Course, refusal: RefusalError) -> None:
        """Raises OSError."""
        _note(course.exchange, refusal)
        head, text = refused(refusal, course)
        await self._answer(course, head, text, close=refusal.close)

    async def _answer(self, course: Course, head: ResponseHead, text: bytes = b"", *, close: bool = False) -> None:
        """Answer by itself. Raises OSError."""
        request, exchange = course.request, course.exchange
        exchange.status = head.status
        if request.head.method != "HEAD":
            exchange.sent = len(text)
        course.over = True
        course.answering = True
        if exchange.timed:
            head = _timed(head, exchange)
        events = (head, Body(text), END) if text else (head, END)
        await request.send(events, close=self.draining or close)
        if not request.whole:
            await request.discard(course.uploaded)

    # -- records

    def _begin(self, caller: Caller, head: RequestHead | None) -> Exchange:
        said = _said(head.fields) if head is not None else _SILENT
        exchange = Exchange(
            source=caller.peer(self._state),
            destination=_NOBODY,
            started=time.monotonic(),
            request_id=said.request_id or os.urandom(16).hex(),
            method=head.method if head is not None else "",
            path=head.target if head is not None else "",
            protocol=head.protocol if head is not None else "",
            user_agent=said.user_agent,
            grpc=said.grpc,
            timed=said.timed,
        )
        if said.grpc:
            exchange.request_messages, exchange.response_messages = MessageCounter(), MessageCounter()
        self._place_in_trace(exchange, said)
        self._telemetry.began(exchange)
        return exchange

    def _place_in_trace(self, exchange: Exchange, said: _Said) -> None:
        """A request that its caller records goes on in that trace; of others, a share begins one here."""
        given, spans = said.trace, self._telemetry.spans
        if given is not None and given.span:
            exchange.trace, exchange.parent_span = given.trace, given.span
            recorded = spans is not None
        else:
            named = exchange.request_id
            if said.request_id:
                named = named.replace("-", "").lower()  # mostly a UUID, where the caller has chosen it
                named = named if _TRACE.fullmatch(named) else os.urandom(16).hex()
            exchange.trace = named
            recorded = given is None and spans is not None and spans.draws()
        if recorded:
            exchange.span = os.urandom(8).hex()


def _timed(head: ResponseHead, exchange: Exchange) -> ResponseHead:
    return replace(head, fields=[*head.fields, (b"server-timing", exchange.server_timing(time.monotonic()))])


@dataclass(frozen=True, slots=True)
class _Said:
    """What records take of a request's fields."""

    request_id: str = ""
    """Empty where none is given, or another than we take."""
    user_agent: str = ""
    grpc: bool = False
    timed: bool = False
    trace: Traced | None = None


_SILENT: Final = _Said()
_NOBODY: Final = Peer("")


@remembered
def _said(fields: Fields) -> _Said:
    first = dict(reversed(fields))
    given = first.get(b"x-request-id", b"")
    spans = [value for name, value in fields if name == b"traceparent"]
    return _Said(
        given.decode() if REQUEST_ID.fullmatch(given) else "",
        first.get(b"user-agent", b"").decode("latin-1"),
        is_grpc(first.get(b"content-type", b"")),
        _TIMED in first,
        trace.read(spans[0]) if len(spans) == 1 else None,
    )


def is_grpc(kind: bytes) -> bool:
    """By its content type; gRPC-Web is another protocol."""
    return kind.startswith(b"application/grpc") and kind[16:17] in (b"", b"+", b";")


def _judged(head: RequestHead) -> Request:
    """Raises RefusalError for a request that two parsers could read differently."""
    try:
        return read_request(head.method, head.target, head.fields)
    except RequestError as error:
        raise RefusalError(400, "bad-request", str(error), flag=flags.MALFORMED) from None


def _note(exchange: Exchange, refusal: RefusalError) -> None:
    exchange.flag, exchange.details, exchange.policy = refusal.flag, refusal.detail, refusal.policy
    if refusal.reason == "policy":
        exchange.details = "rbac_access_denied"


def _nothing() -> None: ...
