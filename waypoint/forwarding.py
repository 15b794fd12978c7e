"""A request to its backend and the beginning of what that answers: attempts, retries, mirrors, time limits."""

from __future__ import annotations

import contextlib
import os
import random
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from control.api.address import HBONE_PORT
from control.api.route import RouteRule
from uproxy.errors import RefusedError
from uproxy.plane import Plane, Waiter
from uproxy.resolve import Hop, host_port
from uproxy.telemetry import Peer
from waypoint import telemetry as flags
from waypoint.answers import OURS, answered, caller_gone, expired
from waypoint.connection_limits import PENDING_TIMEOUT_S, Limiter, Limiters
from waypoint.course import Course
from waypoint.forwarded import extended
from waypoint.messages import End, Fields, MessageError, RequestHead, ResponseEvent, ResponseHead
from waypoint.mirror import Mirrors
from waypoint.picking import Picker
from waypoint.refusal import SOON, RefusalError
from waypoint.remembered import remembered
from waypoint.request import Request
from waypoint.retry import Budgets, pause_s
from waypoint.rewriting import rewritten
from waypoint.routing import modified
from waypoint.sides import IDEMPOTENT, Outgoing
from waypoint.telemetry import Attempt, Exchange
from waypoint.turn import Hops
from waypoint.upstream import Upstream

_CALLERS: Final = frozenset({b"x-forwarded-for", b"x-forwarded-client-cert", b"x-request-id"})


class Forwarding:
    """Sends requests on."""

    def __init__(
        self, data_plane: Plane, picker: Picker, upstream: Upstream, mirrors: Mirrors, limiters: Limiters
    ) -> None:
        self._plane = data_plane
        self._picker = picker
        self._upstream = upstream
        self._mirrors = mirrors
        self._limiters = limiters
        self._random = random.Random()
        self._budgets = Budgets(time.monotonic)

    async def forward(self, course: Course, request: Request, hops: Hops) -> list[ResponseEvent]:
        """Send the request to a backend, again if its route says so; the beginning of what it answers.

        Raises RefusalError; OSError for the caller's stream.
        """
        rule, backend = course.rule, course.backend
        onward = _onward(course, request)
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
                    await course.request.send([answered(head, course) for head in heads])
                    events = await self.more(course)
                    heads = [event for event in events if isinstance(event, ResponseHead)]
                if not (heads[-1].status in retry.codes and await _repeatable(course) and budget.allows()):
                    return events
                _drop(course, events)
                course.exchange.failed(str(heads[-1].status), time.monotonic())
            except RefusalError as refusal:
                if not (refusal.retriable and await _repeatable(course) and budget.allows()):
                    raise
                course.exchange.failed(refusal.detail, time.monotonic())
            if course.attempt_timer is not None:
                course.attempt_timer.cancel()
            await course.pause(self._plane, pause_s(retry, tried, self._random))
            hops = self._picker.again(backend, course)
        self._limit_attempt(course, rule)
        return await self._attempt(course, onward, hops)

    def _limit_attempt(self, course: Course, rule: RouteRule) -> None:
        """From now on, in place of the limit of an earlier one."""
        if course.attempt_timer is not None:
            course.attempt_timer.cancel()
        course.missed = None
        if rule.backend_timeout_ms:
            missed = expired(rule.backend_timeout_ms, retriable=course.request.head.method in IDEMPOTENT)
            course.attempt_timer = self._plane.call_later(rule.backend_timeout_ms / 1000, lambda: course.miss(missed))

    async def _attempt(self, course: Course, onward: RequestHead, hops: Hops) -> list[ResponseEvent]:
        """Once, but for a connection that was stale. Raises RefusalError."""
        bodiless = course.request.whole and course.uploaded is None
        fresh = False
        while True:
            exchange = course.exchange
            exchange.attempts += 1
            if exchange.span:
                onward = _recorded(onward, exchange)
            outgoing = await self._connect(course, hops, fresh=fresh)
            began = time.monotonic() if exchange.measured else 0.0
            try:
                again = course.uploaded is not None
                body = b"" if bodiless or again or onward.upgrades else self._at_hand(course, outgoing)
                await outgoing.begin(onward, ended=bodiless or bool(body), body=body)
                if again:
                    for data in course.kept or ():
                        await outgoing.write(data)
                    await outgoing.end(course.request.trailers)
                elif course.uploaded is None and not bodiless:
                    course.uploaded = Waiter(self._plane)
                    self._plane.spawn(_upload(course, outgoing, course.uploaded))
                events = await outgoing.events()
                if exchange.measured:
                    exchange.upstream_s += time.monotonic() - began
                if course.turn is not None:
                    course.turn.read(events)
                return events
            except ValueError as error:  # with what is added to it, it is too large
                raise RefusalError(431, "bad-request", str(error), flag=flags.MALFORMED) from None
            except (OSError, MessageError) as error:
                outgoing.abort(str(error))
                course.outgoing = None
                stopped = course.cause is not None or course.missed is not None
                if bodiless and not fresh and not stopped and outgoing.replayable(onward.method):
                    fresh = True
                    exchange.failed(str(error), time.monotonic())
                    continue
                raise course.lost(error, begun=outgoing.begun) from None

    def _at_hand(self, course: Course, outgoing: Outgoing) -> bytes:
        """The request's body, if all of it has come: what can leave with the head costs nobody a turn of its own."""
        data = course.request.at_hand(outgoing.room)
        if data:
            course.exchange.received += len(data)
            course.pass_on(data)
            for copy in course.copies:
                copy.end()
            course.uploaded = Waiter(self._plane)
            course.uploaded.set(None)
        return data

    async def more(self, course: Course) -> list[ResponseEvent]:
        """What the backend answers further. Raises RefusalError."""
        assert course.outgoing is not None
        try:
            events = await course.outgoing.events()
            if course.turn is not None:
                course.turn.read(events)
            return events
        except (OSError, MessageError) as error:
            raise course.lost(error) from None

    async def _connect(self, course: Course, hops: Hops, *, fresh: bool) -> Outgoing:
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

    async def _open(self, course: Course, hops: Hops, *, fresh: bool) -> Outgoing:
        """Raises RefusalError."""
        limiter = self._limiters.at(course.exchange.backend_service or course.exchange.destination_service)
        if limiter is not None and not limiter.take(waited=False):
            kept = await self._room(course, limiter, hops[0])
            if kept is not None:
                return kept
        claim: Waiter[Outgoing] = Waiter(self._plane)
        course.claim = claim
        self._plane.spawn(
            self._upstream.outgoing(
                course.caller, hops, course.exchange, claim, http2=course.http2, fresh=fresh, limiter=limiter
            )
        )
        try:
            return await claim
        except ConnectionResetError as error:
            raise course.lost(error) from None
        except RefusedError as error:
            if error.reason == "shutting-down":
                raise
            if error.reason == "policy":  # the backend's uProxy judged the caller, too
                raise RefusalError(403, error.reason, "RBAC: access denied", policy=error.policy) from None
            unreachable = RefusalError(503, error.reason, str(error), flag=flags.BACKEND_UNREACHABLE, retriable=True)
            if course.turn is not None:
                course.turn.lost(unreachable)
            raise unreachable from None
        finally:
            course.claim = None

    async def _room(self, course: Course, limiter: Limiter, hop: Hop) -> Outgoing | None:
        """Wait until there is a connection to use, or room for one, which is taken then. Raises RefusalError."""
        timer = self._plane.call_later(
            PENDING_TIMEOUT_S, lambda: course.miss(_no_room("no connection to the service was free in time"))
        )
        waited = False
        try:
            while not waited or not limiter.take(waited=True):
                claim = limiter.line_up(waited=waited)
                if claim is None:
                    raise _no_room("too many requests wait for a connection to the service")
                waited = True
                course.claim = claim
                await claim
                if (stopped := course.cause or course.missed) is not None:
                    limiter.pass_on()
                    raise stopped
                kept = self._upstream.kept(course.caller, hop, http2=course.http2)
                if kept is not None:
                    limiter.pass_on()
                    return kept
        except ConnectionResetError as error:
            raise course.broken(error) from None
        finally:
            course.claim = None
            timer.cancel()
        return None


def _no_room(text: str) -> RefusalError:
    return RefusalError(503, "overload", text, flag=flags.TOO_MANY, fields=SOON)


def _onward(course: Course, request: Request) -> RequestHead:
    """The head that the backend gets: the path as it was judged, who calls said by nobody but us, and our span."""
    head, caller, exchange = course.request.head, course.caller, course.exchange
    target, fields = request.target, request.fields
    if course.rule is not None and course.backend is not None:
        fields = modified(fields, course.rule.request, course.backend.request)
        rewrite = course.backend.filters.rewrite or course.rule.filters.rewrite
        if rewrite is not None:
            target, fields = rewritten(rewrite, course.rule, target, fields)
    forwarded_for: str = caller.address
    if course.trusted_proxies:
        forwarded_for = extended(request.header("x-forwarded-for"), caller.address, course.trusted_proxies)
        exchange.forwarded_for = forwarded_for
    kept = [
        *_others(fields),
        (b"x-forwarded-for", forwarded_for.encode("latin-1")),
        (b"x-forwarded-client-cert", caller.certificate),
        (b"x-request-id", exchange.request_id.encode()),
    ]
    if exchange.span:
        kept = [(name, value) for name, value in kept if name != b"traceparent"]
        kept.append((b"traceparent", exchange.traceparent))
    return RequestHead(
        head.method,
        target,
        kept,
        head.framing,
        protocol=head.protocol,
        expects_continue=head.expects_continue,
        takes_trailers=head.takes_trailers,
        upgrades=head.upgrades,
    )


def _recorded(onward: RequestHead, exchange: Exchange) -> RequestHead:
    """The head of another attempt, which has a span of its own: whoever gets it goes on from that."""
    exchange.tries += (Attempt(os.urandom(8).hex(), time.monotonic()),)
    kept = [field for field in onward.fields if field[0] != b"traceparent"]
    return replace(onward, fields=[*kept, (b"traceparent", exchange.traceparent)])


@remembered
def _others(fields: Fields) -> Fields:
    """Those that we do not say ourselves."""
    return [(name, value) for name, value in fields if name not in _CALLERS and not name.startswith(OURS)]


def release(course: Course, outgoing: Outgoing) -> None:
    """The response is whole: what carried it can carry another request, or is closed."""
    course.outgoing = None
    course.over = True
    if course.turn is not None:
        course.turn.leave()
    outgoing.done(uploaded=course.uploaded is None or (course.uploaded.settled and course.request.whole))


async def _upload(course: Course, outgoing: Outgoing, uploaded: Waiter[None]) -> None:
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
        course.stop(caller_gone())
    except RefusedError as error:  # this proxy shuts down
        course.stop(RefusalError(503, error.reason, error.detail))
    finally:
        uploaded.set(None)


async def _repeatable(course: Course) -> bool:
    """Whether the request can be sent again: nobody wants it stopped, and none of its body was read, or all is here."""
    if course.cause is not None:
        return False
    if course.uploaded is None:
        return True
    if course.request.whole:
        await course.uploaded  # it has read the body's end, and may not have told so
    return course.request.whole and course.kept is not None


def _drop(course: Course, events: Sequence[ResponseEvent]) -> None:
    """An answer that the caller does not get."""
    assert course.outgoing is not None
    outgoing, course.outgoing = course.outgoing, None
    if isinstance(events[-1], End):
        outgoing.done(uploaded=True)
    else:
        outgoing.abort("sent again")
