"""A caller's request by HTTP/2: one stream of its connection."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from uproxy import hbone
from uproxy.hbone import ErrorCode
from uproxy.plane import Waiter
from waypoint import trailers
from waypoint.byte_stream import ByteStream
from waypoint.http2_connection import Http2Connection, Http2Stream
from waypoint.http2_heads import written_response, written_trailers
from waypoint.messages import Body, Ending, Fields, MessageError, RequestHead, ResponseEvent, ResponseHead
from waypoint.sides import STALL_TIMEOUT_S


class Http2Incoming:
    """In the manner of `sides.Incoming`."""

    __slots__ = ("_connection", "_left", "_stream", "head", "whole")

    def __init__(self, connection: Http2Connection, stream: hbone.Stream, head: RequestHead, *, ended: bool) -> None:
        self.head = head
        self.whole = ended
        self._connection = connection
        self._stream = Http2Stream(connection, stream)
        self._left = head.framing.length if head.framing.ending is Ending.LENGTH else None

    @property
    def on_gone(self) -> Callable[[], None]:
        return self._stream.on_gone

    @on_gone.setter
    def on_gone(self, callback: Callable[[], None]) -> None:
        self._stream.on_gone = callback

    @property
    def trailers(self) -> Fields:
        return trailers.kept(self._stream.trailers) if self._stream.trailers else ()

    async def body(self) -> bytes:
        if self.whole:
            return b""
        data = await self._stream.receive(STALL_TIMEOUT_S)
        if self._left is not None:
            self._left -= len(data)
            if self._left < 0 or (self._left and not data):
                raise MessageError(400, "a body that is not as long as its Content-Length says")
        self.whole = not data
        return data

    async def send(self, events: Sequence[ResponseEvent], *, close: bool = False) -> None:
        heads = iter([written_response(event) for event in events if isinstance(event, ResponseHead)])
        connection, stream = self._connection.connection, self._stream.stream
        last = len(events) - 1
        for index, event in enumerate(events):
            if isinstance(event, Body):
                if self.head.method != "HEAD":
                    await self._stream.send(event.data, STALL_TIMEOUT_S)
            elif not isinstance(event, ResponseHead):
                connection.end(stream, written_trailers(event.trailers))
            elif event.interim:
                connection.inform(stream, next(heads))
            else:
                ends = events[last]
                bare = index + 1 == last and not isinstance(ends, Body | ResponseHead) and not ends.trailers
                connection.respond(stream, next(heads), end=bare)
        self._connection.touch()
        if close:
            self._connection.retire()

    async def discard(self, reading: Waiter[None] | None) -> None:
        """Say so: the caller stops sending it."""
        self._stream.close()

    def switched(self) -> ByteStream:
        raise AssertionError("a request by HTTP/2 asks for no upgrade")

    def abort(self, text: str, code: ErrorCode = ErrorCode.INTERNAL_ERROR) -> None:
        self._stream.abort(text, code)
