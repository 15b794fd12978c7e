"""An HTTP/1.1 connection to a backend: requests one after the other, over one CONNECT stream."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from uproxy.resolve import Hop
from waypoint import websocket
from waypoint.byte_stream import ByteStream
from waypoint.caller import Key
from waypoint.connection_limits import Limiter
from waypoint.http1_reader import ResponseReader
from waypoint.http1_writer import RequestWriter
from waypoint.messages import HTTP2, Fields, MessageError, RequestHead, ResponseEvent, ResponseHead
from waypoint.sides import HEAD_ROOM, IDEMPOTENT, STALL_TIMEOUT_S


class Http1Outgoing:
    """The connection, and in the manner of `sides.Outgoing` the one request that it carries at a time."""

    __slots__ = (
        "_keep",
        "_key",
        "_left",
        "_made",
        "_reader",
        "_stream",
        "_uploading",
        "_used",
        "_writer",
        "hop",
        "idle_since",
        "key",
        "limiter",
    )

    def __init__(
        self,
        key: Key,
        hop: Hop,
        stream: ByteStream,
        keep: Callable[[Http1Outgoing], None],
        limiter: Limiter | None = None,
    ) -> None:
        """`keep` takes it when it can carry another request; `key` says whose, and to whom; `limiter` counts it."""
        self.key = key
        self.hop = hop
        self.idle_since = 0.0
        self.limiter = limiter
        self._left = limiter.limits.requests_each if limiter is not None else 0  # requests; 0: any number, or the last
        self._stream = stream
        self._keep = keep
        self._reader = ResponseReader()
        self._writer = RequestWriter()
        self._key = b""  # of the WebSocket that is asked for, if its caller speaks HTTP/2
        self._made = False  # the key is ours
        self._used = False  # it has carried a request: then its server may close it just when the next one comes
        self._uploading = False

    # -- the connection

    @property
    def quiet(self) -> bool:
        """Whether its server has said nothing unasked, mostly that it closes."""
        return self._stream.quiet

    @property
    def on_gone(self) -> Callable[[], None]:
        return self._stream.on_gone

    @on_gone.setter
    def on_gone(self, callback: Callable[[], None]) -> None:
        self._stream.on_gone = callback

    def close(self) -> None:
        self._stream.close()

    # -- the request

    @property
    def begun(self) -> bool:
        return self._reader.begun

    @property
    def room(self) -> int:
        return self._stream.window - HEAD_ROOM

    async def begin(self, head: RequestHead, *, ended: bool, body: bytes = b"") -> None:
        self._key = b""
        if head.upgrades == websocket.PROTOCOL and head.protocol == HTTP2:
            self._key = websocket.key_of(head.fields)
            self._made = not self._key
            if self._made:
                self._key = websocket.new_key()
                head = replace(head, fields=[*head.fields, (websocket.KEY, self._key)])
        self._writer = RequestWriter()
        self._uploading = True
        sent = self._writer.head(head)
        if ended:  # which may be chunked nevertheless: what comes next would be its chunks
            sent += self._writer.body(body) + self._writer.end()
            self._uploading = False
        self._reader.expect(head.method, upgrades=head.upgrades)
        await self._stream.send(sent, STALL_TIMEOUT_S)

    async def write(self, data: bytes) -> None:
        await self._stream.send(self._writer.body(data), STALL_TIMEOUT_S)

    async def end(self, trailers: Fields) -> None:
        """Without the trailers: an application might merge them into the head, which was judged without them."""
        self._uploading = False
        await self._stream.send(self._writer.end(), STALL_TIMEOUT_S)

    async def events(self) -> list[ResponseEvent]:
        while True:
            data = await self._stream.receive(STALL_TIMEOUT_S)
            found = self._reader.feed(data) if data else self._reader.eof()
            if found:
                self._used = True
                return [self._agreed(event) for event in found] if self._key else found

    def _agreed(self, event: ResponseEvent) -> ResponseEvent:
        """Raises MessageError for what its caller would take for the beginning of a WebSocket, and is none."""
        if not isinstance(event, ResponseHead):
            return event
        if event.switches:
            said = [value for name, value in event.fields if name == websocket.ACCEPT]
            if said != [websocket.accepted(self._key)]:
                raise MessageError(502, "a WebSocket that answers another key")
            return replace(event, fields=websocket.without_accept(event.fields)) if self._made else event
        if 200 <= event.status < 300:
            raise MessageError(502, "no WebSocket, but a response")
        return event

    def replayable(self, method: str) -> bool:
        """Its server closed it while the request was on its way: that says nothing of the request."""
        return self._used and not self._reader.begun and method in IDEMPOTENT

    def done(self, *, uploaded: bool) -> None:
        if self._reader.reusable and uploaded and not self._uploading and not self._worn_out():
            self._keep(self)
        else:
            self._stream.close()

    def _worn_out(self) -> bool:
        """Whether it has carried as many requests as it may."""
        if not self._left:
            return False
        self._left -= 1
        return not self._left

    def switched(self) -> ByteStream:
        self._stream.put_back(self._reader.rest())
        return self._stream

    def abort(self, text: str) -> None:
        self._stream.abort(text)
