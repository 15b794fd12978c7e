"""A request to a backend by HTTP/2: one stream of a connection that the caller's other requests share."""

from __future__ import annotations

from collections import deque
from dataclasses import replace

from uproxy import hbone
from uproxy.hbone import ErrorCode
from uproxy.header_block import Headers
from uproxy.plane import Waiter
from uproxy.resolve import Hop
from waypoint import telemetry as flags
from waypoint import trailers, websocket
from waypoint.byte_stream import ByteStream
from waypoint.connection_limits import Limiter
from waypoint.http2_connection import Http2Connection, Http2Stream
from waypoint.http2_heads import read_response, written_request, written_trailers
from waypoint.messages import END, Body, End, Ending, Fields, MessageError, RequestHead, ResponseEvent
from waypoint.refusal import RefusalError
from waypoint.sides import HEAD_TIMEOUT_S, IDEMPOTENT, STALL_TIMEOUT_S


class Http2Outgoing:
    """In the manner of `sides.Outgoing`."""

    __slots__ = (
        "_asking",
        "_connection",
        "_fresh",
        "_given_up",
        "_key",
        "_left",
        "_limiter",
        "_method",
        "_stream",
        "_upgrades",
        "hop",
    )

    def __init__(self, connection: Http2Connection, hop: Hop, limiter: Limiter | None = None, *, fresh: bool) -> None:
        """`fresh`: the connection has carried no request yet. `limiter` counts it."""
        self.hop = hop
        self._limiter = limiter
        self._connection = connection
        self._fresh = fresh
        self._stream: _ResponseStream | None = None
        self._method = ""
        self._upgrades = b""
        self._key = b""  # of the WebSocket that is asked for: callers that speak HTTP/1.1, and some others, have one
        self._left: int | None = None
        self._asking: Waiter[None] | None = None  # whether its server takes WebSockets
        self._given_up = ""  # why, before there was a stream

    @property
    def begun(self) -> bool:
        return self._stream is not None and self._stream.begun

    @property
    def room(self) -> int:
        return self._connection.room

    async def begin(self, head: RequestHead, *, ended: bool, body: bytes = b"") -> None:
        headers = written_request(head)
        if head.upgrades:
            await self._prepare(head)
        if not self._connection.usable:
            raise ConnectionResetError("the backend takes no more requests on this connection")
        self._method, self._upgrades = head.method, head.upgrades
        stream = self._connection.connection.open(headers, end=ended and not (body or head.upgrades))
        self._stream = _ResponseStream(self._connection, stream)
        self._connection.touch()
        if body:
            await self._stream.send(body, STALL_TIMEOUT_S, end=True)
        if self._limiter is not None:
            self._limiter.carries(self._connection)

    async def _prepare(self, head: RequestHead) -> None:
        """For a WebSocket. Raises RefusalError, TimeoutError, ConnectionResetError when it was given up meanwhile."""
        if head.upgrades != websocket.PROTOCOL:
            text = "the backend speaks HTTP/2, which takes WebSockets and no other upgrades"
            raise RefusalError(501, "bad-request", text, flag=flags.MALFORMED)
        self._key = websocket.key_of(head.fields)
        self._asking = Waiter(self._connection.plane)
        takes_websockets = await self._connection.takes_websockets(self._asking, HEAD_TIMEOUT_S)
        if self._given_up:  # in the turn in which the answer came
            raise ConnectionResetError(self._given_up)
        if not takes_websockets:
            text = "the backend speaks HTTP/2 without WebSockets (RFC 8441)"
            raise RefusalError(501, "bad-request", text, flag=flags.MALFORMED)

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
            head = read_response(headers, self._method, ended=stream.bodiless, upgrades=bool(self._upgrades))
            if head.switches:
                accepted = [(websocket.ACCEPT, websocket.accepted(self._key))] if self._key else []
                return [*events, replace(head, fields=[*head.fields, *accepted])]
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
        if self._limiter is not None:
            self._limiter.go_on()

    def switched(self) -> ByteStream:
        assert self._stream is not None
        return self._stream

    def abort(self, text: str) -> None:
        if self._stream is not None:
            self._stream.abort(text, ErrorCode.CANCEL)
        elif self._asking is not None:
            self._given_up = text
            self._asking.fail(ConnectionResetError(text))
        if self._limiter is not None:
            self._limiter.go_on()


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
