"""A request to a backend by HTTP/2: one stream of a connection that the caller's other requests share."""

from __future__ import annotations

from collections import deque

from uproxy import hbone
from uproxy.hbone import ErrorCode
from uproxy.header_block import Headers
from uproxy.resolve import Hop
from waypoint import trailers
from waypoint.byte_stream import ByteStream
from waypoint.http2_connection import Http2Connection, Http2Stream
from waypoint.http2_heads import read_response, written_request, written_trailers
from waypoint.messages import END, Body, End, Ending, Fields, MessageError, RequestHead, ResponseEvent
from waypoint.sides import IDEMPOTENT, STALL_TIMEOUT_S


class Http2Outgoing:
    """In the manner of `sides.Outgoing`."""

    __slots__ = ("_connection", "_fresh", "_left", "_method", "_stream", "hop")

    def __init__(self, connection: Http2Connection, hop: Hop, *, fresh: bool) -> None:
        """`fresh`: the connection has carried no request yet."""
        self.hop = hop
        self._connection = connection
        self._fresh = fresh
        self._stream: _ResponseStream | None = None
        self._method = ""
        self._left: int | None = None

    @property
    def begun(self) -> bool:
        return self._stream is not None and self._stream.begun

    async def begin(self, head: RequestHead, *, ended: bool) -> None:
        headers = written_request(head)
        if not self._connection.usable:
            raise ConnectionResetError("the backend takes no more requests on this connection")
        self._method = head.method
        self._stream = _ResponseStream(self._connection, self._connection.connection.open(headers, end=ended))
        self._connection.touch()

    async def write(self, data: bytes) -> None:
        assert self._stream is not None
        await self._stream.send(data, STALL_TIMEOUT_S)

    async def end(self, trailers: Fields) -> None:
        assert self._stream is not None
        self._connection.connection.end(self._stream.stream, written_trailers(trailers))
        self._connection.touch()

    async def events(self) -> list[ResponseEvent]:
        stream = self._stream
        assert stream is not None
        await stream.something(STALL_TIMEOUT_S)
        events: list[ResponseEvent] = []
        while stream.heads:
            headers = stream.heads.popleft()
            head = read_response(headers, self._method, ended=stream.bodiless)
            events.append(head)
            if not head.interim:
                framing = head.framing
                self._left = framing.length if framing.ending is Ending.LENGTH else None
                if framing.ending is Ending.NONE:
                    self._left = 0
        if events and not stream.answered:
            return events
        data = b"" if stream.quiet else await stream.receive(None)
        if self._left is not None:
            self._left -= len(data)
            if self._left < 0 or (self._left and stream.over):
                raise MessageError(502, "a body that is not as long as its Content-Length says")
        if data:
            events.append(Body(data))
        if stream.over:
            events.append(End(trailers.kept(stream.trailers)) if stream.trailers else END)
        return events

    def replayable(self, method: str) -> bool:
        stream = self._stream
        if stream is None or stream.code == ErrorCode.REFUSED_STREAM:
            return True  # RFC 9113 section 8.7
        lost = self._connection.closed and stream.code is None
        return lost and not self._fresh and not stream.begun and method in IDEMPOTENT

    def done(self, *, uploaded: bool) -> None:
        """A body that nobody wants to its end is cancelled."""
        if self._stream is not None:
            self._stream.abort("the response is whole", ErrorCode.CANCEL)

    def switched(self) -> ByteStream:
        raise AssertionError("a request by HTTP/2 asks for no upgrade")

    def abort(self, text: str) -> None:
        if self._stream is not None:
            self._stream.abort(text, ErrorCode.CANCEL)


class _ResponseStream(Http2Stream):
    """The stream, from its beginning on."""

    __slots__ = ("answered", "begun", "heads")

    def __init__(self, carrier: Http2Connection, stream: hbone.Stream) -> None:
        super().__init__(carrier, stream)
        self.heads: deque[Headers] = deque()
        """That came and were not read yet."""
        self.begun = False
        """Whether any has come."""
        self.answered = False
        """Whether the one that is not interim has come."""

    @property
    def over(self) -> bool:
        """Whether the response is whole, and received."""
        return self._ended and not self._received

    @property
    def bodiless(self) -> bool:
        """Whether it is whole without a body and without trailers."""
        return self.over and not self._given and not self.trailers

    @property
    def code(self) -> int | None:
        """What the server's reset said, if there was one."""
        return self._code

    async def something(self, timeout_s: float) -> None:
        """Return when there is anything to read, a head included. Raises as `receive` does."""
        if not self.heads:
            await self.wait(timeout_s)

    def on_interim(self, headers: Headers) -> None:
        self.begun = True
        self.heads.append(headers)
        self._wake(self._reader)

    def on_response(self, headers: Headers) -> None:
        self.answered = True
        self.on_interim(headers)
