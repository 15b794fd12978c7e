"""Filters that people add in Python: what they are told of requests and responses, and what is taken of their answers.

They are called where policy has let a request in and no route was looked for yet, so that what they write counts for
routes and cannot undo a refusal; and with the head of a backend's response.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from control.api.extension import EnvoyFilter, Filter, PythonFilter, type_of
from control.api.http_text import wrong_field_value
from control.api.route import wrong_modified
from uproxy.errors import RefusedError
from uproxy.plane import Plane, Waiter
from waypoint.course import Course
from waypoint.filter_pool import FilterError, FilterPool
from waypoint.messages import NO_BODY, Fields, ResponseHead, length
from waypoint.refusal import REASONS, RefusalError
from waypoint.request import Request
from waypoint.telemetry import WaypointTelemetry

MAX_HEADERS: Final = 100
"""That a filter may leave a head with: as many as any head has."""

_STATUSES: Final = range(200, 600)

log = logging.getLogger(__name__)

Told = list[tuple[str, str]]


class Filters:
    """Those of one process. Each has processes of its own, from its first request on."""

    def __init__(self, data_plane: Plane, telemetry: WaypointTelemetry, closed: Path | None) -> None:
        """`closed`: a directory that no filter is to open, if there is one."""
        self._plane = data_plane
        self._closed = closed
        self._pools: dict[PythonFilter, FilterPool] = {}
        self._failures = 0
        self._deaths = 0  # of processes of filters that are gone
        telemetry.counter(
            "uproxy_waypoint_filter_failures_total",
            "Calls of filters of Extensions that failed",
            lambda: self._failures,
        )
        telemetry.counter(
            "uproxy_waypoint_filter_restarts_total",
            "Processes of filters that died or were killed, and were replaced",
            lambda: self._deaths + sum(pool.deaths for pool in self._pools.values()),
        )

    async def on_request(
        self, course: Course, filters: tuple[Filter, ...], request: Request
    ) -> Request | tuple[ResponseHead, bytes]:
        """The request as they leave it, or what one of them answers. Raises RefusalError."""
        passed: list[PythonFilter] = []
        for what in filters:
            if isinstance(what, EnvoyFilter):
                raise RefusalError(
                    503,
                    "not-expressible",
                    f"the built-in engine cannot run Extension {what.extension} ({type_of(what)})",
                    policy=what.extension,
                )
            course.filters = tuple(reversed(passed))  # an answer is not the last one's to see
            passed.append(what)
            try:
                pool = self._pool(what)
                if not pool.on_request:
                    continue
                answer = await self._called(course, pool, _told(course, request))
                if answer[0] == "answer":
                    return _answer(*answer[1:])
                request = replace(request, fields=_left(request.fields, answer[1]))
            except (FilterError, ValueError, TypeError) as error:
                self._failed(course, what, error)
        course.filters = tuple(reversed(passed))
        return request

    async def on_response(self, course: Course, head: ResponseHead) -> ResponseHead:
        """The head as they leave it. Raises RefusalError."""
        assert course.permitted is not None
        for what in course.filters:
            try:
                pool = self._pool(what)
                if not pool.on_response:
                    continue
                told = [*_told(course, course.permitted), head.status, _read(head.fields)]
                answer = await self._called(course, pool, told)
                head = replace(head, fields=_left(head.fields, answer[1]))
            except (FilterError, ValueError, TypeError) as error:
                self._failed(course, what, error)
        return head

    async def _called(self, course: Course, pool: FilterPool, message: list[object]) -> list[Any]:
        """Raises FilterError, RefusalError."""
        claim: Waiter[list[Any]] = Waiter(self._plane)
        outgoing, course.outgoing = course.outgoing, None
        course.claim = claim
        self._plane.spawn(_ask(pool, message, claim))
        try:
            answer = await claim
        except ConnectionResetError as error:
            raise course.broken(error) from None
        finally:
            course.claim, course.outgoing = None, outgoing
        if (stopped := course.cause or course.missed) is not None:
            raise stopped
        return answer

    def _failed(self, course: Course, what: PythonFilter, error: Exception) -> None:
        """Raises RefusalError unless requests go on without it. What it says is for the log, and not for callers."""
        self._failures += 1
        log.info("%s: Extension %s: %s", course.exchange.request_id, what.extension, error)
        if not what.fail_open:
            raise RefusalError(503, "extension", "a filter of this waypoint failed", policy=what.extension)

    def _pool(self, what: PythonFilter) -> FilterPool:
        """Raises FilterError."""
        if not what.entry_point:
            raise FilterError(f"there is no Extension {what.extension}")
        pool = self._pools.get(what)
        if pool is None:
            pool = self._pools[what] = FilterPool(self._plane, what, self._closed)
        return pool

    def keep(self, wanted: Iterable[Filter]) -> None:
        """End the processes of all others, each when it is free."""
        kept = set(wanted)
        for what in [one for one in self._pools if one not in kept]:
            pool = self._pools.pop(what)
            self._deaths += pool.deaths
            pool.retire()

    def close(self) -> None:
        """End all processes now."""
        for pool in self._pools.values():
            self._deaths += pool.deaths
            pool.close()
        self._pools.clear()


async def _ask(pool: FilterPool, message: list[object], claim: Waiter[list[Any]]) -> None:
    try:
        claim.set(await pool.call(message))
    except (FilterError, RefusedError) as error:
        claim.fail(error)
    finally:
        # Nothing, if it was settled; whoever waits must learn of a bug, too.
        claim.fail(FilterError("a bug of this proxy; its log has the traceback"))


def _told(course: Course, request: Request) -> list[object]:
    """What `filter_child` makes an `extending.Request` of."""
    caller = course.caller
    facts = str(caller.identity), str(caller.address), course.exchange.request_id
    return [request.method, request.target, request.host, *facts, _read(request.fields)]


def _read(fields: Fields) -> Told:
    return [(name.decode("latin-1"), value.decode("latin-1")) for name, value in fields]


def _left(fields: Fields, told: Any) -> Fields:
    """The fields that a filter leaves. Raises ValueError or TypeError for what a waypoint does not let it write."""
    found = _written(told, known=frozenset(fields))
    before = [field for field in fields if wrong_modified(field[0].decode("latin-1"))]
    after = [field for field in found if wrong_modified(field[0].decode("latin-1"))]
    if before != after:
        names = {name.decode("latin-1") for name, _ in {*before, *after}}
        raise ValueError(f"it must leave as they are: {', '.join(sorted(names))}")
    return found


def _written(told: Any, known: frozenset[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """`known` are as right as they were. Raises ValueError or TypeError."""
    if not isinstance(told, list) or len(told) > MAX_HEADERS:
        raise ValueError(f"its headers must be a list of at most {MAX_HEADERS}")
    found: list[tuple[bytes, bytes]] = []
    for name, value in told:
        if not (isinstance(name, str) and isinstance(value, str)):
            raise TypeError("each header must be a name and a value, as text")
        field = (name.encode("latin-1"), value.encode("latin-1"))
        if field not in known:
            problem = wrong_modified(name) or (wrong_field_value(value) if value else "")
            if problem:
                raise ValueError(problem)
        found.append(field)
    return found


def _answer(status: Any, told: Any, body: Any) -> tuple[ResponseHead, bytes]:
    """Raises ValueError or TypeError."""
    if status not in _STATUSES or not isinstance(body, bytes):
        raise ValueError("its answer needs a status from 200 to 599, and a body of bytes")
    if body and status in (204, 304):
        raise ValueError(f"an answer with status {status} has no body")
    fields = _written(told, frozenset())
    framing = length(len(body)) if status not in (204, 304) else NO_BODY
    return ResponseHead(status, REASONS.get(status, b""), fields, framing), body
