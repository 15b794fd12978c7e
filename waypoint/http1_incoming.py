"""A caller's HTTP/1.1 connection: requests one after the other, each with its body and its response."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Sequence

from uproxy.hbone import ErrorCode
from uproxy.plane import Waiter
from waypoint.byte_stream import ByteStream
from waypoint.http1_reader import RequestReader
from waypoint.http1_writer import ResponseWriter
from waypoint.messages import (
    UNREAD,
    Body,
    End,
    Fields,
    MessageError,
    RequestEvent,
    RequestHead,
    ResponseEvent,
    ResponseHead,
)
from waypoint.sides import DISCARD_TIMEOUT_S, HEAD_TIMEOUT_S, IDLE_TIMEOUT_S, MAX_DISCARDED, STALL_TIMEOUT_S


class Http1Incoming:
    """The connection, and in the manner of `sides.Incoming` the request on it that `next` has returned last."""

    __slots__ = (
        "_begun",
        "_continued",
        "_events",
        "_reader",
        "_stream",
        "_writer",
        "head",
        "pipelined",
        "trailers",
        "whole",
    )

    def __init__(self, stream: ByteStream, authority: bytes) -> None:
        """`authority` is what was dialled, for HTTP/1.0 without a Host."""
        self.head = UNREAD
        self.whole = True
        self.trailers: Fields = ()
        self.pipelined = False
        """Whether all of its head had come before the one before was answered: what it waited for is that answer."""
        self._stream = stream
        self._reader = RequestReader(authority)
        self._writer = ResponseWriter(self.head)
        self._events: deque[RequestEvent] = deque()
        self._begun = False  # there was a request
        self._continued = False  # its caller was told to go on with the body

    # -- the connection

    @property
    def quiet(self) -> bool:
        """Whether nothing of another request has come."""
        return self._reader.idle and self._stream.quiet

    @property
    def reusable(self) -> bool:
        """Whether another request may follow the one that was answered, and somebody would read its answer."""
        return self.whole and not self._writer.close and not self._stream.gone

    async def next(self) -> RequestHead | None:
        """The next request, once the last one is whole and answered; None when the caller ends well.

        Raises MessageError for what is no request, which may be answered; ConnectionResetError, TimeoutError.
        """
        self.pipelined = self._begun
        try:
            events = self._reader.proceed() if self._begun else []
            deadline = time.monotonic() + HEAD_TIMEOUT_S
            while not events:
                idle = self._reader.idle
                self.pipelined = self.pipelined and not self._stream.quiet
                data = await self._stream.receive(IDLE_TIMEOUT_S if idle else max(deadline - time.monotonic(), 0.0))
                if idle:
                    deadline = time.monotonic() + HEAD_TIMEOUT_S
                if not data:
                    self._reader.eof()
                    return None
                events = self._reader.feed(data)
        except MessageError:
            self._answer(UNREAD)
            raise
        head = events[0]
        assert isinstance(head, RequestHead)
        self._begun = True
        self._answer(head)
        self.whole = False
        self.trailers = ()
        self._events.extend(events[1:])
        if self._events and isinstance(self._events[0], End):
            self._events.clear()
            self.whole = True
        return head

    def _answer(self, head: RequestHead) -> None:
        self.head = head
        self._writer = ResponseWriter(head)
        self._continued = not head.expects_continue

    def turn_away(self) -> None:
        """Nothing: the answer to the next request will say so."""

    def retire(self) -> None:
        """Take no more requests: but one that has begun is answered."""
        if self.quiet:
            self._stream.close()

    def tick(self, now: float) -> None:
        """Nothing: whoever waits has a timeout."""

    def close(self) -> None:
        """End it well, unless it was aborted."""
        self._stream.close()

    # -- the request

    @property
    def on_gone(self) -> Callable[[], None]:
        return self._stream.on_gone

    @on_gone.setter
    def on_gone(self, callback: Callable[[], None]) -> None:
        self._stream.when_gone(callback)  # it may have left before it was asked for the request

    def at_hand(self, most: int) -> bytes:
        events = self._events
        if len(events) == 2 and isinstance(events[1], End) and not events[1].trailers:
            body = events[0]
            assert isinstance(body, Body)
            if len(body.data) <= most:
                events.clear()
                self.whole = True
                return body.data
        return b""

    async def body(self) -> bytes:
        while not self.whole:
            while self._events:
                event = self._events.popleft()
                if isinstance(event, Body):
                    return event.data
                assert isinstance(event, End)
                self.trailers = event.trailers
                self.whole = True
                return b""
            data = await self._stream.receive(STALL_TIMEOUT_S)
            if not data:
                self._reader.eof()
                raise MessageError(400, "the request was cut off")
            self._events.extend(self._reader.feed(data))
        return b""

    async def send(self, events: Sequence[ResponseEvent], *, close: bool = False) -> None:
        pieces: list[bytes] = []
        writer = self._writer
        for event in events:
            if isinstance(event, Body):
                pieces.append(writer.body(event.data))
            elif isinstance(event, ResponseHead):
                if event.interim:
                    self._continued = self._continued or event.status == 100
                # Who waits in vain for 100 (Continue) may send the body or not: nobody can tell where the next request
                # begins.
                pieces.append(writer.head(event, close=close or not (self._continued or self.whole)))
            else:
                pieces.append(writer.last(event.trailers))
        await self._stream.send(b"".join(pieces), STALL_TIMEOUT_S)

    async def discard(self, reading: Waiter[None] | None) -> None:
        """Read it, within bounds, so that its sender gets to read the answer: what still comes on a closed connection
        resets it, and the answer with it. It is not `whole` after that when it was too large.
        """
        timer = self._stream.carrier.plane.call_later(DISCARD_TIMEOUT_S, self._stream.close)
        try:
            if reading is not None:
                await reading
            left = MAX_DISCARDED
            with contextlib.suppress(MessageError, OSError):
                while left > 0 and (data := await self.body()):
                    left -= len(data)
        finally:
            timer.cancel()

    def switched(self) -> ByteStream:
        self._stream.put_back(self._reader.rest())
        return self._stream

    def abort(self, text: str, code: ErrorCode = ErrorCode.INTERNAL_ERROR) -> None:
        self._stream.abort(text)
