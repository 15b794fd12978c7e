"""A caller's request by HTTP/2: one stream of its connection."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from uproxy import hbone
from uproxy.hbone import ErrorCode
from uproxy.plane import Waiter
from waypoint import trailers
from waypoint.byte_stream import ByteStream
from waypoint.http2_connection import Http2Connection, Http2Stream
from waypoint.http2_heads import written_response, written_trailers
from waypoint.messages import CHUNKED, Body, End, Ending, Fields, MessageError, RequestHead, ResponseEvent, ResponseHead
from waypoint.sides import STALL_TIMEOUT_S


class Http2Incoming:
    """In the manner of `sides.Incoming`."""

    __slots__ = ("_connection", "_left", "_stream", "head", "whole")

    def __init__(self, connection: Http2Connection, stream: hbone.Stream, head: RequestHead, *, ended: bool) -> None:
        self._left = head.framing.length if head.framing.ending is Ending.LENGTH else None
        if self._left == 0 and not ended:  # in HTTP/1.1 the request would be whole before its end has come
            head = replace(head, framing=CHUNKED)
        self.head = head
        self.whole = ended or bool(head.upgrades)  # what follows is the WebSocket's
        self._connection = connection
        self._stream = Http2Stream(connection, stream)

    @property
    def on_gone(self) -> Callable[[], None]:
        return self._stream.on_gone

    @on_gone.setter
    def on_gone(self, callback: Callable[[], None]) -> None:
        self._stream.when_gone(callback)  # it may have left in the turn in which the request came

    @property
    def trailers(self) -> Fields:
        return trailers.kept(self._stream.trailers) if self._stream.trailers else ()

    def at_hand(self, most: int) -> bytes:
        if self._stream.trailers or self._left == 0:
            return b""
        least = self._left or 1
        data = self._stream.at_hand(least, most if self._left is None else min(most, least))
        self.whole = bool(data)
        return data

    async def body(self) -> bytes:
        if self.whole:
            return b""
        data = await self._stream.receive(STALL_TIMEOUT_S)
        if self._left is not None:
            self._left -= len(data)
            if self._left < 0 or (self._left and not data):
                raise MessageError(400, "a body that is not as long as its Content-Length says")
            if not self._left and data:
                # In HTTP/1.1 this ends it: the stream's end must be here first.
                if await self._stream.receive(STALL_TIMEOUT_S):
                    raise MessageError(400, "a body that is longer than its Content-Length says")
                self.whole = True
                return data
        self.whole = not data
        return data

    async def send(self, events: Sequence[ResponseEvent], *, close: bool = False) -> None:
        heads = iter([written_response(event) for event in events if isinstance(event, ResponseHead)])
        connection, stream = self._connection.connection, self._stream.stream
        last = len(events) - 1
        for index, event in enumerate(events):
            if isinstance(event, Body):
                if self.head.method != "HEAD":
                    ends = events[last]
                    bare = index + 1 == last and isinstance(ends, End) and not ends.trailers
                    await self._stream.send(event.data, STALL_TIMEOUT_S, end=bare)
            elif not isinstance(event, ResponseHead):
                connection.end(stream, written_trailers(event.trailers))
            elif event.interim:
                connection.inform(stream, next(heads))
            else:
                ends = events[last]
                bare = index + 1 == last and not isinstance(ends, Body | ResponseHead) and not ends.trailers
                connection.respond(stream, next(heads), end=bare)
        self._connection.touch()
        if self.head.upgrades and isinstance(events[last], End):
            self._stream.close()  # no WebSocket: what its caller still sends is for nobody
        if close:
            self._connection.retire()

    async def discard(self, reading: Waiter[None] | None) -> None:
        """Say so: the caller stops sending it."""
        self._stream.close()

    def switched(self) -> ByteStream:
        return self._stream

    def abort(self, text: str, code: ErrorCode = ErrorCode.INTERNAL_ERROR) -> None:
        self._stream.abort(text, code)
