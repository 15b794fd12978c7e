"""An HTTP/2 connection (RFC 9113) inside of one CONNECT stream: a caller's, or one to a backend.

The frames are `uproxy.hbone`'s, with its limits against hostile peers. To its streams the connection is what a tunnel
is to a `ByteStream`. It takes whatever comes, and gives the CONNECT stream credit for it: what a stream's reader has
not taken is bounded by that stream's own window, so that a slow one stops itself and no other.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Final

from uproxy import hbone
from uproxy.hbone import (
    DataReceived,
    ErrorCode,
    InterimReceived,
    RequestReceived,
    ResponseReceived,
    SettingsReceived,
    StreamEnded,
    StreamReset,
    WindowOpened,
)
from uproxy.header_block import Headers
from uproxy.plane import Plane, Waiter
from uproxy.relay import NOBODY, StreamOwner, feed
from waypoint.byte_stream import ByteStream

MAX_STREAMS: Final = 256
STREAM_WINDOW: Final = 64 << 10
"""Of a stream whose reader has not kept up: as many of these as there are streams may wait here."""
OUTPUT_SIZE: Final = 32 << 10
LIMITS: Final = hbone.Limits(MAX_STREAMS, STREAM_WINDOW, header_table=4096, output=OUTPUT_SIZE, extended_connect=True)

OnRequest = Callable[["Http2Connection", hbone.Stream, Headers, bool], None]

log = logging.getLogger(__name__)


class Http2Stream(ByteStream):
    """Either end of a stream of an `Http2Connection`."""

    __slots__ = ("trailers",)

    def __init__(self, carrier: Http2Connection, stream: hbone.Stream) -> None:
        super().__init__(carrier, stream)
        self.trailers: Headers = ()
        stream.owner = self

    def abort(self, text: str, code: ErrorCode = ErrorCode.CANCEL) -> None:
        """`code`: a WebSocket's, by default, whose other side was reset (RFC 8441 section 5)."""
        super().abort(text, code)

    def on_interim(self, headers: Headers) -> None: ...

    def on_trailers(self, trailers: Headers) -> None:
        """The end comes next."""
        self.trailers = trailers


class Http2Connection:
    """Either end. `on_close` is called once, when it is gone."""

    def __init__(
        self,
        carrier: ByteStream,
        on_close: Callable[[Http2Connection], None],
        idle_timeout_s: float,
        on_request: OnRequest | None = None,
    ) -> None:
        """Take a stream over. `on_request`: the peer is the client. Raises ConnectionResetError."""
        self.plane: Plane = carrier.carrier.plane
        self.connection = hbone.Connection(client=on_request is None, limits=LIMITS)
        self.starved: dict[StreamOwner, None] = {}
        self.stream = carrier.stream
        self.closed = False
        self.idle_since = time.monotonic()
        self._carrier = carrier.carrier
        self._on_close = on_close
        self._idle_timeout_s = idle_timeout_s
        self._on_request = on_request
        self._introduced = False  # the peer's settings are known
        self._asking: list[Waiter[None]] = []
        """Who waits for them."""
        self._unsent = memoryview(b"")
        self._unread = b""  # work for later turns, for which the peer has no credit yet
        self._later = self.plane.postpone if on_request is None else self.plane.queue
        # Since when its first bytes, so many, have waited at most, and those behind them (monotonic seconds).
        self._first, self._since, self._since_behind = 0, 0.0, 0.0
        self._ended = False  # nothing comes behind that
        self._dirty = False
        self._retiring = False
        received, ended = carrier.hand_over(self)
        self.touch()
        if received:
            self.on_data(memoryview(received))
        if ended and not self.closed:
            self.on_end()

    # -- streams

    @property
    def quiet(self) -> bool:
        """Whether no request is under way."""
        return not self.connection.streams

    @property
    def usable(self) -> bool:
        """Whether another request may be sent."""
        return not self.closed and not self._retiring and self.connection.can_open

    async def takes_websockets(self, waiter: Waiter[None], timeout_s: float) -> bool:
        """Whether the server does, once its settings are known. Raises TimeoutError, or what the waiter fails with."""
        if not (self._introduced or self.closed):
            self._asking.append(waiter)
            await self.plane.wait(waiter, timeout_s)
        return self.connection.peer_extended_connect

    @property
    def waited_s(self) -> float:
        """How long what comes by it now has waited here for its turn, at most; longer, if it has waited on its way."""
        return time.monotonic() - self._since if self._since else 0.0

    @property
    def room(self) -> int:
        """Bytes that the peer takes now, on a new stream."""
        return self.connection.new_window

    def reset_stream(self, stream: hbone.Stream, code: ErrorCode) -> None:
        if not self.closed:
            self.connection.reset(stream, code)
            self.touch()

    # -- sending, as a tunnel does

    def touch(self) -> None:
        """There are frames to send, or a stream has ended: look at the end of the turn."""
        if not self._dirty:
            self._dirty = True
            self.plane.mark_dirty(self)

    def flush(self) -> None:
        self._dirty = False
        if self.closed:
            return
        if self.connection.overflowed:
            self._fail(hbone.OVERFLOW)
            return
        if self._unsent:
            return  # `on_room` goes on
        if self.connection.has_output:
            self._unsent = memoryview(b"".join(self.connection.output()))
            self.connection.sent()
            self._push()
        leaving = self._retiring or self.connection.goaway_received
        if leaving and not self._unsent and not self.connection.streams and not self.closed:
            self._finish()

    def _push(self) -> None:
        """Hand frames to the CONNECT stream, as many as it has room for."""
        outer, carrier, left = self.stream, self._carrier, self._unsent
        while left:
            room = carrier.connection.reserve(outer)
            if not room and outer.send_window > 0 and carrier.connection.send_window > 0:
                carrier.flush()
                if self.closed:
                    return
                room = carrier.connection.reserve(outer)
            if not room:
                carrier.starved[self] = None
                break
            length = min(len(room), len(left))
            room[:length] = left[:length]
            carrier.connection.commit(outer, length)
            carrier.touch()
            left = left[length:]
        self._unsent = left

    def on_room(self) -> None:
        self._push()
        if not self._unsent and not self.closed:
            feed(self.connection, self.starved)
            self.touch()

    # -- receiving

    def on_response(self, headers: Headers) -> None: ...

    def on_data(self, data: memoryview) -> None:
        if self._unread:
            self._unread += data
        else:
            self._parse(data)

    def on_end(self) -> None:
        """The peer has closed its side: requests that are whole are answered, all others are lost."""
        self._ended = True
        if not self._unread:
            self._retire_for_good()

    def on_reset(self, code: int, text: str = "") -> None:
        self._fail(text or "the peer's connection broke")

    def _parse(self, data: memoryview) -> None:
        try:
            self._dispatch(self.connection.receive(data))
        except hbone.ProtocolError as error:
            self._dispatch(error.events)
            self.shut_down(error.code, f"the peer broke HTTP/2: {error}")
            return
        if self.closed:
            return
        taken = len(data) - self.connection.unread
        self._carrier.connection.consumed(self.stream, taken, keeps_up=not self.connection.unread)
        self._carrier.touch()
        self._keep(bytes(data[taken:]), taken)
        if self._ended and not self._unread:
            self._retire_for_good()
        self.touch()

    def _keep(self, unread: bytes, taken: int) -> None:
        """Leave this for a later turn, if it is anything."""
        self._unread = unread
        if not unread:
            self._since = 0.0
            return
        self._first -= taken
        if not self._since or self._first <= 0:
            now = time.monotonic()
            self._first, self._since, self._since_behind = len(unread), self._since_behind if self._since else now, now
        self._later(self._go_on)

    def _go_on(self) -> None:
        if not self.closed:
            unread, self._unread = self._unread, b""
            self._parse(memoryview(unread))

    def _dispatch(self, events: list[hbone.Event]) -> None:
        for event in events:
            if self.closed:
                return
            if isinstance(event, DataReceived):
                event.stream.owner.on_data(event.data)
            elif isinstance(event, StreamEnded):
                if event.trailers and isinstance(event.stream.owner, Http2Stream):
                    event.stream.owner.on_trailers(event.trailers)
                event.stream.owner.on_end()
            elif isinstance(event, RequestReceived):
                assert self._on_request is not None
                event.stream.owner = NOBODY
                self._on_request(self, event.stream, event.headers, event.ended)
            elif isinstance(event, ResponseReceived):
                event.stream.owner.on_response(event.headers)
                if event.ended:
                    event.stream.owner.on_end()
            elif isinstance(event, WindowOpened):
                if event.stream is None:
                    feed(self.connection, self.starved)
                elif event.stream.owner in self.starved:
                    del self.starved[event.stream.owner]
                    event.stream.owner.on_room()
            elif isinstance(event, StreamReset):
                event.stream.owner.on_reset(event.code)
            elif isinstance(event, InterimReceived):
                if isinstance(event.stream.owner, Http2Stream):
                    event.stream.owner.on_interim(event.headers)
            elif isinstance(event, SettingsReceived):
                self._introduced = True
                self._wake()

    # -- the end

    def tick(self, now: float) -> None:
        """Called every few seconds."""
        try:
            self.connection.tick()
        except hbone.ProtocolError as error:
            self.shut_down(error.code, f"the peer is slow: {error}")
            return
        if self.connection.streams:
            self.idle_since = now
        elif now - self.idle_since > self._idle_timeout_s:
            self.retire()

    def turn_away(self) -> None:
        """Ask the peer to open no more streams; those that are on their way are taken."""
        if not self.closed and not self._retiring:
            self.connection.goaway(final=False)
            self.touch()

    def retire(self) -> None:
        """Take no more streams, and close when those that are open have ended."""
        if not self.closed and not self._retiring:
            self._retiring = True
            self.connection.goaway()
            self.touch()

    def close(self) -> None:
        """Close now, in order; streams that are open are lost."""
        self.shut_down(ErrorCode.NO_ERROR, "this proxy has closed the connection")

    def shut_down(self, code: ErrorCode, text: str) -> None:
        """Close now: GOAWAY, as far as the peer takes it, and the end."""
        if self.closed:
            return
        log.debug("%s", text)
        self.connection.goaway(code, text=text)
        self.flush()
        if self.closed:
            return
        if self._unsent:
            self._fail(text)
        else:
            self._lose(text)
            self._finish()

    def _retire_for_good(self) -> None:
        self._retiring = True
        for stream in [one for one in self.connection.streams.values() if not one.remote_closed]:
            self.connection.reset(stream, ErrorCode.CANCEL)
            stream.owner.on_reset(ErrorCode.CANCEL, "the peer closed the connection")
        self.touch()

    def _finish(self) -> None:
        """All was sent."""
        self._carrier.connection.end(self.stream)
        # Nothing more is read (RFC 9113 section 8.1). Nothing is sent when the peer has ended too.
        self._carrier.connection.reset(self.stream, ErrorCode.NO_ERROR)
        self._leave()

    def _fail(self, text: str) -> None:
        if not self.closed:
            self._carrier.reset_stream(self.stream, ErrorCode.CONNECT_ERROR)
            self._leave()
            self._lose(text)

    def _leave(self) -> None:
        self.closed = True
        self.stream.owner = NOBODY
        self._carrier.starved.pop(self, None)
        self._carrier.touch()
        self._wake()
        self._on_close(self)

    def _wake(self) -> None:
        for waiter in self._asking:
            waiter.set(None)
        self._asking.clear()

    def _lose(self, text: str) -> None:
        """Every stream ends as a reset, never as a clean end."""
        streams = list(self.connection.streams.values())
        self.connection.streams.clear()
        for stream in streams:
            stream.owner.on_reset(ErrorCode.CANCEL, text)
