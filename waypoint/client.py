"""A caller's HTTP/1.1 connection: requests one after the other, each with its body."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from typing import Final

from waypoint.byte_stream import ByteStream
from waypoint.http1_messages import Body, End, MessageError, RequestEvent, RequestHead
from waypoint.http1_reader import RequestReader

IDLE_TIMEOUT_S: Final = 3600.0  # between two requests; Envoy's
HEAD_TIMEOUT_S: Final = 30.0  # from a head's first byte to its last
STALL_TIMEOUT_S: Final = 300.0  # Envoy's: a body that does not move, a response that does not come
MAX_DISCARDED: Final = 1 << 20
DISCARD_TIMEOUT_S: Final = 5.0
"""Of a body that nobody wants: how much of it is read, and for how long."""


class Client:
    """Reads from one stream; whoever answers writes to the stream itself."""

    __slots__ = ("_begun", "_events", "_reader", "stream", "whole")

    def __init__(self, stream: ByteStream, authority: bytes) -> None:
        """`authority` is what was dialled, for HTTP/1.0 without a Host."""
        self.stream = stream
        self.whole = True
        """Whether the last request's body has been read to its end."""
        self._reader = RequestReader(authority)
        self._events: deque[RequestEvent] = deque()
        self._begun = False  # there was a request

    @property
    def waits(self) -> bool:
        """Whether nothing of another request has come."""
        return self._reader.idle and self.stream.quiet

    async def head(self) -> RequestHead | None:
        """The next request, once the last one is whole; None when the caller ends well.

        Raises MessageError for what is no request, ConnectionResetError, TimeoutError.
        """
        events = self._reader.proceed() if self._begun else []
        deadline = time.monotonic() + HEAD_TIMEOUT_S
        while not events:
            idle = self._reader.idle
            data = await self.stream.receive(IDLE_TIMEOUT_S if idle else max(deadline - time.monotonic(), 0.0))
            if idle:
                deadline = time.monotonic() + HEAD_TIMEOUT_S
            if not data:
                self._reader.eof()
                return None
            events = self._reader.feed(data)
        head = events[0]
        assert isinstance(head, RequestHead)
        self._begun = True
        self.whole = False
        self._events.extend(events[1:])
        if self._events and isinstance(self._events[0], End):
            self._events.clear()
            self.whole = True
        return head

    async def body(self) -> bytes:
        """More of the body; empty at its end. Raises as `head` does."""
        while not self.whole:
            while self._events:
                event = self._events.popleft()
                if isinstance(event, Body):
                    return event.data
                self.whole = True
                return b""
            data = await self.stream.receive(STALL_TIMEOUT_S)
            if not data:
                self._reader.eof()
                raise MessageError(400, "the request was cut off")
            self._events.extend(self._reader.feed(data))
        return b""

    async def discard(self) -> None:
        """Read a body that nobody wants, within bounds, so that its sender gets to read the answer: what still comes on
        a closed connection resets it, and the answer with it. It is not `whole` after that when it was too large.
        """
        left = MAX_DISCARDED
        with contextlib.suppress(MessageError, OSError):
            while left > 0 and (data := await self.body()):
                left -= len(data)
