"""Refuses requests while this process has more to do than it can, for as little work as a refusal may take.

It comes before everything else that is done for a request: what is spent on a refusal is missing for those that are
served. The answer has no body.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Hashable
from typing import Final

from uproxy.hbone import ErrorCode, Stream
from uproxy.header_block import Headers
from uproxy.plane import Plane
from uproxy.telemetry import Peer
from waypoint import telemetry as flags
from waypoint.exchange import REQUEST_ID, is_grpc
from waypoint.http2_connection import Http2Connection
from waypoint.messages import END, HTTP2, NO_BODY, ResponseHead
from waypoint.overload import Overload
from waypoint.refusal import REASONS, SOON, grpc_status
from waypoint.sides import Incoming
from waypoint.telemetry import Exchange, WaypointTelemetry

_STATUS: Final = 503
_WHY: Final = "overload"
_FIELDS: Final = ((b"x-uproxy-reason", _WHY.encode()), *SOON)
_ANSWER: Final = ((b":status", b"%d" % _STATUS), *_FIELDS, (b"content-length", b"0"))
_GRPC_STATUS: Final = str(grpc_status(_STATUS))
_GRPC_ANSWER: Final = (
    (b":status", b"200"),
    (b"content-type", b"application/grpc"),
    (b"grpc-status", _GRPC_STATUS.encode()),
    (b"grpc-message", _WHY.encode()),
    *_FIELDS,
)
_NOBODY: Final = Peer("")


class Shedding:
    """Of one process."""

    def __init__(self, data_plane: Plane, telemetry: WaypointTelemetry) -> None:
        self._overload = Overload(data_plane, time.monotonic, random.Random())
        self._telemetry = telemetry
        telemetry.counter(
            "uproxy_waypoint_shed_requests_total",
            "Requests refused because this process had too much to do",
            lambda: self._overload.refused,
        )

    def sheds(self, *ways: tuple[Hashable, float | None]) -> bool:
        """Whether a request that comes now is refused. `ways`: as `Overload.sheds` is told them."""
        return self._overload.sheds(time.monotonic(), self._telemetry.under_way + 1, *ways)

    def forget(self, way: Hashable) -> None:
        """Nothing comes by it any more."""
        self._overload.forget(way)

    async def refuse(self, request: Incoming, source: Peer, service: str) -> None:
        """Refuse one of HTTP/1.1. Raises OSError, RefusedError."""
        head = request.head
        fields = dict(head.fields)
        identifier = self._note(source, service, head.method, head.target, head.protocol, fields, grpc=False)
        answer = ResponseHead(_STATUS, REASONS[_STATUS], [*_FIELDS, (b"x-request-id", identifier)], NO_BODY)
        await request.send((answer, END))
        if not request.whole:
            await request.discard(None)

    def refuse_stream(
        self, connection: Http2Connection, stream: Stream, headers: Headers, source: Peer, service: str
    ) -> None:
        """Refuse one of HTTP/2."""
        fields = dict(headers)
        grpc = is_grpc(fields.get(b"content-type", b""))
        method, path = fields.get(b":method", b"").decode("latin-1"), fields.get(b":path", b"").decode("latin-1")
        identifier = self._note(source, service, method, path, HTTP2, fields, grpc=grpc)
        answer = _GRPC_ANSWER if grpc else _ANSWER
        connection.connection.respond(stream, (*answer, (b"x-request-id", identifier)), end=True)
        connection.connection.reset(stream, ErrorCode.NO_ERROR)  # of what its caller still sends nothing is wanted
        connection.touch()

    def _note(
        self,
        source: Peer,
        service: str,
        method: str,
        path: str,
        protocol: str,
        fields: dict[bytes, bytes],
        *,
        grpc: bool,
    ) -> bytes:
        """Count it, and log it. The request's id."""
        now = time.monotonic()
        given = fields.get(b"x-request-id", b"")
        identifier = given.decode() if REQUEST_ID.fullmatch(given) else os.urandom(16).hex()
        exchange = Exchange(
            source=source,
            destination=_NOBODY,
            started=now,
            request_id=identifier,
            destination_service=service,
            method=method,
            path=path,
            authority=fields.get(b":authority", fields.get(b"host", b"")).decode("latin-1"),
            protocol=protocol,
            user_agent=fields.get(b"user-agent", b"").decode("latin-1"),
            grpc=grpc,
            grpc_status=_GRPC_STATUS if grpc else "",
            status=200 if grpc else _STATUS,
            flag=flags.OVERLOADED,
            details=_WHY,
        )
        self._telemetry.answered(exchange, now)
        return identifier.encode()
