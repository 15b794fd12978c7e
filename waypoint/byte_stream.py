"""One CONNECT stream as bytes to receive and to send, for code that reads them itself instead of relaying a socket.

It stands where a `Relay` with its application's socket stands in a uProxy, and keeps the same promises: a peer gets
credit only for bytes that were dealt with (asking for more says so), sending waits for room in the stream, the tunnel
and its output buffer, and a reset is never an end. All of it belongs to the data plane's turns.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol, Self, TypeVar

from uproxy import hbone, plane
from uproxy.hbone import ErrorCode
from uproxy.header_block import Headers
from uproxy.relay import NOBODY, Relay, StreamOwner

T = TypeVar("T")


class Frames(Protocol):
    """Where what is sent on a stream goes, as `hbone.Connection` has it."""

    @property
    def send_window(self) -> int: ...

    def reserve(self, stream: hbone.Stream) -> memoryview: ...

    def commit(self, stream: hbone.Stream, length: int, *, end: bool = False) -> None: ...

    def write(self, stream: hbone.Stream, data: bytes, *, end: bool = False) -> bool: ...

    def end(self, stream: hbone.Stream) -> None: ...

    def reset(self, stream: hbone.Stream, code: ErrorCode) -> None: ...

    def consumed(self, stream: hbone.Stream, length: int, *, keeps_up: bool) -> None: ...


class Carrier(Protocol):
    """What a stream is on: a tunnel, an HTTP/2 connection inside of such a stream, or a socket that is all of it."""

    plane: plane.Plane
    starved: dict[StreamOwner, None]

    @property
    def connection(self) -> Frames: ...

    @property
    def waited_s(self) -> float:
        """How long what comes by it now has waited there for its turn, at most."""

    def touch(self) -> None: ...

    def flush(self) -> None: ...

    def reset_stream(self, stream: hbone.Stream, code: ErrorCode) -> None: ...


class StreamError(ConnectionResetError):
    """The stream is lost. `code`: what the peer's reset said, if there was one."""

    def __init__(self, text: str, code: int | None) -> None:
        super().__init__(text)
        self.code = code


class ByteStream:
    """Either end of a stream. One coroutine receives and one sends, at a time each.

    Invariant: whoever has it calls `close` or `abort`, whatever else happens; the stream is over after that.
    """

    __slots__ = (
        "_code",
        "_connection",
        "_deaf",
        "_ended",
        "_error",
        "_given",
        "_reader",
        "_received",
        "_writer",
        "carrier",
        "on_gone",
        "on_over",
        "stream",
    )

    def __init__(self, carrier: Carrier, stream: hbone.Stream) -> None:
        """Whoever makes it makes it the stream's owner."""
        self.carrier = carrier
        self.stream = stream
        self.on_gone: Callable[[], None] = _ignore
        """Called once when the peer reads no more: the stream is lost, or whole and not wanted any longer."""
        self.on_over: Callable[[], None] = _ignore
        """Called once, when it is over for both sides; not by who took it over."""
        self._connection = carrier.connection
        self._error = ""  # why it is lost; empty while it is not
        self._code: int | None = None
        self._deaf = False  # the peer reads no more
        self._given = 0  # bytes that the receiver has, and for which the peer has no credit yet
        self._reader: plane.Waiter[None] | None = None
        self._writer: plane.Waiter[None] | None = None
        self._received = bytearray()
        self._ended = False

    @classmethod
    def of(cls, relay: Relay) -> Self:
        """Take over a stream that was answered with 200. Raises ConnectionResetError when it is gone already."""
        stream = cls(relay.tunnel, relay.stream)
        received, ended = relay.hand_over(stream)
        stream._received += received
        stream._ended = ended
        stream._deaf = stream.stream.local_closed  # its peer has reset it, behind its end
        return stream

    def hand_over(self, owner: StreamOwner) -> tuple[bytes, bool]:
        """Give the stream to another owner. What was not received, and whether that is all.

        Raises ConnectionResetError when it is lost, or its peer reads no more.
        """
        if self._deaf:
            self.abort("the peer reads no more")
        if self._error:
            raise StreamError(self._error, self._code)
        self.stream.owner = owner
        received = bytes(self._received)
        self._received.clear()
        return received, self._ended

    # -- receiving

    async def receive(self, timeout_s: float | None) -> bytes:
        """All that has come, at least a byte; empty once the peer has ended its side.

        Raises ConnectionResetError when the stream is lost, TimeoutError when nothing comes in time.
        """
        await self.wait(timeout_s)
        data = bytes(self._received)
        self._received.clear()
        self._given = len(data)
        return data

    async def wait(self, timeout_s: float | None) -> None:
        """Return when there is something to receive. Raises as `receive` does."""
        if self._given:
            self._connection.consumed(self.stream, self._given, keeps_up=not self._received)
            self.carrier.touch()
            self._given = 0
        if not (self._received or self._ended or self._error):
            data_plane = self.carrier.plane
            waiter: plane.Waiter[None] = plane.Waiter(data_plane)
            self._reader = waiter
            expired = data_plane.expires(waiter, timeout_s) if timeout_s is not None else None
            try:
                await waiter
            finally:
                self._reader = None
                if expired is not None:
                    expired.discard(waiter)
        if self._error:
            raise StreamError(self._error, self._code)

    async def told_by(self, judge: Callable[[bytes], T | None], idle_s: float, begun_s: float) -> T | None:
        """What the judge makes of what comes first, of which nothing is received; None when the peer ends before that
        is known. Raises as `receive` does.

        The peer may be silent for `idle_s`; a beginning that says nothing yet may last `begun_s`.
        """
        deadline = 0.0
        while True:
            if self._error:
                raise StreamError(self._error, self._code)
            start = bytes(self._received)
            told = judge(start) if start else None
            if told is not None or self._ended:
                return told
            if start and not deadline:
                deadline = time.monotonic() + begun_s
            self._reader = plane.Waiter(self.carrier.plane)
            try:
                await self._wait(self._reader, max(deadline - time.monotonic(), 0.0) if start else idle_s)
            finally:
                self._reader = None

    def at_hand(self, least: int, most: int) -> bytes:
        """All that the peer has still to say, if that is here and of such a length; else empty: nothing is received."""
        if not self._ended or self._error or not least <= len(self._received) <= most:
            return b""
        data = bytes(self._received)
        self._received.clear()
        return data

    def put_back(self, data: bytes) -> None:
        """What was received last, and is for somebody else."""
        self._received[:0] = data
        self._given = max(self._given - len(data), 0)

    @property
    def quiet(self) -> bool:
        """Whether the peer has said nothing that was not received: a byte, an end or a reset."""
        return not (self._received or self._ended or self._error)

    # -- sending

    @property
    def window(self) -> int:
        """Bytes that the peer takes now."""
        return min(self.stream.send_window, self._connection.send_window)

    async def send(self, data: bytes, timeout_s: float | None, *, end: bool = False) -> None:
        """Return when all of it is on its way. Raises ConnectionResetError, or TimeoutError when the peer takes none of
        it in time. A peer that has ended its side and reads no more misses it, which is no error.

        `end`: nothing more will be sent; the peer may go on. Then there is at least a byte.
        """
        if data and not (self._error or self._deaf) and self._connection.write(self.stream, data, end=end):
            self.carrier.touch()
            return
        left = memoryview(data)
        while left and not self._deaf:
            if self._error:
                raise StreamError(self._error, self._code)
            room = self._room()
            if room:
                length = min(len(room), len(left))
                room[:length] = left[:length]
                left = left[length:]
                self._connection.commit(self.stream, length, end=end and not left)
                self.carrier.touch()
            elif not self._error:
                self._writer = plane.Waiter(self.carrier.plane)
                self.carrier.starved[self] = None
                try:
                    await self._wait(self._writer, timeout_s)
                finally:
                    self._writer = None
                    self.carrier.starved.pop(self, None)

    def _room(self) -> memoryview:
        room = self._connection.reserve(self.stream)
        if not room and self.stream.send_window > 0 and self._connection.send_window > 0:
            self.carrier.flush()  # the output buffer is full
            if not self._error:
                room = self._connection.reserve(self.stream)
        return room

    # -- ends

    def end(self) -> None:
        """Nothing more will be sent; the peer may go on."""
        if not self._error:
            self._connection.end(self.stream)
            self.carrier.touch()

    def close(self) -> None:
        """End it well: what was sent arrives, and what the peer still sends is dropped."""
        if self._error:
            return
        self._connection.end(self.stream)
        # A whole answer, and nothing more is read (RFC 9113 section 8.1). Nothing is sent when the peer has ended too.
        self._connection.reset(self.stream, ErrorCode.NO_ERROR)
        self.carrier.touch()
        self._leave("closed")

    def abort(self, text: str, code: ErrorCode = ErrorCode.CONNECT_ERROR) -> None:
        """End it as a reset, so that nobody takes what was sent for the whole; `text` is for those who wait here."""
        if not self._error:
            self.carrier.reset_stream(self.stream, code)
            self._leave(text)

    # -- from the tunnel

    def on_response(self, headers: Headers) -> None: ...

    def on_data(self, data: memoryview) -> None:
        self._received += data
        self._wake(self._reader)

    def on_end(self) -> None:
        self._ended = True
        self._wake(self._reader)

    @property
    def gone(self) -> bool:
        """Whether the peer reads no more."""
        return bool(self._error) or self._deaf

    def when_gone(self, callback: Callable[[], None]) -> None:
        """Have it called once the peer reads no more: now, if it does so no more already."""
        self.on_gone = callback
        if self.gone:
            callback()

    def on_reset(self, code: int, text: str = "") -> None:
        if code == ErrorCode.NO_ERROR and not text and self._ended:
            # What it has sent is whole, and it reads no more (see `Relay.on_reset`).
            self._deaf = True
            self._wake(self._writer)
        else:
            name = ErrorCode(code).name if code in ErrorCode.__members__.values() else str(code)
            self._code = None if text else code
            self._leave(text or f"the peer reset the stream: {name}")
        self.on_gone()

    def on_room(self) -> None:
        self._wake(self._writer)

    def _leave(self, error: str) -> None:
        self._error = error
        self.stream.owner = NOBODY
        self.on_over()
        self.carrier.starved.pop(self, None)
        self._wake(self._reader)
        self._wake(self._writer)

    async def _wait(self, waiter: plane.Waiter[None], timeout_s: float | None) -> None:
        await (waiter if timeout_s is None else self.carrier.plane.wait(waiter, timeout_s))

    @staticmethod
    def _wake(waiter: plane.Waiter[None] | None) -> None:
        if waiter is not None:
            waiter.set(None)


def _ignore() -> None: ...
