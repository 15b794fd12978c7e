"""The two sides of an exchange, as far as one request's life asks of them: what they speak is their own business."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, Protocol

from uproxy.hbone import ErrorCode
from uproxy.plane import Waiter
from uproxy.resolve import Hop
from waypoint.byte_stream import ByteStream
from waypoint.messages import Fields, RequestHead, ResponseEvent

IDLE_TIMEOUT_S: Final = 3600.0  # between two requests of a caller; Envoy's
HEAD_TIMEOUT_S: Final = 30.0  # from a head's first byte to its last
STALL_TIMEOUT_S: Final = 300.0  # Envoy's: a body that does not move, a response that does not come
HEAD_ROOM: Final = 16 << 10  # of a stream's window, for a head that a body leaves with
MAX_DISCARDED: Final = 1 << 20
DISCARD_TIMEOUT_S: Final = 5.0
"""Of a body that nobody wants: how much of it is read, and for how long."""

# RFC 9110 section 9.2.2: the same request twice does what it does once.
IDEMPOTENT: Final = frozenset({"GET", "HEAD", "OPTIONS", "TRACE", "PUT", "DELETE"})


class Incoming(Protocol):
    """A caller's request, and the way back for its response."""

    on_gone: Callable[[], None]
    """Called once when the caller takes no response any more."""

    @property
    def head(self) -> RequestHead: ...

    @property
    def whole(self) -> bool:
        """Whether the request's body has been read to its end."""

    @property
    def trailers(self) -> Fields:
        """What came behind the body and goes on, once that is whole."""

    def at_hand(self, most: int) -> bytes:
        """All of the body, if it is here, not longer and without trailers: it is `whole` then. Else nothing is read."""

    async def body(self) -> bytes:
        """More of the body; empty at its end.

        Raises MessageError for what is none, ConnectionResetError, TimeoutError. One coroutine reads at a time.
        """

    async def send(self, events: Sequence[ResponseEvent], *, close: bool = False) -> None:
        """Return when this much of the response is on its way. `close`: the caller should connect anew after it.

        Raises ValueError, and has sent nothing, for a head that no reader of ours would take; ConnectionResetError,
        TimeoutError.
        """

    async def discard(self, reading: Waiter[None] | None) -> None:
        """The response is whole, and nobody wants the rest of the body. `reading` is settled when nobody reads it."""

    def switched(self) -> ByteStream:
        """What it came on, after the response has said that HTTP ends here. It is the caller's of this from now on."""

    def abort(self, text: str, code: ErrorCode = ErrorCode.INTERNAL_ERROR) -> None:
        """End it so that nobody takes what was sent for the whole; `text` is for those who wait. Again: nothing.

        `code`: what HTTP/2 says of it.
        """


class Outgoing(Protocol):
    """A request to a backend, and its response. Whoever has it calls `done` or `abort`."""

    @property
    def hop(self) -> Hop: ...

    @property
    def begun(self) -> bool:
        """Whether anything of the response has come."""

    @property
    def room(self) -> int:
        """How much of a body can be sent with the head without waiting for the backend."""

    async def begin(self, head: RequestHead, *, ended: bool, body: bytes = b"") -> None:
        """Send the head; `ended`: with all of the body. Raises ConnectionResetError, TimeoutError.

        Raises ValueError, and has sent nothing, for a head that no reader of ours would take.
        """

    async def write(self, data: bytes) -> None:
        """Send more of the body. Raises ConnectionResetError, TimeoutError."""

    async def end(self, trailers: Fields) -> None:
        """The body is whole; trailers go on where that is safe. Raises ConnectionResetError, TimeoutError."""

    async def events(self) -> list[ResponseEvent]:
        """More of the response, at least one event. Raises MessageError, ConnectionResetError, TimeoutError."""

    def replayable(self, method: str) -> bool:
        """Now that it has failed: whether a new connection may carry the request without doing it twice."""

    def done(self, *, uploaded: bool) -> None:
        """The response is whole, or nothing was sent at all. `uploaded`: nobody still writes the request's body."""

    def switched(self) -> ByteStream:
        """As of the other side."""

    def abort(self, text: str) -> None:
        """Give it up; `text` is for those who wait. Again: nothing."""
