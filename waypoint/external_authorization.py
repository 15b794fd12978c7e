"""External authorization: a service of the mesh is asked over HTTP whether a request may pass.

It is what Istio calls `envoyExtAuthzHttp`, and Envoy the HTTP service of its filter `ext_authz`. It is asked as this
waypoint, over connections that are kept. What is no whole answer in time is none, and refuses.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Final

from control.api.extension import ExternalAuthorization
from control.api.identity import SpiffeId
from control.api.route import wrong_modified
from uproxy.errors import RefusedError
from uproxy.plane import Plane, Waiter
from uproxy.resolve import Hop
from uproxy.rules import text_matcher
from waypoint import telemetry as flags
from waypoint.authz import Allowed, Check
from waypoint.caller import Caller
from waypoint.course import Course
from waypoint.destination import Destinations
from waypoint.messages import Body, End, Fields, MessageError, RequestHead, ResponseHead, length
from waypoint.picking import Picker
from waypoint.read_ahead import ReadAhead
from waypoint.refusal import RefusalError
from waypoint.request import Request
from waypoint.sides import Outgoing
from waypoint.telemetry import WaypointTelemetry
from waypoint.upstream import Upstream

MAX_ANSWER: Final = 65_536
"""Bytes of an answer's body, which goes to the caller when it refuses; a longer one is no answer."""

_CONTINUE: Final = ResponseHead(100, b"Continue", ())
_ALWAYS: Final = ("location", "www-authenticate")  # Istio, headersToDownstreamOnDeny


class _NoAnswer(Exception):
    """The service has not answered; says why."""


class Authorizers:
    """Asks services for one waypoint."""

    def __init__(
        self,
        data_plane: Plane,
        identity: SpiffeId,
        destinations: Destinations,
        picker: Picker,
        upstream: Upstream,
        telemetry: WaypointTelemetry,
    ) -> None:
        """`identity`: of this waypoint, as which it asks."""
        self._plane = data_plane
        self._identity = identity
        self._destinations = destinations
        self._picker = picker
        self._upstream = upstream
        self._allowed = self._denied = self._failed = 0
        for name, text, read in (
            ("allowed", "Checks by external authorization that were answered with 200", lambda: self._allowed),
            ("denied", "Checks by external authorization that were answered otherwise", lambda: self._denied),
            ("failed", "Checks by external authorization without an answer", lambda: self._failed),
        ):
            telemetry.counter(f"uproxy_external_authorization_{name}_total", text, read)

    async def ask(self, check: Check, course: Course, request: Request) -> Allowed:
        """Raises RefusalError when it may not pass, or the caller left; RefusedError, OSError."""
        authorizer = check.authorizer
        if authorizer is None:
            raise RefusalError(403, "policy", "RBAC: access denied", policy=check.rule)
        body, partial = await self._read_ahead(authorizer, check, course)
        late = RefusalError(504, "timeout", f"no answer within {authorizer.timeout_ms} ms")
        timer = self._plane.call_later(authorizer.timeout_ms / 1000, lambda: course.miss(late))
        try:
            head = _head(authorizer, course, request, body, partial=partial)
            answer, text = await self._answer(authorizer, course, head, body)
            if answer.status >= 500:
                raise _NoAnswer(f"it answers {answer.status}")
        except (_NoAnswer, RefusalError) as error:
            if course.cause is not None:
                raise course.cause from None
            self._failed += 1
            if authorizer.fail_open:
                return Allowed()
            raise _refusal(check, authorizer.status_on_error, f"Service {authorizer.service}: {error}") from None
        finally:
            timer.cancel()
            course.missed = course.claim = None
            if course.outgoing is not None:
                course.outgoing.abort("the check is over")
                course.outgoing = None
        if answer.status != 200:
            self._denied += 1
            raise _denied(authorizer, check, answer, text)
        self._allowed += 1
        return Allowed(
            _taken(answer.fields, authorizer.upstream_on_allow), _taken(answer.fields, authorizer.downstream_on_allow)
        )

    async def _read_ahead(self, authorizer: ExternalAuthorization, check: Check, course: Course) -> tuple[bytes, bool]:
        """As much of the request's body as goes along, and whether there is more. Raises RefusalError, OSError."""
        request = course.request
        if not authorizer.body_bytes or request.whole:
            return b"", False
        if request.head.expects_continue:
            await request.send([_CONTINUE])
        pieces: list[bytes] = []
        size = 0
        try:
            while size <= authorizer.body_bytes and (data := await request.body()):
                pieces.append(data)
                size += len(data)
        except MessageError as error:
            raise RefusalError(error.status, "bad-request", str(error), flag=flags.MALFORMED) from None
        except TimeoutError:
            raise RefusalError(408, "timeout", "the request's body does not move", flag=flags.TIMED_OUT) from None
        except ConnectionResetError as error:
            raise course.broken(error) from None
        course.request = ReadAhead(request, pieces)
        if size > authorizer.body_bytes and not authorizer.partial_body:
            limit = f"a body of more than {authorizer.body_bytes} bytes cannot be checked"
            raise _refusal(check, 413, limit)
        return b"".join(pieces)[: authorizer.body_bytes], size > authorizer.body_bytes

    async def _answer(
        self, authorizer: ExternalAuthorization, course: Course, head: RequestHead, body: bytes
    ) -> tuple[ResponseHead, bytes]:
        """Its head and its body. Raises _NoAnswer, RefusalError when the request is stopped; RefusedError."""
        try:
            hops = await self._picker.of_service(authorizer.service, authorizer.port, course)
        except RefusedError as error:
            if error.reason == "shutting-down":
                raise
            raise _NoAnswer(str(error)) from None
        http2 = self._destinations.speaks_http2(authorizer.service, authorizer.port, False)
        fresh = False
        while True:
            outgoing = await self._open(course, hops, http2=http2, fresh=fresh)
            course.outgoing = outgoing
            try:
                await outgoing.begin(head, ended=not body)
                if body:
                    await outgoing.write(body)
                    await outgoing.end(())
                found = await _whole(outgoing)
            except ValueError as error:
                raise _NoAnswer(str(error)) from None
            except (OSError, MessageError) as error:
                course.outgoing = None
                outgoing.abort(str(error))
                stopped = course.cause or course.missed
                if stopped is not None:
                    raise stopped from None
                if fresh or not outgoing.replayable("GET"):  # to ask twice does no harm, whatever it is about
                    raise _NoAnswer(str(error)) from None
                fresh = True
                continue
            course.outgoing = None
            outgoing.done(uploaded=True)
            return found

    async def _open(self, course: Course, hops: tuple[Hop, ...], *, http2: bool, fresh: bool) -> Outgoing:
        """Raises _NoAnswer, RefusalError when the request is stopped; RefusedError."""
        address = self._upstream.source(hops[0].address) or hops[0].address
        caller = Caller(self._identity, address, 0)
        claim: Waiter[Outgoing] = Waiter(self._plane)
        course.claim = claim
        self._plane.spawn(self._upstream.outgoing(caller, hops, course.exchange, claim, http2=http2, fresh=fresh))
        try:
            outgoing = await claim
        except ConnectionResetError as error:
            raise course.broken(error) from None
        except RefusedError as error:
            if error.reason == "shutting-down":
                raise
            raise _NoAnswer(str(error)) from None
        finally:
            course.claim = None
        stopped = course.cause or course.missed
        if stopped is not None:  # it came in the turn in which the request was stopped
            outgoing.done(uploaded=True)
            raise stopped
        return outgoing


async def _whole(outgoing: Outgoing) -> tuple[ResponseHead, bytes]:
    """Raises MessageError, OSError."""
    head: ResponseHead | None = None
    body = bytearray()
    while True:
        for event in await outgoing.events():
            if isinstance(event, Body):
                body += event.data
                if len(body) > MAX_ANSWER:
                    raise MessageError(502, f"its answer has more than {MAX_ANSWER} bytes")
            elif isinstance(event, End):
                assert head is not None
                return head, bytes(body)
            elif not event.interim:
                head = event


def _head(
    authorizer: ExternalAuthorization, course: Course, request: Request, body: bytes, *, partial: bool
) -> RequestHead:
    """What the service is asked: about which request, and whose."""
    caller, exchange = course.caller, course.exchange
    added = {name.encode(): value.encode() for name, value in authorizer.added}
    fields: list[tuple[bytes, bytes]] = [(name, value) for name, value in request.fields if name == b"host"]
    fields += (field for field in _taken(request.fields, authorizer.checked) if field[0] not in added)
    fields += added.items()
    fields += (
        (b"x-forwarded-for", caller.address.encode()),
        (b"x-forwarded-client-cert", f"URI={caller.identity}".encode()),
    )
    for name, value in ((b"x-request-id", exchange.request_id.encode()), (b"traceparent", exchange.traceparent)):
        fields = [field for field in fields if field[0] != name]
        fields.append((name, value))
    if authorizer.body_bytes:
        fields.append((b"x-envoy-auth-partial-body", b"true" if partial else b"false"))
    # Envoy says so of a request without a body, too: whoever waits for one need not.
    return RequestHead(request.method, authorizer.path_prefix + request.target, fields, length(len(body)))


def _taken(fields: Fields, patterns: tuple[str, ...]) -> list[tuple[bytes, bytes]]:
    """Those whose names match, but for those that are ours to write."""
    matches = _matcher(patterns)
    return [(name, value) for name, value in fields if matches(text := name.decode()) and not wrong_modified(text)]


@functools.lru_cache(maxsize=256)
def _matcher(patterns: tuple[str, ...]) -> Callable[[object], bool]:
    return text_matcher(patterns)


def _refusal(
    check: Check, status: int, detail: str, fields: Fields = (), body: bytes | None = None, content_type: bytes = b""
) -> RefusalError:
    return RefusalError(
        status,
        "external-authorization",
        detail,
        flag=flags.UNAUTHORIZED,
        policy=check.rule,
        fields=fields,
        body=body,
        content_type=content_type,
    )


def _denied(authorizer: ExternalAuthorization, check: Check, answer: ResponseHead, text: bytes) -> RefusalError:
    """The answer, for the caller."""
    listed = (*authorizer.downstream_on_deny, *_ALWAYS) if authorizer.downstream_on_deny else ("*",)
    return _refusal(
        check,
        answer.status,
        f"Service {authorizer.service} answers {answer.status}",
        fields=[field for field in _taken(answer.fields, listed) if field[0] != b"content-type"],
        body=text,
        content_type=next((value for name, value in answer.fields if name == b"content-type"), b""),
    )
