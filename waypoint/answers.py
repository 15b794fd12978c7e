"""What a caller is answered: by a waypoint itself, or by a backend through it."""

from __future__ import annotations

from typing import Final
from urllib.parse import quote

from control.api.filters import Filters
from control.api.route import NO_MODIFIER
from waypoint import cors
from waypoint import telemetry as flags
from waypoint.course import Course
from waypoint.destination import Destination
from waypoint.messages import NO_BODY, Fields, ResponseHead, length
from waypoint.refusal import REASONS, RefusalError, grpc_status
from waypoint.remembered import remembered
from waypoint.rewriting import location
from waypoint.routing import modified
from waypoint.telemetry import Exchange

OURS: Final = b"x-uproxy-"
"""What fields of ours begin with: nobody else's go on."""


def answered_here(filters: Filters, course: Course, destination: Destination) -> ResponseHead | None:
    """What no backend is asked for: where else to go, or what a browser may do."""
    assert course.permitted is not None
    if filters.cors is not None and cors.is_preflight(course.permitted):
        return cors.preflight(filters.cors, course.permitted)
    if filters.redirect is None:
        return None
    assert course.rule is not None
    where = location(filters.redirect, course.rule, course.permitted, destination.dialled_port)
    status = filters.redirect.status
    return answered(ResponseHead(status, REASONS[status], [(b"location", where.encode())], length(0)), course)


def answered(head: ResponseHead, course: Course) -> ResponseHead:
    """The head that the caller gets. Refusals with our reasons are ours alone."""
    fields = _others(head.fields)
    if course.rule is not None:
        from_backend = course.backend.response if course.backend is not None else NO_MODIFIER
        fields = modified(fields, from_backend, course.rule.response)
    if course.turn is not None and course.turn.cookie and not head.interim:
        fields = [*fields, (b"set-cookie", course.turn.cookie)]
    if course.added and not head.interim:
        fields = [*fields, *course.added]
    return ResponseHead(head.status, head.reason, _for_browsers(fields, course), head.framing)


@remembered
def _others(fields: Fields) -> Fields:
    """Those that are not ours: mostly all of them."""
    if not any(name.startswith(OURS) for name, _ in fields):
        return fields
    return [(name, value) for name, value in fields if not name.startswith(OURS)]


def _for_browsers(fields: Fields, course: Course) -> Fields:
    """With what pages of other origins may do, where the route says so."""
    if course.rule is None or course.rule.filters.cors is None or course.permitted is None:
        return fields
    return cors.answered(course.rule.filters.cors, course.permitted, fields)


def refused(refusal: RefusalError, course: Course) -> tuple[ResponseHead, bytes]:
    """Head and body for a request that this waypoint refuses."""
    if course.exchange.grpc:
        return _grpc_answer(refusal, course), b""
    text = refusal.detail.encode() + b"\n" if refusal.body is None else refusal.body
    kind = [(b"content-type", refusal.content_type)] if refusal.content_type else []
    fields = _for_browsers([*kind, *_refused_for(refusal, course)], course)
    framing = length(len(text)) if refusal.status not in (204, 304) else NO_BODY
    return ResponseHead(refusal.status, REASONS.get(refusal.status, b""), fields, framing), text


def _grpc_answer(refusal: RefusalError, course: Course) -> ResponseHead:
    """A status of its own, with neither body nor trailers (gRPC over HTTP/2: Trailers-Only)."""
    course.exchange.grpc_status = str(grpc_status(refusal.status))
    fields = [
        (b"content-type", b"application/grpc"),
        (b"grpc-status", course.exchange.grpc_status.encode()),
        (b"grpc-message", quote(refusal.detail, safe=" !\"#$&'()*+,/:;<=>?@[\\]^`{|}").encode()),
        *_refused_for(refusal, course),
    ]
    return ResponseHead(200, b"OK", fields)


def _refused_for(refusal: RefusalError, course: Course) -> Fields:
    """What programs are told."""
    fields = [
        (b"x-uproxy-reason", refusal.reason.encode()),
        (b"x-request-id", course.exchange.request_id.encode()),
        *refusal.fields,
    ]
    if refusal.policy:
        fields.append((b"x-uproxy-policy", refusal.policy.encode()))
    return fields


def note_grpc(exchange: Exchange, fields: Fields) -> None:
    """From the trailers, or where there is nothing else, from the head."""
    for name, value in fields:
        if name == b"grpc-status" and value.isdigit():
            exchange.grpc_status = value[:3].decode()


def expired(timeout_ms: int, *, retriable: bool = False) -> RefusalError:
    text = f"no whole response within {timeout_ms} ms"
    return RefusalError(504, "timeout", text, flag=flags.TIMED_OUT, retriable=retriable)


def caller_gone() -> RefusalError:
    return RefusalError(0, "caller-gone", "the caller went away", flag=flags.CALLER_GONE)
