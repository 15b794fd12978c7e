"""An HTTP/1.1 connection to a backend: requests one after the other, over one CONNECT stream."""

from __future__ import annotations

from collections.abc import Callable

from uproxy.resolve import Hop
from waypoint.byte_stream import ByteStream
from waypoint.caller import Key
from waypoint.http1_reader import ResponseReader
from waypoint.http1_writer import RequestWriter
from waypoint.messages import Fields, RequestHead, ResponseEvent
from waypoint.sides import IDEMPOTENT, STALL_TIMEOUT_S


class Http1Outgoing:
    """The connection, and in the manner of `sides.Outgoing` the one request that it carries at a time."""

    __slots__ = ("_keep", "_reader", "_stream", "_uploading", "_used", "_writer", "hop", "idle_since", "key")

    def __init__(self, key: Key, hop: Hop, stream: ByteStream, keep: Callable[[Http1Outgoing], None]) -> None:
        """`keep` takes it when it can carry another request; `key` says whose, and to whom."""
        self.key = key
        self.hop = hop
        self.idle_since = 0.0
        self._stream = stream
        self._keep = keep
        self._reader = ResponseReader()
        self._writer = RequestWriter()
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

    async def begin(self, head: RequestHead, *, ended: bool) -> None:
        self._writer = RequestWriter()
        self._uploading = True
        sent = self._writer.head(head)
        if ended:  # which may be chunked nevertheless: what comes next would be its chunks
            sent += self._writer.end()
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
                return found

    def replayable(self, method: str) -> bool:
        """Its server closed it while the request was on its way: that says nothing of the request."""
        return self._used and not self._reader.begun and method in IDEMPOTENT

    def done(self, *, uploaded: bool) -> None:
        if self._reader.reusable and uploaded and not self._uploading:
            self._keep(self)
        else:
            self._stream.close()

    def switched(self) -> ByteStream:
        self._stream.put_back(self._reader.rest())
        return self._stream

    def abort(self, text: str) -> None:
        self._stream.abort(text)
